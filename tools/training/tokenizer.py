"""Trains a tokenizer of Llama's kind with sentencepiece."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from npllama.errors import InputError

_LONGEST = 2**16
"""Longer lines, in bytes, are split at spaces, because sentencepiece ignores lines that are too
long."""


def _parts(line: str) -> Iterator[str]:
    part = ""
    for word in re.findall(r" *[^ ]+| +$", line):
        if part and len((part + word).encode()) > _LONGEST:
            yield part
            part = ""
        part += word
    if part:
        yield part


def train_tokenizer(stories: Iterable[str], vocab_size: int) -> bytes:
    """Train a sentencepiece model with the settings of Llama 2's: BPE, byte fallback, separate
    digits, no normalization, all white space kept. Ids: 0 unknown, 1 BOS, 2 EOS, 3 .. 258 bytes.

    Raises:
        InputError: the text has too few different pieces for `vocab_size`, or `vocab_size` is
            too small for the special tokens and bytes.
    """
    model = io.BytesIO()
    lines = (part for story in stories for line in story.split("\n") for part in _parts(line))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _LONGEST,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[-1].rpartition("] ")[2].strip(" .")
        raise InputError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({reason}): "
            "choose another vocab_size"
        ) from None
    return model.getvalue()
