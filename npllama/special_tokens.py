"""A prompt in which control tokens, written by their names, count as what they control."""

import re
from collections.abc import Mapping

from npllama.tokenizer import Tokenizer


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """As `Tokenizer.encode_prompt`, but each name of a special token becomes its id.

    Of two names that begin at the same place the longer one counts. The text between names is
    encoded piece by piece, each as a text of its own: with the space that the tokenizer puts
    before a text, as Hugging Face's tokenizer of Llama 2 does. A text that begins with BOS
    gets no second one, and one that ends with EOS none either.

    Raises:
        InputError: text that is not valid Unicode (a lone surrogate).

    >>> from npllama import load
    >>> tokenizer = load().tokenizer
    >>> tokenizer.decode(encode_special(tokenizer, "One.</s>Two."))
    'One. Two.'
    """
    ids_of = special_ids(tokenizer)
    longest_first = sorted(ids_of, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    ids: list[int] = []
    for i, part in enumerate(parts):  # text, name, text, ..., text
        ids += [ids_of[part]] if i % 2 else tokenizer.encode(part, bos=False)
    if not ids:
        return [tokenizer.bos_id]
    if tokenizer.add_bos and ids[0] != tokenizer.bos_id:
        ids.insert(0, tokenizer.bos_id)
    if tokenizer.add_eos and tokenizer.eos_id >= 0 and ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    return ids


def special_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Name -> id of every token that no text makes: control pieces, the unknown one, and added
    tokens."""
    processor = tokenizer.processor
    pieces = range(tokenizer.vocab_size)
    ids = [id_ for id_ in pieces if processor.is_control(id_) or processor.is_unknown(id_)]
    names = {processor.id_to_piece(id_): id_ for id_ in ids}
    names |= {token.content: id_ for id_, token in tokenizer.added.items()}
    return {name: id_ for name, id_ in names.items() if name}
