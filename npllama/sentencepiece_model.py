"""Writing a sentencepiece model: the part of protobuf's wire format that a BPE model needs.

A sentencepiece model is a serialized ModelProto. The sentencepiece package writes one only after
training; any other way needs the protobuf package, which is not a dependency. Field numbers are
those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum

NAMES = ("<unk>", "<s>", "</s>")
"""The default pieces for unknown, BOS and EOS."""

_VARINT, _LENGTH_DELIMITED, _FIXED32 = 0, 2, 5


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    BYTE = 6


def bpe_model(
    pieces: Iterable[tuple[str, float, PieceType]],
    *,
    dummy_prefix: bool = True,
    names: tuple[str, str, str] = NAMES,
) -> bytes:
    """A serialized ModelProto with Llama's settings: BPE, byte fallback, no normalization, and all
    white space kept.

    Args:
        pieces: (text, score, type) in the order of their ids. A space is written U+2581. BPE
            merges the adjacent pieces whose union has the highest score first.
        dummy_prefix: whether encoding inserts a space before every text.
        names: the pieces for unknown, BOS and EOS.
    """
    pieces = list(pieces)
    model = b"".join(
        _bytes(1, _bytes(1, text.encode()) + _float(2, score) + _integer(3, kind))
        for text, score, kind in pieces
    )
    trainer = _integer(3, 2) + _integer(4, len(pieces)) + _integer(35, 1)  # BPE, size, fallback
    if names != NAMES:
        trainer += b"".join(_bytes(45 + i, name.encode()) for i, name in enumerate(names))
    normalizer = _bytes(1, b"identity") + _integer(3, dummy_prefix)
    normalizer += _integer(4, 0) + _integer(5, 1)
    return model + _bytes(2, trainer) + _bytes(3, normalizer)


def special_and_byte_pieces() -> list[tuple[str, float, PieceType]]:
    """Ids 0 to 258 of every Llama vocabulary: unknown, BOS, EOS, then byte b at id b + 3."""
    special = [
        ("<unk>", 0.0, PieceType.UNKNOWN),
        ("<s>", 0.0, PieceType.CONTROL),
        ("</s>", 0.0, PieceType.CONTROL),
    ]
    return special + [(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _tag(field, _FIXED32) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, _LENGTH_DELIMITED) + _varint(len(value)) + value
