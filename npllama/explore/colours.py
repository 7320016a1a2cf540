"""Colours that colour-blind readers can distinguish on light and dark paper; colour maps; PNG."""

import base64
import struct
import zlib

import numpy as np

# The categories are the hues of Okabe and Ito 2008 (Color Universal Design), darkened for light
# paper and lightened for dark paper until the contrast of each with its paper is at least 3.
LIGHT = {
    "ink": "#1c1f24",
    "soft": "#59616b",
    "line": "#8a929c",
    "paper": "#ffffff",
    "fill": "#e9ecf0",
    "1": "#0072b2",
    "2": "#c85200",
    "3": "#008563",
    "4": "#ad5286",
    "5": "#8a6a00",
}
DARK = {
    "ink": "#e8eaed",
    "soft": "#a9b1bb",
    "line": "#79818b",
    "paper": "#16181c",
    "fill": "#2c3138",
    "1": "#56b4e9",
    "2": "#f08030",
    "3": "#2cc49b",
    "4": "#dc94bd",
    "5": "#e6c229",
}

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
"""For magnitudes, from 0 to the largest (Smith and van der Walt 2015)."""
DIVERGING = ("053a75", "2f79b5", "8dbfdd", "f1f1ef", "f5b877", "d96f16", "7d2f00")
"""For signed values: blue below 0, orange above, pale at 0."""


def ramp(anchors: tuple[str, ...], n: int) -> np.ndarray:
    """(n, 3) uint8: n colours of a map, linear between its anchors."""
    rgb = np.array([[int(a[i : i + 2], 16) for i in (0, 2, 4)] for a in anchors], dtype=float)
    at = np.linspace(0, len(anchors) - 1, n)
    channels = [np.interp(at, np.arange(len(anchors)), rgb[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)  # 3 x (n,) -> (n, 3)


def hex_colour(anchors: tuple[str, ...], share: float) -> str:
    """`#rrggbb` at a share, 0 to 1, of a colour map."""
    rgb = ramp(anchors, 256)[round(255 * min(max(share, 0.0), 1.0))]
    return "#" + bytes(rgb).hex()


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 to 1.

    Source: WCAG 2.2, definition of relative luminance.
    """
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def ink_on(background: str) -> str:
    """Black or white, whichever is easier to read on a background."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, background))


def png(levels: np.ndarray, anchors: tuple[str, ...]) -> bytes:
    """A PNG of levels: (rows, columns) integers, 0 transparent, 1 to 255 along the colour map.

    Its palette contains only the levels that occur.

    Source: PNG specification, third edition, sections 5 and 11.
    """
    used, indices = np.unique(levels, return_inverse=True)
    indices = indices.reshape(levels.shape).astype(np.uint8)
    colours = np.concatenate([np.zeros((1, 3), np.uint8), ramp(anchors, 255)])[used]
    rows = np.concatenate([np.zeros((len(indices), 1), np.uint8), indices], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", indices.shape[1], len(indices), 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", colours.tobytes())]
    if used[0] == 0:
        chunks.append((b"tRNS", b"\0"))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def data_uri(image: bytes) -> str:
    """A PNG as the address of an <image>."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
