"""Reads tokenizer.model, tokenizer.json or llama2.c's tokenizer.bin as a sentencepiece model."""

import struct
from collections.abc import Iterator
from pathlib import Path

from npllama.config import read_json
from npllama.errors import TokenizerError
from npllama.not_a_model import content_instead
from npllama.sentencepiece_model import PieceType, bpe_model, special_and_byte_pieces
from npllama.small_file import MAX_TOKENIZER, read_small_file
from npllama.tokenizer import Tokenizer
from npllama.tokenizer_files import check_size, checked_token
from npllama.tokenizer_json import added_tokens, sentencepiece_from_json

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": False,
}
"""tokenizer_config.json for transformers. transformers may encode leading and double spaces
differently from sentencepiece."""
DESCRIBING = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
DESCRIBING += ("added_tokens.json",)
"""Hugging Face files that describe the tokenizer.model in the same directory."""


def read_tokenizer(path: Path, vocab_size: int) -> bytes:
    """The contents of a tokenizer.model for a model of `vocab_size`.

    Raises:
        TokenizerError: the file has none of the formats, or more pieces than the model's
            vocabulary.
    """
    try:
        content = read_small_file(path, MAX_TOKENIZER)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    if (what := content_instead(path)) is not None:
        raise TokenizerError(f"{path} {what}")
    if path.suffix == ".bin":
        content = from_tokenizer_bin(content, path)
    elif path.suffix == ".json":
        content = sentencepiece_from_json(path)
    else:
        Tokenizer(path)  # raises an error if it is not a sentencepiece model
    check_size(Tokenizer.from_bytes(content), path, vocab_size)
    return content


def tokenizer_config(path: Path) -> dict[str, object]:
    """The fields of tokenizer_config.json. From a tokenizer.json they include its added tokens.

    Raises:
        ConfigError, TokenizerError: tokenizer.json is damaged.
    """
    if path.suffix != ".json":
        return CONFIG
    tokens = added_tokens(read_json(path, MAX_TOKENIZER))
    for token in tokens:  # refuse what could not be loaded later
        checked_token(path, token.get("id"), token.get("content"), token.get("special"))
    fields = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    decoder = {
        str(token.get("id")): {name: token[name] for name in fields if name in token}
        for token in tokens
    }
    return CONFIG | ({"added_tokens_decoder": decoder} if decoder else {})


def from_tokenizer_bin(content: bytes, path: Path) -> bytes:
    """llama2.c's pieces as a sentencepiece model. Spaces become U+2581, as in sentencepiece."""
    pieces = [
        (text.decode("utf-8", errors="replace").replace(" ", "\u2581"), score, PieceType.NORMAL)
        for text, score in _pieces(content, path)
    ]
    special = special_and_byte_pieces()
    if len(pieces) < len(special):
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces: expected at least the {len(special)} special "
            "tokens and bytes of a llama2.c tokenizer"
        )
    return bpe_model(special + pieces[len(special) :])


def _pieces(content: bytes, path: Path) -> Iterator[tuple[bytes, float]]:
    """Parse int32 longest length, then for each piece: float32 score, int32 length, bytes."""
    position = 4
    while position < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, position)
        except struct.error:
            length = -1
        text = content[position + 8 : position + 8 + max(length, 0)]
        if length < 0 or len(text) != length:
            raise TokenizerError(
                f"{path} is truncated, or is not a llama2.c tokenizer.bin: get the file again"
            )
        yield text, score
        position += 8 + length
