"""Converts tokenizer.json, the Hugging Face tokenizers' format, to a sentencepiece model.

transformers 5 saves only this file. Its merges list every split of every piece, sorted by the
scores of the original sentencepiece model. sentencepiece merges the adjacent pieces whose union has
the highest score first, so scores can be derived from the order of the merges.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npllama.config import read_json
from npllama.errors import ConfigError, OtherTokenizerError, TokenizerError
from npllama.sentencepiece_model import NAMES, PieceType, bpe_model
from npllama.small_file import MAX_TOKENIZER

_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# Llama 2's pieces that consist of several spaces, with their ids, by which its vocabulary is
# recognized. Meta gave them the score -1e9 after training, so that they are merged last, from the
# left. From a tokenizer.model alone, transformers 5 sorts merges by id, which puts them first.
_RUNS_OF_LLAMA = {
    _SPACE * length: id_
    for length, id_ in enumerate(
        [259, 1678, 268, 418, 539, 4706, 308, 3986, 965, 9651, 632, 795, 1669, 18884, 462], 2
    )
}
_ROLES = ("unk", "bos", "eos")


def sentencepiece_from_json(path: Path) -> bytes:
    """The serialized sentencepiece model with the same ids as a tokenizer.json of Llama's kind.

    Llama's kind is BPE with byte fallback over the text, with U+2581 in place of each space. The
    pieces for unknown, BOS and EOS come from tokenizer_config.json in the same directory, if it
    exists. Encoding a text never produces a piece that no merge makes. Special pieces become
    control tokens.

    Raises:
        OtherTokenizerError: the tokenizer is of another kind. The message names the kind.
        TokenizerError: the file is damaged.
    """
    path = Path(path)
    try:
        fields = read_json(path, MAX_TOKENIZER)
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.exists() else {}
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
    try:
        dummy_prefix = _has_dummy_prefix(fields)
        model = fields["model"]
        vocabulary = _vocabulary(model)
        names = _special_names(model, config, vocabulary)
        pieces = _pieces(vocabulary, _merges(model, vocabulary), names, fields)
        return bpe_model(pieces, dummy_prefix=dummy_prefix, names=tuple(names.values()))
    except _OtherKindError as error:
        is_damaged = isinstance(error, _DamagedError)
        raise (TokenizerError if is_damaged else OtherTokenizerError)(
            f"{path} {error}: expected a BPE with byte fallback, converted from a sentencepiece "
            "model such as Llama 2's; get tokenizer.model, or pass token ids"
        ) from None


def added_tokens(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of `added_tokens` in a tokenizer.json; empty if there are none."""
    tokens = fields.get("added_tokens")
    return [t for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else []


class _OtherKindError(Exception):
    """A tokenizer that is not of Llama's kind. The message continues a sentence about the file."""


class _DamagedError(_OtherKindError):
    """A damaged tokenizer file, of whatever kind."""


def _has_dummy_prefix(fields: Mapping[str, Any]) -> bool:
    """Whether the normalizer or the pre-tokenizer inserts a space before the text."""
    model = fields.get("model")
    if not isinstance(model, dict):
        raise _OtherKindError("has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    parts = [*_steps(fields, "pre_tokenizer", "pretokenizers"), *_steps(fields, "decoder")]
    if any(part.get("type") == "ByteLevel" for part in parts):
        raise _OtherKindError("is a byte-level BPE, the kind of GPT-2 and Llama 3")
    if kind != "BPE":
        raise _OtherKindError(f"is a {kind} model")
    if model.get("byte_fallback") is not True:
        raise _OtherKindError("is a BPE without byte fallback")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise _OtherKindError(f"is a BPE with {name} {model[name]!r}")
    prefix = [_normalizes(step) for step in _steps(fields, "normalizer", "normalizers")]
    prefix += [_pre_tokenizes(step) for step in _steps(fields, "pre_tokenizer", "pretokenizers")]
    if not prefix:
        raise _OtherKindError("does not replace spaces")
    return any(prefix)


def _steps(fields: Mapping[str, Any], name: str, inside: str = "") -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder: none, one, or those of a Sequence."""
    step = fields.get(name)
    if step is None:
        return []
    if not isinstance(step, dict):
        raise _DamagedError(f"has the {name} {step!r}")
    if step.get("type") != "Sequence":
        return [step]
    steps = step.get(inside or f"{name}s")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise _DamagedError(f"has a damaged {name}")
    return steps


def _normalizes(step: Mapping[str, Any]) -> bool:
    """Whether this normalizer inserts a space before the text; others raise an error."""
    if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
        return True
    replaces = (step.get("pattern"), step.get("content"))
    if step.get("type") == "Replace" and replaces == ({"String": " "}, _SPACE):
        return False
    raise _OtherKindError(f"has the normalizer {_shown(step)}")


def _pre_tokenizes(step: Mapping[str, Any]) -> bool:
    """Whether this pre-tokenizer inserts a space before the text; others raise an error."""
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if (
        step.get("type") == "Metaspace"
        and step.get("replacement") == _SPACE
        and step.get("split") is False
        and scheme in ("first", "always", "never")
    ):
        return scheme != "never"
    raise _OtherKindError(f"has the pre-tokenizer {_shown(step)}")


def _shown(step: Mapping[str, Any]) -> str:
    """The type of a step, with its settings if they are short."""
    settings = ", ".join(f"{key} {value!r}" for key, value in step.items() if key != "type")
    settings = f" ({settings})" if 0 < len(settings) <= 100 else ""
    return f"{step.get('type')}{settings}"


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    """The pieces in the order of their ids."""
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not all(type(id_) is int for id_ in ids.values()):
        raise _DamagedError("has a damaged vocabulary")
    vocabulary = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in vocabulary] != list(range(len(ids))):
        raise _DamagedError("has a vocabulary whose ids are not 0, 1, 2, ...")
    if not all(vocabulary) or not _is_unicode("".join(vocabulary)):
        raise _DamagedError("has a piece that is empty or not valid Unicode")
    missing = [piece for piece in _BYTES if piece not in ids]
    if missing:
        raise _OtherKindError(f"lacks the byte {missing[0]}")
    return vocabulary


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _special_names(
    model: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Sequence[str]
) -> dict[str, str]:
    """The pieces for unknown, BOS and EOS, by role."""
    known = set(vocabulary)
    names = dict(zip(_ROLES, NAMES, strict=True))
    for role in names:
        given = [config.get(f"{role}_token"), model.get("unk_token") if role == "unk" else None]
        texts = [name.get("content") if isinstance(name, dict) else name for name in given]
        names[role] = next((t for t in texts if isinstance(t, str) and t in known), names[role])
        if names[role] not in known:
            raise _OtherKindError(f"has no piece {names[role]}")
    return names


def _merges(model: Mapping[str, Any], vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of pieces to merge. An entry is "a b" or ["a", "b"]; pieces hold no space."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise _DamagedError("has no merges")
    known = set(vocabulary)
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(part, str) and part in known for part in pair):
            raise _DamagedError(f"has the merge {str(merge)[:100]!r}, which is no pair of pieces")
        if pair[0] + pair[1] not in known:
            raise _DamagedError(f"has the merge {merge!r}, whose union is not a piece")
        pairs.append((pair[0], pair[1]))
    return pairs


def _pieces(
    vocabulary: Sequence[str],
    merges: Sequence[tuple[str, str]],
    names: Mapping[str, str],
    fields: Mapping[str, Any],
) -> list[tuple[str, float, PieceType]]:
    """Text, score and type of each piece, in the order of the ids."""
    added = added_tokens(fields)
    control = {str(token.get("content")) for token in added if token.get("special")}
    control |= {*names.values(), *filter(_BYTE.fullmatch, vocabulary)}  # no text gives them
    merges = [(left, right) for left, right in merges if left + right not in control]
    is_llamas = _RUNS_OF_LLAMA.items() <= {p: id_ for id_, p in enumerate(vocabulary)}.items()
    runs = _RUNS_OF_LLAMA if is_llamas else {}
    scores = _scores([merge for merge in merges if "".join(merge) not in runs])
    scores |= dict.fromkeys(runs, -1e9)
    first = next((p for p in vocabulary if len(p) > 1 and p not in control), "")
    if scores and first not in scores and len(first) == 2 and set(first) <= set(vocabulary):
        scores[first] = 1.0  # its score was 0, so transformers 4 dropped its merges
    normal = {p for p in vocabulary if p not in control and (len(p) == 1 or p in scores)}
    _check_all_splits(merges, normal)
    pieces = []
    for piece in vocabulary:
        kind, score = PieceType.CONTROL, 0.0
        if piece in normal or not (piece in control or _can_be_made(piece, normal)):
            kind, score = PieceType.NORMAL, scores.get(piece, -float(len(scores)))
        elif piece == names["unk"]:
            kind = PieceType.UNKNOWN
        elif _BYTE.fullmatch(piece):
            kind = PieceType.BYTE
        pieces.append((piece, score, kind))
    return pieces


def _can_be_made(piece: str, normal: set[str]) -> bool:
    """Whether two adjacent pieces could be joined into this piece although no merge lists it."""
    splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    return any(all(len(p) == 1 or p in normal for p in split) for split in splits)


def _scores(merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Piece -> its score: 0 for the first piece that the merges make, -1 for the second, and so on.

    The merges of one piece are consecutive, because the list is sorted by score. If they alternate
    with those of another piece, both pieces had the same score in the original model, and their
    order cannot be recovered.
    """
    scores: dict[str, float] = {}
    previous = None
    for left, right in merges:
        piece = left + right
        if piece != previous and piece in scores:
            raise _OtherKindError(f"lists the merges of {piece!r} in several places")
        scores.setdefault(piece, -float(len(scores)))
        previous = piece
    return scores


def _check_all_splits(merges: Sequence[tuple[str, str]], normal: set[str]) -> None:
    """Check that the list has every split of each piece, because sentencepiece merges any two
    adjacent pieces whose union is a piece."""
    listed = set(merges)
    for piece in {left + right for left, right in merges}:
        for i in range(1, len(piece)):
            split = (piece[:i], piece[i:])
            if split[0] in normal and split[1] in normal and split not in listed:
                raise _OtherKindError(f"lacks the merge {split[0]!r} {split[1]!r}")
