"""The search for scales: which of the grids open to a block leaves the least weighted squared error?

A few grids are laid over the range of the values; the values are rounded to each, least squares
draws the best grid through the codes found, and the best of all is kept and refined by rounding to it anew.
`x` and `w` are arrays of lanes of which rows `start` to `start + size` are fitted, every lane on its own.

Candidates and weighted least squares: I. Kawrakow's k-quants, llama.cpp PR 1684. Laying both ends of
the range on fractional codes is ours.
"""

from __future__ import annotations

from numba.extending import register_jitable

from llmcompress.grids.lanes import fma, load, maximum, minimum, select, splat
from llmcompress.grids.rounding import divide, inverse_of, nearest_code


@register_jitable
def extent(x, start, size):
    """The least and the largest value."""
    least, most = load(x, start), load(x, start)
    for j in range(start + 1, start + size):
        least, most = minimum(load(x, j), least), maximum(load(x, j), most)
    return least, most


@register_jitable
def scaled_sums(x, w, start, size, step, low, high):
    """With codes l of x = step l: the sums of w x l and of w l^2."""
    inverse = inverse_of(step)
    sum_xl, sum_ll = splat(0.0), splat(0.0)
    for j in range(start, start + size):
        value = load(x, j)
        code = nearest_code(value * inverse, low, high)
        weighted = load(w, j) * code
        sum_xl = fma(weighted, value, sum_xl)
        sum_ll = fma(weighted, code, sum_ll)
    return sum_xl, sum_ll


@register_jitable
def fit_scaled(x, w, start, size, low, high, tops, rounds):
    """The step of x = step l with codes l in low..high. Returns it and the sum of w l^2.

    `tops`, float32 `(k,)`: the codes, not whole, that the value largest in size is laid upon.
    """
    least, most = extent(x, start, size)
    extreme = select(most > -least, most, least)
    best_gain, best, curvature = splat(0.0), splat(0.0), splat(0.0)
    for k in range(len(tops) + rounds):
        step = extreme / tops[k] if k < len(tops) else best
        sum_xl, sum_ll = scaled_sums(x, w, start, size, step, low, high)
        fitted = divide(sum_xl, sum_ll)
        gain = fitted * sum_xl
        better = gain > best_gain
        best_gain, best = select(better, gain, best_gain), select(better, fitted, best)
        curvature = select(better, sum_ll, curvature)
    return best, curvature


@register_jitable
def weight_sums(x, w, start, size):
    """The sums of w and of w x."""
    sum_w, sum_x = splat(0.0), splat(0.0)
    for j in range(start, start + size):
        sum_w = sum_w + load(w, j)
        sum_x = fma(load(w, j), load(x, j), sum_x)
    return sum_w, sum_x


@register_jitable
def affine_sums(x, w, start, size, step, base, high):
    """With codes l of x = step l + base: the sums of w l, w l^2 and w x l."""
    inverse = divide(splat(1.0), step)
    offset = -base * inverse
    sum_l, sum_ll, sum_xl = splat(0.0), splat(0.0), splat(0.0)
    for j in range(start, start + size):
        value = load(x, j)
        code = nearest_code(fma(value, inverse, offset), 0.0, high)
        weighted = load(w, j) * code
        sum_l = sum_l + weighted
        sum_ll = fma(weighted, code, sum_ll)
        sum_xl = fma(weighted, value, sum_xl)
    return sum_l, sum_ll, sum_xl


@register_jitable
def affine_error(step, base, sum_w, sum_x, sum_l, sum_ll, sum_xl):
    """The weighted squared error of x = step l + base, less the sum of w x^2."""
    return step * (step * sum_ll + 2.0 * (base * sum_l - sum_xl)) + base * (base * sum_w - 2.0 * sum_x)


@register_jitable
def solve_affine(base, highest, sum_w, sum_x, sum_l, sum_ll, sum_xl):
    """Least squares for step >= 0 and base <= highest; keeps `base` where the codes do not tell."""
    determinant = sum_w * sum_ll - sum_l * sum_l
    free = (sum_ll * sum_x - sum_l * sum_xl) / determinant
    base = select(determinant > 1e-6 * sum_w * sum_ll, free, base)
    base = minimum(select(sum_ll > 0.0, base, divide(sum_x, sum_w)), highest)
    return maximum(divide(sum_xl - base * sum_l, sum_ll), 0.0), base


@register_jitable
def fit_affine(x, w, start, size, high, highest, ends, rounds):
    """The grid x = step l + base with codes l in 0..high, step >= 0 and base <= highest.

    Returns step, base and the sum of w l^2. `ends`, float32 `(k, 2)`: the codes, not whole, that the least
    and the largest value are laid upon.
    """
    least, most = extent(x, start, size)
    least = minimum(least, highest)
    sum_w, sum_x = weight_sums(x, w, start, size)
    best_error, best_step, best_base, curvature = splat(1e38), splat(0.0), splat(0.0), splat(0.0)
    for k in range(len(ends) + rounds):
        step, base = best_step, best_base
        if k < len(ends):
            step = (most - least) / (ends[k, 1] - ends[k, 0])
            base = least - ends[k, 0] * step
        sum_l, sum_ll, sum_xl = affine_sums(x, w, start, size, step, base, high)
        step, base = solve_affine(base, highest, sum_w, sum_x, sum_l, sum_ll, sum_xl)
        error = affine_error(step, base, sum_w, sum_x, sum_l, sum_ll, sum_xl)
        better = error < best_error
        best_error, curvature = select(better, error, best_error), select(better, sum_ll, curvature)
        best_step, best_base = select(better, step, best_step), select(better, base, best_base)
    return best_step, best_base, curvature
