"""Rounding of lanes: to codes, and to float16."""

from __future__ import annotations

from numba.extending import register_jitable

from llmcompress.grids.lanes import (
    absolute,
    fma,
    half_bits,
    maximum,
    minimum,
    power_of_two,
    rint,
    select,
    store_bytes,
)

HALF_MAX = 65504.0


@register_jitable
def nearest_code(value, low, high):
    """The nearest whole number, ties to even, in low..high; low for NaN."""
    return minimum(maximum(rint(value), low), high)


@register_jitable
def inverse_of(scale):
    """1 / scale, or 0 for 0: every weight gets the code of zero there."""
    return select(absolute(scale) > 0.0, 1.0 / scale, 0.0)


@register_jitable
def divide(a, b):
    """a / b, or 0 where b is not positive."""
    return select(b > 0.0, a / b, 0.0)


@register_jitable
def split_code(code, step):
    """Cut codes 0..255 into `code // step`, `code % step`; `step` a power of two."""
    high = rint(fma(code, 1.0 / step, 0.5 / step - 0.5))
    return high, fma(high, -step, code)


@register_jitable
def round_to_half(value):
    """The nearest float16, ties to even; the largest finite one where that would be infinite."""
    value = minimum(maximum(value, -HALF_MAX), HALF_MAX)
    # Adding 1.5 * 2^13 times the leading bit, for either sign, leaves the 11 bits of a float16, or steps of
    # 2^-24 if subnormal.
    shift = power_of_two(maximum(absolute(value), 2.0**-14)) * 12288.0
    return (value + shift) - shift


@register_jitable
def store_half(packed, i, half):
    """Write float16 values as bytes i and i + 1, low byte first."""
    high, low = split_code(half_bits(half), 256.0)
    store_bytes(packed, i, low)
    store_bytes(packed, i + 1, high)
