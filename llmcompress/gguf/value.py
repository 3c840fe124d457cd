"""Typed GGUF metadata values.

Source: the GGUF specification (ggml/docs/gguf.md), section "File Structure".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ValueType(IntEnum):
    """The type ids of GGUF version 3."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


STRUCT_CODES: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Value:
    """One metadata value. `item` is the element type of an array, None otherwise.

    Strings are `str`, or `bytes` where the text is not valid UTF-8.
    """

    type: ValueType
    value: Any
    item: ValueType | None = None


Metadata = dict[str, Value]


def u16(value: int) -> Value:
    return Value(ValueType.UINT16, int(value))


def u32(value: int) -> Value:
    return Value(ValueType.UINT32, int(value))


def i32(value: int) -> Value:
    return Value(ValueType.INT32, int(value))


def u64(value: int) -> Value:
    return Value(ValueType.UINT64, int(value))


def f32(value: float) -> Value:
    return Value(ValueType.FLOAT32, float(value))


def boolean(value: bool) -> Value:
    return Value(ValueType.BOOL, bool(value))


def string(value: str | bytes) -> Value:
    return Value(ValueType.STRING, value)


def array(item: ValueType, values: Sequence) -> Value:
    """An array of `item`; nested arrays are not written by llmcompress."""
    return Value(ValueType.ARRAY, values, item)
