"""The tokenizer of a model directory, read from its several files.

The pieces come from tokenizer.model or, without it, from tokenizer.json. Added tokens are named in
tokenizer_config.json, tokenizer.json and added_tokens.json.
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
"""A correct tokenizer may have up to this many ids fewer than the model has embedding rows, because
vocabularies are padded to a multiple of 128 for each of up to 8 shards."""


def read_tokenizer(directory: Path, config: LlamaConfig) -> Tokenizer | None:
    """The directory's tokenizer with its added tokens; None if there is no tokenizer file.

    `add_bos_token` and `add_eos_token` come from tokenizer_config.json. Their defaults are true
    and false.

    Raises:
        TokenizerError: tokenizer.model is damaged, tokenizer.json is not of Llama's kind, or the
            entry of an added token is invalid.
        ConfigError: a JSON file is damaged.
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
    """The path of tokenizer.model, else of tokenizer.json, else None."""
    paths = (directory / "tokenizer.model", directory / "tokenizer.json")
    return next((path for path in paths if path.exists()), None)


def check_size(tokenizer: Tokenizer, name: str | Path, n_rows: int) -> None:
    """Refuse a tokenizer that has more pieces than the model has embedding rows.

    Args:
        name: the tokenizer's file, for the message.
        n_rows: vocab_size of the model.

    Raises:
        TokenizerError: the tokenizer has more pieces, so it belongs to another model.
    """
    if tokenizer.vocab_size > n_rows:
        raise TokenizerError(
            f"{name} has {tokenizer.vocab_size} pieces, but the model has {n_rows} embedding rows: "
            "expected the tokenizer that came with the model"
        )


def mismatch(tokenizer: Tokenizer, n_rows: int, end_ids: Collection[int] = ()) -> str | None:
    """A warning if the tokenizer has far fewer ids than the model has embedding rows, else None."""
    ids = {*tokenizer.added, *end_ids}
    n_ids = tokenizer.vocab_size + sum(tokenizer.vocab_size <= id_ < n_rows for id_ in ids)
    if n_rows - n_ids < _PADDING:
        return None
    return (
        f"the tokenizer has {n_ids} tokens, but the model has {n_rows} embedding rows: use the "
        "tokenizer that came with the model, or the text may be wrong"
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
    """Yield the added tokens of the three files, the most detailed file first."""
    decoder = settings.get("added_tokens_decoder") or {}
    path = directory / "tokenizer_config.json"
    if not isinstance(decoder, dict):
        raise TokenizerError(
            f"{path}: added_tokens_decoder is not a JSON object: get the file again"
        )
    for id_, token in decoder.items():
        fields = token if isinstance(token, dict) else {}
        id_ = int(id_) if re.fullmatch("[0-9]{1,9}", id_) else id_
        yield checked_token(path, id_, fields.get("content"), fields.get("special"))
    path = directory / "tokenizer.json"
    # tokenizer.json is large, so it is read only if it may name tokens that the others do not
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
    """The added tokens of a tokenizer.json. If it is unreadable, the error is raised only if
    the tokenizer itself comes from this file."""
    try:
        return added_tokens(read_json(path, MAX_TOKENIZER))
    except ConfigError:
        if is_decisive:
            raise
        return []


def checked_token(path: Path, id_: Any, content: Any, special: Any) -> tuple[int, AddedToken]:
    """The id and the AddedToken of one entry.

    Raises:
        TokenizerError: `id_` is not an id, or `content` is not a text. The message names `path`.
    """
    is_text = isinstance(content, str) and not re.search("[\\ud800-\\udfff]", content)
    if type(id_) is not int or id_ < 0 or not is_text:
        raise TokenizerError(
            f"{path}: the added token {repr(content)[:60]} has the id {repr(id_)[:20]}: "
            "expected a text and a whole number from 0"
        )
    return id_, AddedToken(content, bool(special))


def _special_texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens that have a role, such as BOS. The file names a token by its text, or by
    an object with a content."""
    tokens: list[Any] = [fields.get(f"{role}_token") for role in _ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = fields.get(name)
        more = list(more.values()) if isinstance(more, dict) else more
        tokens += more if isinstance(more, list) else []
    for token in tokens:
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield text
