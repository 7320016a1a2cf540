"""A dialogue as parts: text, and the ids of control tokens between them.

A chat format makes them. Control tokens are found in its own markup alone (`split_names`), and
the text of a message goes into a text part, where no token has a name: so no message can make a
control token, whatever it says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from npllama.special_tokens import special_ids, split_names
from npllama.tokenizer import Tokenizer

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""
Parts = list[str | int]
ChatFormat = Callable[[Tokenizer, Sequence[Message], str], Parts]
"""From a tokenizer, messages and the beginning of the answer to parts."""


def markup_of(tokenizer: Tokenizer) -> Callable[[str], Parts]:
    """`split_names` of a format's own text, with the control and added tokens of a tokenizer."""
    ids_of = special_ids(tokenizer)
    return lambda markup: split_names(ids_of, markup)


def encode_parts(tokenizer: Tokenizer, parts: Iterable[str | int]) -> list[int]:
    """Ids of a dialogue, with exactly one BOS in front.

    The text between two control tokens is encoded as a text of its own, so it gets the space
    that the tokenizer puts before a text. That is what Meta's code, llama.cpp and Hugging Face's
    tokenizer.json of these models do, and what the models were trained on. transformers 5 leaves
    the space out where tokenizer_config.json says `legacy` false.
    """
    ids: list[int] = []
    text = ""
    for part in [*parts, None]:
        if isinstance(part, str):
            text += part
            continue
        if text:
            ids += tokenizer.encode(text, bos=False)
            text = ""
        if part is not None:
            ids.append(part)
    begin = next((i for i, id_ in enumerate(ids) if id_ != tokenizer.bos_id), len(ids))
    return [tokenizer.bos_id, *ids[begin:]]
