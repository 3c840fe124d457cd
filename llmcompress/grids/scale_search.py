"""The search for scales: which grid, of those a block can have, leaves the least weighted squared error.

Both searches try a few grids laid over the range of the values, round the values to each, and take the
grid that least squares would draw through these codes; the best is refined by rounding to it anew.
`x` and `w` are arrays of lanes, `(n, 16)`, of which `size` rows from `start` on are fitted; each lane on
its own.
"""

from __future__ import annotations

from numba.extending import register_jitable

from llmcompress.grids.block_loop import clamped_rint, divide
from llmcompress.grids.lanes import absolute, fma, load, maximum, minimum, select, splat


@register_jitable
def scale_sums(x, w, start, size, inverse, low, high):
    """With codes l = round(x * inverse): the sums of w x l and of w l^2."""
    sum_xl, sum_ll = splat(0.0), splat(0.0)
    for j in range(start, start + size):
        value = load(x, j)
        code = clamped_rint(value * inverse, low, high)
        weighted = load(w, j) * code
        sum_xl = fma(weighted, value, sum_xl)
        sum_ll = fma(weighted, code, sum_ll)
    return sum_xl, sum_ll


@register_jitable
def fit_scale(x, w, start, size, low, high, tops, rounds):
    """The scale d for x = d l with codes l in low..high. Returns d and the sum of w l^2.

    `tops`, float32 `(k,)`: the codes, not whole, that the largest value is first laid upon; negative
    ones try grids of the other sign.
    """
    least, most = load(x, start), load(x, start)
    for j in range(start + 1, start + size):
        least, most = minimum(load(x, j), least), maximum(load(x, j), most)
    extreme = select(most > -least, most, least)
    unit = select(absolute(extreme) > 1e-30, 1.0 / extreme, 0.0)
    best_gain, scale, curvature = splat(0.0), splat(0.0), splat(0.0)
    for k in range(len(tops) + rounds):
        if k < len(tops):
            inverse = unit * tops[k]
        else:
            inverse = select(absolute(scale) > 0.0, 1.0 / scale, 0.0)
        sum_xl, sum_ll = scale_sums(x, w, start, size, inverse, low, high)
        fitted = divide(sum_xl, sum_ll)
        gain = fitted * sum_xl
        better = gain > best_gain
        best_gain = select(better, gain, best_gain)
        scale = select(better, fitted, scale)
        curvature = select(better, sum_ll, curvature)
    return scale, curvature


@register_jitable
def affine_sums(x, w, start, size, inverse, offset, high):
    """With codes l = round(x * inverse + offset): the sums of w l, w l^2 and w x l."""
    sum_l, sum_ll, sum_xl = splat(0.0), splat(0.0), splat(0.0)
    for j in range(start, start + size):
        value = load(x, j)
        code = clamped_rint(fma(value, inverse, offset), 0.0, high)
        weighted = load(w, j) * code
        sum_l = sum_l + weighted
        sum_ll = fma(weighted, code, sum_ll)
        sum_xl = fma(weighted, value, sum_xl)
    return sum_l, sum_ll, sum_xl


@register_jitable
def weight_sums(x, w, start, size):
    """The sums of w and of w x."""
    sum_w, sum_x = splat(0.0), splat(0.0)
    for j in range(start, start + size):
        sum_w = sum_w + load(w, j)
        sum_x = fma(load(w, j), load(x, j), sum_x)
    return sum_w, sum_x


@register_jitable
def solve_affine(sum_w, sum_x, sum_l, sum_ll, sum_xl, highest):
    """Least squares for x = scale l + value, with value <= highest. Returns both and the error gained."""
    determinant = sum_w * sum_ll - sum_l * sum_l
    regular = determinant > 1e-6 * sum_w * sum_ll
    value = select(regular, (sum_ll * sum_x - sum_l * sum_xl) / determinant, 0.0)
    value = select(sum_ll > 0.0, value, divide(sum_x, sum_w))
    value = minimum(value, highest)
    scale = maximum(divide(sum_xl - value * sum_l, sum_ll), 0.0)
    gain = 2.0 * (scale * sum_xl + value * sum_x) - (
        scale * (scale * sum_ll + 2.0 * value * sum_l) + value * value * sum_w
    )
    return scale, value, gain


@register_jitable
def fit_affine(x, w, start, size, high, highest, ends, rounds):
    """The grid x = scale l + value with codes l in 0..high, scale >= 0 and value <= highest.

    Returns scale, value, and the sum of w l^2. `ends`, float32 `(k, 2)`: the codes,
    not whole, that the least and the largest value are first laid upon.
    """
    least, most = load(x, start), load(x, start)
    for j in range(start + 1, start + size):
        least, most = minimum(load(x, j), least), maximum(load(x, j), most)
    least = minimum(least, highest)
    span = most - least
    unit = select(span > 1e-30, 1.0 / span, 0.0)
    sum_w, sum_x = weight_sums(x, w, start, size)
    scale, value, best_gain, curvature = splat(0.0), splat(0.0), splat(-1e38), splat(0.0)
    for k in range(len(ends) + rounds):
        if k < len(ends):
            inverse = unit * (ends[k, 1] - ends[k, 0])
            offset = ends[k, 0] - least * inverse
        else:
            inverse = divide(splat(1.0), scale)
            offset = -value * inverse
        sum_l, sum_ll, sum_xl = affine_sums(x, w, start, size, inverse, offset, high)
        fitted, at_zero, gain = solve_affine(sum_w, sum_x, sum_l, sum_ll, sum_xl, highest)
        better = gain > best_gain
        best_gain = select(better, gain, best_gain)
        scale, value = select(better, fitted, scale), select(better, at_zero, value)
        curvature = select(better, sum_ll, curvature)
    return scale, value, curvature
