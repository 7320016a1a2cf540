r"""Backslash escapes in command-line texts, for characters that are hard to type in a shell."""

import re

from npllama.errors import InputError

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.?)", re.DOTALL)
_CHARACTERS = {"n": "\n", "t": "\t", "\\": "\\"}


def unescape(text: str, name: str) -> str:
    r"""Replace the escapes \n, \t, \\ and \uXXXX by the characters they stand for.

    Two \uXXXX in a row may encode one character above U+FFFF, as in JSON.

    Args:
        name: the option that `text` was given with, for the message.

    Raises:
        InputError: a backslash precedes anything else, or one of two such \uXXXX is missing.

    >>> unescape(r"two\nlines, a \\, \u00fc", "--prompt")
    'two\nlines, a \\, ü'
    """

    def character(match: re.Match) -> str:
        code = match.group(1)
        if len(code) == 5:
            return chr(int(code[1:], 16))
        if code in _CHARACTERS:
            return _CHARACTERS[code]
        length = 6 if code == "u" else 2
        shown = text[match.start() : match.start() + length]
        raise InputError(
            rf"{name} has {shown} at character {match.start() + 1}: -e expects \n, \t, \\ or "
            r"\uXXXX (four hexadecimal digits); write \\ for a backslash"
        )

    units = _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass")
    try:
        return units.decode("utf-16")
    except UnicodeDecodeError:
        raise InputError(
            rf"{name} has an unpaired \uXXXX from D800 to DFFF: expected a high one, then a low one"
        ) from None
