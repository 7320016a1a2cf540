"""RopeScaling: how a checkpoint slows down its rotary embeddings to reach a longer context.

This module reads and checks the config fields. The formulas are in ops/rope_frequencies.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npllama.errors import ConfigError, InputError

KINDS = ("linear", "dynamic", "yarn", "llama3")
MAX_FACTOR = 2**16
_TRAINED = 4096
"""Context length of LLaMA-2. If a checkpoint states a context of at most this length, that length
does not include the scaling factor."""

_ORIGINAL = "original_max_position_embeddings"
# kind -> the fields that only this kind uses
_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "yarn": (
        _ORIGINAL,
        *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (_ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_REQUIRED = {"yarn": (_ORIGINAL,), "llama3": _FIELDS["llama3"]}
# fields that every kind may have: config.py reads them, or they have no effect
_OTHERS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", _ORIGINAL}


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotary frequencies. All fields except `kind` have their config.json names.

    Attributes:
        kind: "linear", "dynamic", "yarn" or "llama3".
        factor: s, at least 1: the ratio of the new context length to the original one.
        original_max_position_embeddings: L0, the original context length (yarn, llama3).
        beta_fast, beta_slow: yarn keeps the frequency of pairs that make more than beta_fast
            rotations within L0 positions. It divides by s the frequency of pairs that make fewer
            than beta_slow.
        attention_factor: yarn multiplies cosines and sines by this; None for yarn's formula.
        mscale, mscale_all_dim: parameters of that formula, used if both are above 0.
        truncate: whether yarn rounds the bounds of its ramp to whole pairs.
        low_freq_factor, high_freq_factor: llama3's counterparts of beta_slow and beta_fast.

    Raises:
        ConfigError: a value is out of range, or a field that the kind requires is missing.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(_unknown(self.kind))
        for name in _REQUIRED.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ConfigError(f"{self.kind!r} needs the field {name}, which is missing")
        _check_number("factor", self.factor, least=1, most=MAX_FACTOR)
        for name in _FIELDS[self.kind]:
            _check_field(name, getattr(self, name))
        slow, fast = ("low_freq_factor", "high_freq_factor")
        if self.kind == "yarn":
            slow, fast = ("beta_slow", "beta_fast")
        if self.kind in ("yarn", "llama3") and getattr(self, slow) >= getattr(self, fast):
            raise ConfigError(
                f"{self.kind!r} with {slow} {getattr(self, slow)!r} and {fast} "
                f"{getattr(self, fast)!r}: expected the first below the second"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether angles, cosines and sines are the plain ones at every length."""
        return self.factor == 1 and self.attention_factor in (None, 1)

    def to_hf(self) -> dict[str, Any]:
        """The object for a config.json, spelled so that as many older readers as possible read
        it."""
        spelling = "rope_type" if self.kind == "llama3" else "type"
        own = {name: getattr(self, name) for name in _FIELDS[self.kind]}
        given = {name: value for name, value in own.items() if value is not None}
        return {spelling: self.kind, "factor": self.factor} | given


