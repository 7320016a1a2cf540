"""A dialogue as parts: texts, and the ids of control tokens between them.

A chat format returns the parts. It finds the names of control tokens only in its own markup
(`split_names`). The text of a message is in a text part, where names have no meaning, so no message
can contain a control token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from npllama.special_tokens import special_ids, split_names
from npllama.tokenizer import Tokenizer

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""
Part = str | int | tuple[int, ...]
"""A text, the id of a control token, or the ids of a text."""
Parts = list[Part]
ChatFormat = Callable[[Tokenizer, Sequence[Message], str], Parts]
"""A function of a tokenizer, messages and the beginning of the answer that returns parts."""


def markup_of(tokenizer: Tokenizer) -> Callable[[str], Parts]:
    """A function that splits a format's own text at the names of control and added tokens."""
    ids_of = special_ids(tokenizer)
    return lambda markup: split_names(ids_of, markup)


def merged(parts: Iterable[Part]) -> Parts:
    """The same parts, with adjacent texts joined and without empty ones."""
    together: Parts = []
    for part in parts:
        if isinstance(part, str) and together and isinstance(together[-1], str):
            together[-1] += part
        elif part != "":
            together.append(part)
    return together


def encode_parts(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """Ids of a dialogue, with exactly one BOS in front.

    The text between two control tokens is encoded separately, so it gets the space that the
    tokenizer puts before a text. Meta's code, llama.cpp and Hugging Face's tokenizer.json of these
    models do the same, and the models were trained with it. transformers 5 omits the space if
    tokenizer_config.json has `legacy` false. A text after the ids of a text continues it, and gets
    no such space.
    """
    ids: list[int] = []
    continues = False  # whether the previous part is the ids of a text
    for part in merged(parts):
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, tuple):
            ids += part
        elif continues:
            ids += tokenizer.encode_continuation(part)
        else:
            ids += tokenizer.encode(part, bos=False)
        continues = isinstance(part, tuple)
    begin = next((i for i, id_ in enumerate(ids) if id_ != tokenizer.bos_id), len(ids))
    return [tokenizer.bos_id, *ids[begin:]]
