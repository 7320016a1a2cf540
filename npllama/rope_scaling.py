"""Which scalings of the rotary embeddings change nothing, of those that a config.json may name.

Only plain rotary embeddings are implemented. Many files name a scaling with factor 1.0, which
leaves every angle as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, int], bool]


def _is_one(value: Any, context: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value == 1


def _is_context(value: Any, context: int) -> bool:
    return value == context  # else transformers takes the quotient as the factor


def _anything(value: Any, context: int) -> bool:
    return True


_ALWAYS: dict[str, Check] = {
    "rope_type": _anything,
    "type": _anything,
    "rope_theta": _anything,
    "partial_rotary_factor": _anything,  # config.py reads it
    "factor": _is_one,
}
# kind of scaling -> its fields, each with a check that it changes no angle where factor is 1
_FIELDS: dict[str, dict[str, Check]] = {
    "default": {},
    "linear": {},
    "dynamic": {"original_max_position_embeddings": _is_context},
    "llama3": {  # both ends of its interpolation are the plain frequency
        "low_freq_factor": _anything,
        "high_freq_factor": _anything,
        "original_max_position_embeddings": _anything,
    },
    "yarn": {  # the same, and its temperature is 1 where factor is
        "beta_fast": _anything,
        "beta_slow": _anything,
        "mscale": _anything,
        "mscale_all_dim": _anything,
        "truncate": _anything,
        "attention_factor": _is_one,
        "original_max_position_embeddings": _is_context,
    },
}
_REQUIRED = {kind: ("factor",) for kind in _FIELDS if kind != "default"}


def scaled_by(rope: Mapping[str, Any], context: int) -> str | None:
    """What of a `rope_scaling` or `rope_parameters` object changes an angle; None where nothing.

    Args:
        rope: the object; a field that is null counts as absent.
        context: max_position_embeddings.

    Returns:
        None, or the name of the kind or of the field, for a message.

    >>> scaled_by({"type": "linear", "factor": 1.0}, 4096)
    >>> scaled_by({"type": "linear", "factor": 2.0}, 4096)
    "'linear'"
    >>> scaled_by({"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2}, 4096)
    "'yarn' with attention_factor 1.2"
    """
    given = {name: value for name, value in rope.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _FIELDS:
        return repr(kind)
    for name in _REQUIRED.get(kind, ()):
        if name not in given:
            return f"{kind!r} without {name}"
    checks = _ALWAYS | _FIELDS[kind]
    for name in sorted(given, key=lambda name: name != "factor"):  # the factor first
        if name not in checks or not checks[name](given[name], context):
            is_kind = kind != "default" and name == "factor"
            return repr(kind) if is_kind else f"{kind!r} with {name} {given[name]!r}"
    return None
