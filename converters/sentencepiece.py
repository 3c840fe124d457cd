"""Reads SentencePiece's tokenizer.model.

The file is one protobuf message. Its few fields that matter here are read straight from the wire, so that
neither protobuf nor sentencepiece is needed.
Sources: sentencepiece/src/sentencepiece_model.proto; the protocol buffers encoding guide.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import TokenizerError
from llmcompress.small_file import read_bytes

UNIGRAM, BPE = 1, 2

# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in the order of their ids; the types are numbered as GGUF numbers its token types."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: int = UNIGRAM
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parses a tokenizer.model. Raises TokenizerError where it is not a SentencePiece model."""
    try:
        return _model(read_bytes(path))
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a SentencePiece model ({error}); is the download complete?"
        ) from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    settings: dict[str, int | bytes] = {}
    for number, wire, value in _fields(data, 0, len(data)):
        if wire != _BYTES:
            continue
        if number == 1:
            piece, score, kind = _piece(data, *value)
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
        elif number in _SETTINGS:
            settings.update(_settings(data, *value, _SETTINGS[number]))
    if not pieces:
        raise ValueError("no pieces in it")
    return SentencePieceModel(pieces, scores, types, **settings)


# Message field (trainer_spec, normalizer_spec) -> its fields that matter: number -> (name, Python type).
_SETTINGS = {
    2: {
        3: ("model_type", int),
        24: ("treat_whitespace_as_suffix", bool),
        40: ("unk_id", int),
        41: ("bos_id", int),
        42: ("eos_id", int),
        43: ("pad_id", int),
    },
    3: {2: ("charsmap", bytes), 3: ("add_dummy_prefix", bool), 4: ("remove_extra_whitespaces", bool)},
}


def _settings(data: bytes, start: int, stop: int, wanted: dict[int, tuple[str, type]]) -> dict:
    found = {}
    for number, wire, value in _fields(data, start, stop):
        if number not in wanted:
            continue
        name, kind = wanted[number]
        if (wire == _BYTES) != (kind is bytes):
            raise ValueError(f"{name} has wire type {wire}")
        found[name] = data[slice(*value)] if kind is bytes else kind(_int32(value) if kind is int else value)
    return found


def _int32(value: int) -> int:
    """Negative int32 values are written as 64-bit varints."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _piece(data: bytes, start: int, stop: int) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, wire, value in _fields(data, start, stop):
        if number == 1 and wire == _BYTES:
            text = data[value[0] : value[1]].decode("utf-8")
        elif number == 2 and wire == _FIXED32:
            score = struct.unpack_from("<f", data, value[0])[0]
        elif number == 3 and wire == _VARINT:
            kind = value
    if not 1 <= kind <= 6:
        raise ValueError(f"piece {text!r} has type {kind}")
    return text, score, kind


def _fields(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int | tuple[int, int]]]:
    """(field number, wire type, value) of one message; the value is an integer, or where its bytes lie."""
    while at < stop:
        tag, at = _varint(data, at, stop)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at, stop)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at, stop)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > stop - at:
            raise ValueError(f"a field of {length} bytes at byte {at} with {stop - at} left")
        yield number, wire, (at, at + length)
        at += length


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a number without an end at byte {at}")
