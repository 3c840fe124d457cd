"""K-quants' second level: the scales of sub-blocks are themselves whole numbers times a float16.

Sub-blocks are fitted one by one, their scales rounded to a common step, and then refined on the grid as it
will be stored: each sub-block tries the neighbours of its scale, and least squares over the whole block
renews the steps.
`scales` and `minima` are arrays of lanes, a row for each sub-block; they end as whole numbers. Steps
are returned as float16 values in the units of the source; inside a block, a value is a value over `unit`.
"""

from __future__ import annotations

from numba.extending import register_jitable

from llmcompress.grids.lanes import fma, load, maximum, minimum, select, splat, store
from llmcompress.grids.rounding import divide, inverse_of, nearest_code, round_to_half
from llmcompress.grids.scale_search import (
    affine_error,
    affine_sums,
    fit_affine,
    fit_scaled,
    scaled_sums,
    solve_affine,
    weight_sums,
)


@register_jitable
def round_scales(scales, count, step, low, high):
    inverse = inverse_of(step)
    for b in range(count):
        store(scales, b, nearest_code(load(scales, b) * inverse, low, high))


@register_jitable
def fit_affine_parts(x, w, unit, parts, size, high, most, search):
    """x = d scale l - dmin minimum, codes l in 0..high, scales and minima in 0..most. Returns d and dmin."""
    ends, tops, rounds = search
    scales, minima, weights = parts[0], parts[1], parts[2]
    count = len(x) // size
    for b in range(count):
        step, base, curvature = fit_affine(x, w, b * size, size, high, 0.0, ends, rounds)
        store(scales, b, step)
        store(minima, b, -base)
        store(weights, b, curvature)
    d, _ = fit_scaled(scales, weights, 0, count, 0.0, most, tops, 1)
    for b in range(count):
        store(weights, b, weight_sums(x, w, b * size, size)[0])
    dmin, _ = fit_scaled(minima, weights, 0, count, 0.0, most, tops, 1)
    d, dmin = round_to_half(d * unit), round_to_half(dmin * unit)
    round_scales(scales, count, d / unit, 0.0, most)
    round_scales(minima, count, dmin / unit, 0.0, most)
    for _ in range(rounds):
        d, dmin = refine_affine_parts(x, w, scales, minima, size, high, most, d / unit, dmin / unit)
        d, dmin = round_to_half(d * unit), round_to_half(dmin * unit)
    return d, dmin


@register_jitable
def refine_affine_parts(x, w, scales, minima, size, high, most, d, dmin):
    """One round: every scale against its neighbours, each with its best minimum; then d and dmin anew."""
    # Sums of least squares for x = d a - dmin b, where a = scale l and b = minimum.
    sum_aa, sum_ab, sum_bb, sum_xa, sum_xb = splat(0.0), splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    inverse_dmin = inverse_of(dmin)
    for b in range(len(x) // size):
        sum_w, sum_x = weight_sums(x, w, b * size, size)
        best_error, scale, least = splat(1e38), load(scales, b), load(minima, b)
        best_l, best_ll, best_xl = splat(0.0), splat(0.0), splat(0.0)
        for change in (0.0, -1.0, 1.0):
            tried = minimum(maximum(load(scales, b) + change, 0.0), most)
            step = d * tried
            sum_l, sum_ll, sum_xl = affine_sums(x, w, b * size, size, step, -dmin * load(minima, b), high)
            lowered = nearest_code(divide(step * sum_l - sum_x, sum_w) * inverse_dmin, 0.0, most)
            error = affine_error(step, -dmin * lowered, sum_w, sum_x, sum_l, sum_ll, sum_xl)
            better = error < best_error
            best_error = select(better, error, best_error)
            scale, least = select(better, tried, scale), select(better, lowered, least)
            best_l, best_ll = select(better, sum_l, best_l), select(better, sum_ll, best_ll)
            best_xl = select(better, sum_xl, best_xl)
        store(scales, b, scale)
        store(minima, b, least)
        sum_aa = fma(scale * scale, best_ll, sum_aa)
        sum_ab = fma(scale * least, best_l, sum_ab)
        sum_bb = fma(least * least, sum_w, sum_bb)
        sum_xa, sum_xb = fma(scale, best_xl, sum_xa), fma(least, sum_x, sum_xb)
    step, base = solve_affine(-dmin, 0.0, sum_bb, sum_xb, sum_ab, sum_aa, sum_xa)
    return step, -base


@register_jitable
def encode_affine_parts(x, scales, minima, size, d, dmin, high):
    """Turn x into its codes, in place."""
    for b in range(len(x) // size):
        inverse = divide(splat(1.0), d * load(scales, b))
        base = dmin * load(minima, b)
        for j in range(b * size, (b + 1) * size):
            store(x, j, nearest_code((load(x, j) + base) * inverse, 0.0, high))


@register_jitable
def fit_scaled_parts(x, w, unit, parts, size, low, high, least, most, search):
    """x = d scale l, codes l in low..high, scales in least..most. Returns d."""
    tops, scale_tops, rounds = search
    scales, weights = parts[0], parts[1]
    count, first_rounds = len(x) // size, max(rounds - 1, 0)  # refining makes up for one
    for b in range(count):
        step, curvature = fit_scaled(x, w, b * size, size, low, high, tops, first_rounds)
        store(scales, b, step)
        store(weights, b, curvature)
    d, _ = fit_scaled(scales, weights, 0, count, least, most, scale_tops, 1)
    d = round_to_half(d * unit)
    round_scales(scales, count, d / unit, least, most)
    for _ in range(max(rounds, 1)):
        d = refine_scaled_parts(x, w, scales, size, low, high, least, most, d / unit)
        d = round_to_half(d * unit)
    return d


@register_jitable
def refine_scaled_parts(x, w, scales, size, low, high, least, most, d):
    """One round: every scale against its neighbours, then d anew."""
    sum_aa, sum_xa = splat(0.0), splat(0.0)
    for b in range(len(x) // size):
        best_gain, scale, best_ll, best_xl = splat(-1e38), load(scales, b), splat(0.0), splat(0.0)
        for change in (0.0, -1.0, 1.0):
            tried = minimum(maximum(load(scales, b) + change, least), most)
            step = d * tried
            sum_xl, sum_ll = scaled_sums(x, w, b * size, size, step, low, high)
            gain = step * (2.0 * sum_xl - step * sum_ll)
            better = gain > best_gain
            best_gain, scale = select(better, gain, best_gain), select(better, tried, scale)
            best_ll, best_xl = select(better, sum_ll, best_ll), select(better, sum_xl, best_xl)
        store(scales, b, scale)
        sum_aa, sum_xa = fma(scale * scale, best_ll, sum_aa), fma(scale, best_xl, sum_xa)
    return select(sum_aa > 0.0, sum_xa / sum_aa, d)


@register_jitable
def encode_scaled_parts(x, scales, size, d, low, high):
    """Turn x into its codes less `low`, in place."""
    for b in range(len(x) // size):
        inverse = inverse_of(d * load(scales, b))
        for j in range(b * size, (b + 1) * size):
            store(x, j, nearest_code(load(x, j) * inverse, low, high) - low)