def read_rope_scaling(
    rope: Mapping[str, Any], context: int, original: object = None
) -> RopeScaling | None:
    """Read a `rope_scaling` or `rope_parameters` object; None if nothing is scaled.

    The rules are those of transformers. `rope_type` takes precedence over `type`; without either
    the kind is "default". `original_max_position_embeddings` outside the object takes precedence
    over the one inside it; without either it is `context`. If yarn has no factor, the factor is
    context / original.

    Args:
        rope: the object; a field with the value null counts as absent.
        context: max_position_embeddings.
        original: original_max_position_embeddings outside the object.

    Raises:
        ConfigError: an unknown kind, or a field that is missing, out of range or unknown.

    >>> read_rope_scaling({"type": "linear", "factor": 4.0}, 4096).factor
    4.0
    >>> read_rope_scaling({"type": "linear", "factor": 1.0}, 4096)
    """
    given = {name: value for name, value in rope.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default" and kind not in KINDS:
        raise ConfigError(_unknown(kind))
    known = _OTHERS | {"factor", *_FIELDS.get(kind, ())}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{kind!r} with {name} {value!r}: that field is not implemented")
    if kind == "default":
        if given.get("factor", 1) != 1 or isinstance(given.get("factor"), bool):
            raise ConfigError(
                f"'default' with factor {given['factor']!r}: expected a rope_type that scales, "
                f"one of {', '.join(KINDS)}"
            )
        return None
    inside = given.get(_ORIGINAL)
    if kind == "dynamic" and inside not in (None, context):  # readers disagree on which to use
        raise ConfigError(
            f"'dynamic' with {_ORIGINAL} {inside!r}: expected the value of "
            f"max_position_embeddings, {context}"
        )
    own = {name: given[name] for name in _FIELDS[kind] if name in given}
    if _ORIGINAL in _FIELDS[kind]:
        own[_ORIGINAL] = _first(original, inside, context)
        _check_field(_ORIGINAL, own[_ORIGINAL])
    factor = given.get("factor")
    if factor is None and kind == "yarn" and _first(original, inside) is not None:
        factor = context / own[_ORIGINAL]
    if factor is None:
        raise ConfigError(f"{kind!r} needs the field factor, which is missing")
    scaling = RopeScaling(kind, factor, **own)
    return None if scaling.changes_nothing else scaling


def scaled_context(
    scaling: RopeScaling | None, context: int, original: object = None, given: object = None
) -> int:
    """The number of positions that a checkpoint can use.

    - No scaling, dynamic, llama3: `context`. Dynamic scaling starts from `context`; llama3
      checkpoints include the factor in it.
    - linear, yarn: `given`, or else factor times `original`, but at least `context`. If `original`
      is None, it is `context` when `context` is at most LLaMA-2's; otherwise `context` already
      includes the factor.

    Args:
        context: max_position_embeddings.
        original: original_max_position_embeddings, outside or inside the object.
        given: max_sequence_length, a field of Vicuna's long-context checkpoints.

    Raises:
        ConfigError: a field is not a valid number of positions.

    >>> scaled_context(RopeScaling("linear", 4.0), 4096)
    16384
    >>> scaled_context(RopeScaling("linear", 8.0), 32768)
    32768
    >>> scaled_context(RopeScaling("yarn", 8.0, 4096), 8192, 4096)
    32768
    """
    if scaling is None or scaling.kind in ("dynamic", "llama3"):
        return context
    if given is not None:
        _check_positions("max_sequence_length", given)
        return max(context, given)
    if original is None:
        original = context if context <= _TRAINED else 1
    _check_positions(_ORIGINAL, original)
    return max(context, int(original * scaling.factor))


def parse_rope_scaling(text: str) -> tuple[str, float]:
    """Parse "TYPE:FACTOR", the form that the command line takes.

    Raises:
        InputError: `text` does not have this form.
    >>> parse_rope_scaling("linear:4")
    ('linear', 4.0)
    """
    kind, _colon, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if kind not in KINDS or kind == "llama3" or not 1 <= factor <= MAX_FACTOR:
        more = "; llama3 has more parameters, so set it in config.json" if kind == "llama3" else ""
        raise InputError(
            f"rope_scaling is {text!r}: expected TYPE:FACTOR with type linear, dynamic or yarn and "
            f"a factor from 1 to {MAX_FACTOR}, such as linear:4{more}"
        )
    return kind, factor


def with_rope_scaling(hf: Mapping[str, Any], kind: str, factor: float) -> dict[str, Any]:
    """The fields of a config.json with its scaling replaced by this one. rope_theta stays."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {}  # some files hold "rope_scaling": "dynamic"
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    original = _first(hf.get(_ORIGINAL), rope.get(_ORIGINAL), hf.get("max_position_embeddings"))
    if kind != "dynamic":
        kept[_ORIGINAL] = original
    replaced = ("rope_parameters", "max_sequence_length", _ORIGINAL)
    fields = {name: value for name, value in hf.items() if name not in replaced}
    return fields | {"rope_scaling": {"rope_type": kind, "factor": factor} | kept}


def _unknown(kind: object) -> str:
    return f"{kind!r} is not implemented: expected 'default', {', '.join(map(repr, KINDS))}"


def _first(*values: object) -> Any:
    return next((value for value in values if value is not None), None)


def _check_field(name: str, value: object) -> None:
    if name == _ORIGINAL:
        _check_positions(name, value)
    elif name == "truncate":
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}: expected true or false")
    elif name in ("mscale", "mscale_all_dim"):
        _check_number(name, 0 if value is None else value, least=0)
    elif not (value is None and name == "attention_factor"):
        _check_number(name, value, least=1e-6)


def _check_number(name: str, value: object, least: float, most: float = 1e6) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}: expected a number from {least:g} to {most:g}")


def _check_positions(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{name} is {value!r}: expected a whole number from 1, below 2**31")
