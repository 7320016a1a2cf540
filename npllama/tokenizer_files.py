"""A model directory's tokenizer: which of its files decides what.

tokenizer.model, or else tokenizer.json, has the pieces. Tokens beside them are named in
added_tokens.json, tokenizer_config.json and tokenizer.json.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from npllama.config import LlamaConfig, read_json
from npllama.errors import ConfigError, TokenizerError
from npllama.not_a_model import content_instead
from npllama.small_file import MAX_TOKENIZER
from npllama.tokenizer import AddedToken, Tokenizer
from npllama.tokenizer_json import added_tokens

_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_PADDING = 1024
"""Rows that no id of the tokenizer's needs, and yet a right tokenizer may leave: vocabularies are
padded to a multiple of 128 for each of up to 8 shards."""


def read_tokenizer(directory: Path, config: LlamaConfig) -> Tokenizer | None:
    """The directory's tokenizer with its added tokens; None where there is no tokenizer file.

    `add_bos_token` and `add_eos_token` come from tokenizer_config.json; true and false where
    they are missing.

    Raises:
        TokenizerError: a damaged tokenizer.model, a tokenizer.json of another kind than Llama's,
            or an added token that is none.
        ConfigError: a damaged JSON file.
    """
    path = tokenizer_file(directory)
    if path is None:
        return None
    if (what := content_instead(path)) is not None:
        raise TokenizerError(f"{path} {what}")
    tokenizer = Tokenizer(path)
    settings = _settings(directory / "tokenizer_config.json")
    added: dict[int, AddedToken] = {}
    for id_, token in _added_tokens(directory, settings, path, tokenizer, config):
        added.setdefault(id_, token)
    tokenizer = tokenizer.for_model(config.vocab_size, config.eos_ids, added)
    tokenizer.add_bos = _flag(directory, settings, "add_bos_token", True)
    tokenizer.add_eos = _flag(directory, settings, "add_eos_token", False)
    return tokenizer


def tokenizer_file(directory: Path) -> Path | None:
    """tokenizer.model, or else tokenizer.json, or else None."""
    paths = (directory / "tokenizer.model", directory / "tokenizer.json")
    return next((path for path in paths if path.exists()), None)


def check_size(tokenizer: Tokenizer, name: str | Path, n_rows: int) -> None:
    """Refuse a tokenizer with more pieces than the model has rows.

    Args:
        name: the tokenizer's file, for the message.
        n_rows: vocab_size of the model.

    Raises:
        TokenizerError: the tokenizer is of another model.
    """
    if tokenizer.vocab_size > n_rows:
        raise TokenizerError(
            f"{name} has {tokenizer.vocab_size} pieces and the model {n_rows}: "
            "expected the tokenizer that the model was trained with"
        )


def mismatch(tokenizer: Tokenizer, n_rows: int, end_ids: Collection[int] = ()) -> str | None:
    """What to say of a tokenizer with far fewer ids than the model has rows, if it has."""
    ids = {*tokenizer.added, *end_ids}
    n_ids = tokenizer.vocab_size + sum(tokenizer.vocab_size <= id_ < n_rows for id_ in ids)
    if n_rows - n_ids < _PADDING:
        return None
    return (
        f"the tokenizer has {n_ids} tokens and the model {n_rows}: text will be wrong if it is "
        "not the tokenizer that came with the checkpoint"
    )


def _settings(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _flag(directory: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        path = directory / "tokenizer_config.json"
        raise TokenizerError(f"{path}: {name} is {value!r}: expected true or false")
    return value


def _added_tokens(
    directory: Path,
    settings: Mapping[str, Any],
    tokenizer_path: Path,
    tokenizer: Tokenizer,
    config: LlamaConfig,
) -> Iterator[tuple[int, AddedToken]]:
    """Of the three files; what says more of a token comes first."""
    decoder = settings.get("added_tokens_decoder") or {}
    path = directory / "tokenizer_config.json"
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: added_tokens_decoder is no object of tokens by id")
    for id_, token in decoder.items():
        fields = token if isinstance(token, dict) else {}
        id_ = int(id_) if re.fullmatch("[0-9]{1,9}", id_) else id_
        yield checked_token(path, id_, fields.get("content"), fields.get("special"))
    path = directory / "tokenizer.json"
    # which is large: read where it may hold what the others do not
    is_needed = not decoder and config.vocab_size > tokenizer.vocab_size
    if path == tokenizer_path or (is_needed and path.exists()):
        for fields in _of_tokenizer_json(path, is_decisive=path == tokenizer_path):
            yield checked_token(
                path, fields.get("id"), fields.get("content"), fields.get("special")
            )
    path = directory / "added_tokens.json"
    if path.exists():
        special = {*_special_texts(settings)}
        special |= {*_special_texts(_settings(directory / "special_tokens_map.json"))}
        for content, id_ in read_json(path).items():
            yield checked_token(path, id_, content, content in special)


def _of_tokenizer_json(path: Path, is_decisive: bool) -> list[Mapping[str, Any]]:
    """Its added tokens; beside a tokenizer.model, a file that cannot be read has none."""
    try:
        return added_tokens(read_json(path, MAX_TOKENIZER))
    except ConfigError:
        if is_decisive:
            raise
        return []


def checked_token(path: Path, id_: Any, content: Any, special: Any) -> tuple[int, AddedToken]:
    """An added token's id and what it is.

    Raises:
        TokenizerError: `id_` is not an id, or `content` not a text; it names `path`.
    """
    is_text = isinstance(content, str) and not re.search("[\\ud800-\\udfff]", content)
    if type(id_) is not int or id_ < 0 or not is_text:
        raise TokenizerError(
            f"{path}: the added token {repr(content)[:60]} has the id {repr(id_)[:20]}: "
            "expected a text and a whole number from 0"
        )
    return id_, AddedToken(content, bool(special))


def _special_texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens that have a role: as such, or as the content of an object."""
    tokens: list[Any] = [fields.get(f"{role}_token") for role in _ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = fields.get(name)
        more = list(more.values()) if isinstance(more, dict) else more
        tokens += more if isinstance(more, list) else []
    for token in tokens:
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield text
