r"""Escapes in a command line's texts: what a shell makes hard to type, written with a backslash."""

import re

from npllama.errors import InputError

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.?)", re.DOTALL)
_CHARACTERS = {"n": "\n", "t": "\t", "\\": "\\"}


def unescape(text: str, name: str) -> str:
    r"""The text with the characters that \n, \t, \\ and \uXXXX stand for.

    Two \uXXXX may stand for one character beyond U+FFFF, as in JSON.

    Args:
        name: what the text was given with, for the message.

    Raises:
        InputError: a backslash before anything else, or half of such a pair.

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
            rf"{name} holds {shown} at character {match.start() + 1}: expected \n, \t, \\ or "
            r"\uXXXX (four hexadecimal digits) with -e, \\ for a backslash"
        )

    units = _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass")
    try:
        return units.decode("utf-16")
    except UnicodeDecodeError:
        raise InputError(
            rf"{name} holds one \uXXXX from D800 to DFFF: expected two, a high and a low one"
        ) from None
