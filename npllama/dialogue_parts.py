"""A dialogue as parts: texts, and the ids of control tokens between them.

A chat format makes them. Control tokens are found in its own markup alone (`split_names`), and
the text of a message goes into a text part, where no token has a name: so no message can make a
control token, whatever it says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from npllama.special_tokens import special_ids, split_names
from npllama.tokenizer import Tokenizer

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""
Part = str | int | tuple[int, ...]
"""A text, the id of a control token, or the ids of a text, which stand for it."""
Parts = list[Part]
ChatFormat = Callable[[Tokenizer, Sequence[Message], str], Parts]
"""From a tokenizer, messages and the beginning of the answer to parts."""


def markup_of(tokenizer: Tokenizer) -> Callable[[str], Parts]:
    """`split_names` of a format's own text, with the control and added tokens of a tokenizer."""
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

    The text between two control tokens is encoded as a text of its own, so it gets the space
    that the tokenizer puts before a text. That is what Meta's code, llama.cpp and Hugging Face's
    tokenizer.json of these models do, and what the models were trained on. transformers 5 leaves
    the space out where tokenizer_config.json says `legacy` false. A text that follows the ids of a
    text continues it, and gets no such space.
    """
    ids: list[int] = []
    continues = False  # whether the part before is a text that is given as ids
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
