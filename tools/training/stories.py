"""Reads a text file as stories, and encodes stories as token ids."""

import re
from pathlib import Path

import numpy as np

from npllama.errors import InputError
from npllama.progress import work
from npllama.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
_SEPARATOR_LINE = re.compile(f"^{re.escape(SEPARATOR)}$", re.MULTILINE)
_SENTENCE_ENDS = (".", "!", "?")
_CLOSING = "\"'\u201d\u2019)"


def read_stories(path: Path) -> list[str]:
    """The stories of a UTF-8 text file, separated by lines of SEPARATOR. A file without such lines
    is one story. Line ends around a story are removed; empty stories are left out.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 at byte {error.start}: save the text as UTF-8"
        ) from None
    parts = _SEPARATOR_LINE.split(text)
    stories = [story for story in (part.strip("\n") for part in parts) if story]
    if not stories:
        raise InputError(
            f"{path} holds no text: expected stories separated by lines of {SEPARATOR}"
        )
    return stories


def is_complete(story: str) -> bool:
    """Whether a story ends like a sentence, rather than being cut off."""
    return story.rstrip().rstrip(_CLOSING).endswith(_SENTENCE_ENDS)


def encode_stories(stories: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Encode each story as BOS, its ids and, if the story is complete, EOS; int32.

    Raises:
        InputError: the tokenizer has no EOS.
    """
    if tokenizer.eos_id < 0:
        raise InputError("the tokenizer has no EOS id: expected a Llama tokenizer, which has one")
    sequences = []
    with work("encoding the text", len(stories)) as encoding:
        for story in stories:
            ids = tokenizer.encode(story)
            if is_complete(story):
                ids.append(tokenizer.eos_id)
            sequences.append(np.array(ids, dtype="int32"))
            encoding.advance(1)
    return sequences
