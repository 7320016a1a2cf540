"""Special tokens by name, and encoding of texts in which these names stand for the tokens.

A special token here is any token that `Tokenizer.encode` never produces.
"""

import re
from collections.abc import Mapping

from npllama.tokenizer import Tokenizer


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Like `Tokenizer.encode_prompt`, but each name of a special token in `text` becomes its id.

    Each part between names is encoded as a text of its own, so it starts with the space that the
    tokenizer inserts before a text. Hugging Face's tokenizer of Llama 2 does the same. BOS is not
    added to a text that begins with it, nor EOS to a text that ends with it.

    Raises:
        InputError: the text is not valid Unicode (it has a lone surrogate).

    >>> from npllama import load
    >>> tokenizer = load().tokenizer
    >>> tokenizer.decode(encode_special(tokenizer, "One.</s>Two."))
    'One. Two.'
    """
    ids: list[int] = []
    for part in split_names(special_ids(tokenizer), text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, bos=False)
    if not ids:
        return [tokenizer.bos_id]
    if tokenizer.add_bos and ids[0] != tokenizer.bos_id:
        ids.insert(0, tokenizer.bos_id)
    if tokenizer.add_eos and tokenizer.eos_id >= 0 and ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    return ids


def special_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Name -> id of every special token: control pieces, the unknown piece, and added tokens."""
    processor = tokenizer.processor
    pieces = range(tokenizer.vocab_size)
    ids = [id_ for id_ in pieces if processor.is_control(id_) or processor.is_unknown(id_)]
    names = {processor.id_to_piece(id_): id_ for id_ in ids}
    names |= {token.content: id_ for id_, token in tokenizer.added.items()}
    return {name: id_ for name, id_ in names.items() if name}


def split_names(ids_of: Mapping[str, int], text: str) -> list[str | int]:
    """Split a text at the names of tokens, and replace each name by the token's id.

    Args:
        ids_of: name -> id. If two names begin at the same position, the longer one counts.
    """
    if not ids_of:
        return [text]
    longest_first = sorted(ids_of, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [ids_of[part] if i % 2 else part for i, part in enumerate(parts)]  # text, name, ...
