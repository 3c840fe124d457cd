"""Q2_K, Q4_K, Q5_K: 256 weights in sub-blocks, each with a small scale and a small minimum.

Weight = d * scale * code - dmin * minimum, d and dmin in float16.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import register_jitable

from llmcompress.grids.block_loop import (
    clamped_rint,
    compile_quantizer,
    divide,
    round_to_half,
    store_half,
)
from llmcompress.grids.floats import half_to_float
from llmcompress.grids.grid import Grid
from llmcompress.grids.lanes import WIDTH, absolute, fma, load, maximum, minimum, select, splat, sqrt, store, store_bytes
from llmcompress.grids.scale_search import affine_sums, fit_affine, fit_scale, scale_sums, weight_sums

BLOCK = 256
ROUNDS = 1
REFINEMENTS = 2
TOPS_3 = np.array([[0.0, 2.1], [0.0, 3.0]], np.float32)
TOPS_15 = np.array([[0.0, 14.5], [0.0, 15.0], [0.0, 15.5]], np.float32)
TOPS_31 = np.array([[0.0, 30.2], [0.0, 30.6], [0.0, 31.0], [0.0, 31.4]], np.float32)
TOPS_63 = np.array([62.0, 62.25, 62.5, 62.75, 63.0, 63.3], np.float32)
SCALE_TOPS_15 = np.array([14.0, 14.25, 14.5, 14.75, 15.0, 15.3], np.float32)
Q6_TOPS = np.array([-32.6, -32.2, -31.8, -31.4, 31.2, 31.6, 32.0], np.float32)
Q6_SCALE_TOPS = np.array([-128.2, -127.8, -127.4, -127.0, -126.5, -126.0], np.float32)
Q3_TOPS = np.array([-4.6, -4.3, -4.0, -3.7, -3.4, 3.0, 3.3, 3.6, 2.7], np.float32)
Q3_SCALE_TOPS = np.array([-32.2, -31.9, -31.6, -31.3, -31.0, 30.7, 31.0, 31.3], np.float32)


@register_jitable
def mean_square(x):
    total = splat(0.0)
    for j in range(BLOCK):
        total = fma(load(x, j), load(x, j), total)
    return total / 256.0


@register_jitable
def weigh_with_energy(x, w, energy):
    for j in range(BLOCK):
        store(w, j, load(w, j) * sqrt(fma(load(x, j), load(x, j), energy)))


@register_jitable
def weigh_by_mean_square(x, w, row_mean_square):
    weigh_with_energy(x, w, mean_square(x))


@register_jitable
def weigh_by_twice_mean_square(x, w, row_mean_square):
    weigh_with_energy(x, w, 2.0 * mean_square(x))


@register_jitable
def weigh_by_importance(x, w, row_mean_square):
    pass


@register_jitable
def weigh_by_size(x, w):
    for j in range(BLOCK):
        store(w, j, absolute(load(x, j)))


@register_jitable
def weigh_by_square(x, w):
    for j in range(BLOCK):
        store(w, j, load(x, j) * load(x, j))


@register_jitable
def weigh_by_size_and_root(x, w):
    for start in range(0, BLOCK, 32):
        total = splat(0.0)
        for j in range(start, start + 32):
            total = fma(load(x, j), load(x, j), total)
        root = sqrt(total / 32.0)
        for j in range(start, start + 32):
            store(w, j, root + absolute(load(x, j)))


@register_jitable
def fit_super_affine(x, w, unit, size, high, limit, tops, scale_tops, scales, floors):
    """Fit all; `scales`, `floors` take whole numbers (n,16). returns half d, half dmin."""
    count = BLOCK // size
    curves, masses = np.empty((count, WIDTH), np.float32), np.empty((count, WIDTH), np.float32)
    for b in range(count):
        scale, value, curve = fit_affine(x, w, b * size, size, high, 0.0, tops, ROUNDS)
        store(scales, b, scale)
        store(floors, b, -value)
        store(curves, b, curve)
        store(masses, b, weight_sums(x, w, b * size, size)[0])
    d, _ = fit_scale(scales, curves, 0, count, 0.0, limit, scale_tops, 1)
    dmin, _ = fit_scale(floors, masses, 0, count, 0.0, limit, scale_tops, 1)
    half_d, half_dmin = round_to_half(d * unit), round_to_half(dmin * unit)
    round_scales(scales, half_d / unit, count, limit)
    round_scales(floors, half_dmin / unit, count, limit)
    for _ in range(REFINEMENTS):
        d, dmin = refine_super_affine(x, w, size, high, limit, half_d / unit, half_dmin / unit, scales, floors)
        half_d, half_dmin = round_to_half(d * unit), round_to_half(dmin * unit)
    return half_d, half_dmin


@register_jitable
def round_scales(scales, d, count, limit):
    inverse = divide(splat(1.0), d)
    for b in range(count):
        store(scales, b, clamped_rint(load(scales, b) * inverse, 0.0, limit))


@register_jitable
def refine_super_affine(x, w, size, high, limit, d, dmin, scales, floors):
    count = BLOCK // size
    inverse_dmin = divide(splat(1.0), dmin)
    aa, ab, bb, ax, bx = splat(0.0), splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for b in range(count):
        middle, old = load(scales, b), load(floors, b)
        sum_w, sum_x = weight_sums(x, w, b * size, size)
        best_error, best, best_floor = splat(1e38), middle, old
        best_l, best_ll, best_xl = splat(0.0), splat(0.0), splat(0.0)
        for step in range(-1, 2):
            candidate = minimum(maximum(middle + np.float32(step), 0.0), limit)
            scale = d * candidate
            inverse = divide(splat(1.0), scale)
            sum_l, sum_ll, sum_xl = affine_sums(x, w, b * size, size, inverse, dmin * old * inverse, high)
            floor = clamped_rint(divide(scale * sum_l - sum_x, sum_w) * inverse_dmin, 0.0, limit)
            value = -dmin * floor
            error = scale * (scale * sum_ll + 2.0 * (value * sum_l - sum_xl)) + value * (value * sum_w - 2.0 * sum_x)
            better = error < best_error
            best_error = select(better, error, best_error)
            best, best_floor = select(better, candidate, best), select(better, floor, best_floor)
            best_l, best_ll = select(better, sum_l, best_l), select(better, sum_ll, best_ll)
            best_xl = select(better, sum_xl, best_xl)
        store(scales, b, best)
        store(floors, b, best_floor)
        aa = fma(best * best, best_ll, aa)
        ab = fma(best * best_floor, best_l, ab)
        bb = fma(best_floor * best_floor, sum_w, bb)
        ax = fma(best, best_xl, ax)
        bx = fma(best_floor, sum_x, bx)
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-6 * aa * bb
    new_dmin = select(regular, (ab * ax - aa * bx) / determinant, dmin)
    new_dmin = maximum(new_dmin, 0.0)
    return maximum(divide(ax + new_dmin * ab, aa), 0.0), new_dmin


@register_jitable
def encode_super_affine(x, size, high, d, dmin, scales, floors):
    for b in range(BLOCK // size):
        inverse = divide(splat(1.0), d * load(scales, b))
        floor = dmin * load(floors, b)
        for j in range(b * size, (b + 1) * size):
            store(x, j, clamped_rint((load(x, j) + floor) * inverse, 0.0, high))


@register_jitable
def fit_super_scaled(x, w, unit, low, high, least, most, tops, scale_tops, scales):
    count = 16
    curves = np.empty((count, WIDTH), np.float32)
    for b in range(count):
        scale, curve = fit_scale(x, w, b * 16, 16, low, high, tops, ROUNDS)
        store(scales, b, scale)
        store(curves, b, curve)
    d, _ = fit_scale(scales, curves, 0, count, least, most, scale_tops, 1)
    half_d = round_to_half(d * unit)
    d = half_d / unit
    inverse = select(absolute(d) > 0.0, 1.0 / d, 0.0)
    for b in range(count):
        store(scales, b, clamped_rint(load(scales, b) * inverse, least, most))
    for _ in range(REFINEMENTS):
        d = refine_super_scaled(x, w, low, high, least, most, half_d / unit, scales)
        half_d = round_to_half(d * unit)
    return half_d


@register_jitable
def refine_super_scaled(x, w, low, high, least, most, d, scales):
    aa, ax = splat(0.0), splat(0.0)
    for b in range(16):
        middle = load(scales, b)
        best_gain, best, best_ll, best_xl = splat(-1e38), middle, splat(0.0), splat(0.0)
        for step in range(-1, 2):
            candidate = minimum(maximum(middle + np.float32(step), least), most)
            scale = d * candidate
            inverse = select(absolute(scale) > 0.0, 1.0 / scale, 0.0)
            sum_xl, sum_ll = scale_sums(x, w, b * 16, 16, inverse, low, high)
            gain = scale * (2.0 * sum_xl - scale * sum_ll)
            better = gain > best_gain
            best_gain = select(better, gain, best_gain)
            best, best_ll = select(better, candidate, best), select(better, sum_ll, best_ll)
            best_xl = select(better, sum_xl, best_xl)
        store(scales, b, best)
        aa = fma(best * best, best_ll, aa)
        ax = fma(best, best_xl, ax)
    return select(aa > 0.0, ax / aa, d)


@register_jitable
def encode_super_scaled(x, low, high, d, scales):
    for b in range(16):
        scale = d * load(scales, b)
        inverse = select(absolute(scale) > 0.0, 1.0 / scale, 0.0)
        for j in range(b * 16, (b + 1) * 16):
            store(x, j, clamped_rint(load(x, j) * inverse, low, high) - low)


@register_jitable
def pack_six_bits(scales, floors, packed, i):
    """
    byte b      (b < 4): scale b in bits 0-5, top two bits of scale b + 4 above
    byte 4 + b  (b < 4): minimum b in bits 0-5, top two bits of minimum b + 4 above
    byte 8 + b  (b < 4): low four bits of scale b + 4, then of minimum b + 4
    """
    for b in range(4):
        scale_top = rint_floor(load(scales, b + 4) / 16.0)
        floor_top = rint_floor(load(floors, b + 4) / 16.0)
        store_bytes(packed, i + b, fma(scale_top, 64.0, load(scales, b)))
        store_bytes(packed, i + 4 + b, fma(floor_top, 64.0, load(floors, b)))
        scale_low = fma(scale_top, -16.0, load(scales, b + 4))
        floor_low = fma(floor_top, -16.0, load(floors, b + 4))
        store_bytes(packed, i + 8 + b, fma(floor_low, 16.0, scale_low))


@register_jitable
def rint_floor(value):
    """floor of multiples of 1/16"""
    return clamped_rint(value - 0.46875, -1e9, 1e9)


@register_jitable
def encode_q4_k(x, w, unit, packed):
    scales, floors = np.empty((8, WIDTH), np.float32), np.empty((8, WIDTH), np.float32)
    d, dmin = fit_super_affine(x, w, unit, 32, 15.0, 63.0, TOPS_15, TOPS_63, scales, floors)
    encode_super_affine(x, 32, 15.0, d / unit, dmin / unit, scales, floors)
    store_half(packed, 0, d)
    store_half(packed, 2, dmin)
    pack_six_bits(scales, floors, packed, 4)
    for half in range(4):
        for j in range(32):
            low, high = load(x, 64 * half + j), load(x, 64 * half + 32 + j)
            store_bytes(packed, 16 + 32 * half + j, fma(high, 16.0, low))


@register_jitable
def encode_q5_k(x, w, unit, packed):
    scales, floors = np.empty((8, WIDTH), np.float32), np.empty((8, WIDTH), np.float32)
    d, dmin = fit_super_affine(x, w, unit, 32, 31.0, 63.0, TOPS_31, TOPS_63, scales, floors)
    encode_super_affine(x, 32, 31.0, d / unit, dmin / unit, scales, floors)
    store_half(packed, 0, d)
    store_half(packed, 2, dmin)
    pack_six_bits(scales, floors, packed, 4)
    for j in range(32):
        byte = splat(0.0)
        for b in range(8):
            code = load(x, 32 * b + j)
            high = code > 15.0
            byte = select(high, byte + np.float32(1 << b), byte)
            store(x, 32 * b + j, select(high, code - 16.0, code))
        store_bytes(packed, 16 + j, byte)
    for half in range(4):
        for j in range(32):
            low, high = load(x, 64 * half + j), load(x, 64 * half + 32 + j)
            store_bytes(packed, 48 + 32 * half + j, fma(high, 16.0, low))


@register_jitable
def encode_q2_k(x, w, unit, packed):
    scales, floors = np.empty((16, WIDTH), np.float32), np.empty((16, WIDTH), np.float32)
    d, dmin = fit_super_affine(x, w, unit, 16, 3.0, 15.0, TOPS_3, SCALE_TOPS_15, scales, floors)
    encode_super_affine(x, 16, 3.0, d / unit, dmin / unit, scales, floors)
    for b in range(16):
        store_bytes(packed, b, fma(load(floors, b), 16.0, load(scales, b)))
    pack_quarters(x, packed, 16)
    store_half(packed, 80, d)
    store_half(packed, 82, dmin)


@register_jitable
def pack_quarters(x, packed, i):
    for half in range(2):
        for j in range(32):
            k = 128 * half + j
            low = fma(load(x, k + 32), 4.0, load(x, k))
            high = fma(load(x, k + 96), 4.0, load(x, k + 64))
            store_bytes(packed, i + 32 * half + j, fma(high, 16.0, low))


@register_jitable
def encode_q3_k(x, w, unit, packed):
    scales = np.empty((16, WIDTH), np.float32)
    d = fit_super_scaled(x, w, unit, -4.0, 3.0, -32.0, 31.0, Q3_TOPS, Q3_SCALE_TOPS, scales)
    encode_super_scaled(x, -4.0, 3.0, d / unit, scales)
    for j in range(32):
        byte = splat(0.0)
        for b in range(8):
            code = load(x, 32 * b + j)
            high = code > 3.0
            byte = select(high, byte + np.float32(1 << b), byte)
            store(x, 32 * b + j, select(high, code - 4.0, code))
        store_bytes(packed, j, byte)
    pack_quarters(x, packed, 32)
    for b in range(16):
        store(scales, b, load(scales, b) + 32.0)
    for b in range(4):
        top = splat(0.0)
        for k in range(4):
            high = rint_floor(load(scales, b + 4 * k) / 16.0)
            store(scales, b + 4 * k, fma(high, -16.0, load(scales, b + 4 * k)))
            top = fma(high, np.float32(1 << 2 * k), top)
        store_bytes(packed, 104 + b, top)
    for b in range(8):
        store_bytes(packed, 96 + b, fma(load(scales, b + 8), 16.0, load(scales, b)))
    store_half(packed, 108, d)


@register_jitable
def encode_q6_k(x, w, unit, packed):
    scales = np.empty((16, WIDTH), np.float32)
    d = fit_super_scaled(x, w, unit, -32.0, 31.0, -128.0, 127.0, Q6_TOPS, Q6_SCALE_TOPS, scales)
    encode_super_scaled(x, -32.0, 31.0, d / unit, scales)
    for half in range(2):
        for j in range(32):
            top = splat(0.0)
            for k in range(4):
                code = load(x, 128 * half + 32 * k + j)
                high = rint_floor(code / 16.0)
                store(x, 128 * half + 32 * k + j, fma(high, -16.0, code))
                top = fma(high, np.float32(1 << 2 * k), top)
            store_bytes(packed, 128 + 32 * half + j, top)
        for j in range(64):
            low, high = load(x, 128 * half + j), load(x, 128 * half + 64 + j)
            store_bytes(packed, 64 * half + j, fma(high, 16.0, low))
    for b in range(16):
        store_bytes(packed, 192 + b, load(scales, b))
    store_half(packed, 208, d)


@njit
def nothing(data, out):
    pass


Q2_K = Grid("Q2_K", 10, BLOCK, 84, compile_quantizer(BLOCK, 84, weigh_by_mean_square, weigh_by_size, encode_q2_k), nothing)
Q3_K = Grid("Q3_K", 11, BLOCK, 110, compile_quantizer(BLOCK, 110, weigh_by_twice_mean_square, weigh_by_square, encode_q3_k), nothing)
Q4_K = Grid("Q4_K", 12, BLOCK, 144, compile_quantizer(BLOCK, 144, weigh_by_twice_mean_square, weigh_by_size_and_root, encode_q4_k), nothing)
Q5_K = Grid("Q5_K", 13, BLOCK, 176, compile_quantizer(BLOCK, 176, weigh_by_twice_mean_square, weigh_by_size_and_root, encode_q5_k), nothing)
Q6_K = Grid("Q6_K", 14, BLOCK, 210, compile_quantizer(BLOCK, 210, weigh_by_importance, weigh_by_square, encode_q6_k), nothing)
