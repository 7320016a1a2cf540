"""The settings of /set: the options of the next answers."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from npllama.errors import InputError
from npllama.options import flag
from npllama.sampling_options import Sampling

_SWITCH = {"on": True, "off": False}
_OTHERS = ("seed", "max_new_tokens", "stop", "ignore_eos")


def setting_names() -> list[str]:
    """The names of all settings, which are those of the options without the dashes."""
    names = [field.name for field in fields(Sampling)]
    return [flag(name).removeprefix("--") for name in (*names, *_OTHERS)]


def setting_name(name: str) -> str:
    """The name in `setting_names` for another spelling, such as "top_k" or "--top-k".

    Raises:
        InputError: there is no such setting.
    """
    known = setting_names()
    plain = name.lower().removeprefix("--").replace("_", "-")
    if plain not in known:
        raise InputError(f"there is no setting {name!r:.60}: expected one of {', '.join(known)}")
    return plain


def shown(options: Mapping[str, Any], name: str) -> str:
    """The value of a setting as a text that `changed` accepts.

    Args:
        options: keywords of Llama.new_generation, with a Sampling as `sampling`.
    """
    key = _key(name)
    value = options[key] if key in _OTHERS else getattr(options["sampling"], key)
    if key == "seed":
        return "random" if value is None else str(value)
    if key == "stop":
        return " ".join(json.dumps(text, ensure_ascii=False) for text in value) or '""'
    if key == "ignore_eos":
        return "on" if value else "off"
    return str(value)


def changed(options: Mapping[str, Any], name: str, value: str) -> dict[str, Any]:
    """The options with another value of a setting.

    Args:
        value: a number; for the seed also "random"; for ignore-eos "on" or "off"; for `stop` one
            text, or any number of JSON strings ("" for none).

    Raises:
        InputError: there is no such setting, or the value is wrong.
    """
    key = _key(name)
    field = {field.name: field for field in fields(Sampling)}.get(key)
    if field is not None:
        number = _number(key, value, field.type, field.metadata["option"].expected)
        return {**options, "sampling": replace(options["sampling"], **{key: number})}
    if key == "ignore_eos":
        if value not in _SWITCH:
            raise InputError(f"ignore-eos is {value!r}: expected on or off")
        return {**options, key: _SWITCH[value]}
    if key == "stop":
        return {**options, key: _texts(value)}
    if key == "seed" and value == "random":
        return {**options, key: None}
    expected = "a whole number from 0" + (", or random" if key == "seed" else "")
    return {**options, key: _number(key, value, int, expected)}


def quoted(text: str) -> str:
    """The value of a JSON string, or the text itself if it is not one.

    Raises:
        InputError: the value is not valid Unicode (a lone surrogate).
    """
    try:
        value = json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text
    return _whole(value) if isinstance(value, str) else text


def _whole(text: str) -> str:
    """The text; InputError if it is not valid Unicode (a lone surrogate)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            r"the text has a single \uXXXX from D800 to DFFF: expected a pair, high and low"
        ) from None
    return text


def _key(name: str) -> str:
    """The keyword or the field of Sampling that a name stands for."""
    return setting_name(name).replace("-", "_")


def _number(key: str, value: str, kind: type, expected: str) -> float:
    try:
        return kind(value)
    except ValueError:
        raise InputError(f"{key} is {value!r:.60}: expected {expected}") from None


def _texts(value: str) -> list[str]:
    """The texts of JSON strings without empty ones, or the value itself as the only text."""
    texts, rest = [], value
    decode = json.JSONDecoder().raw_decode
    while rest.startswith('"'):
        try:
            text, end = decode(rest)
        except ValueError:
            return [value]
        texts.append(_whole(text))
        rest = rest[end:].lstrip()
    return [text for text in texts if text] if texts and not rest else [value]
