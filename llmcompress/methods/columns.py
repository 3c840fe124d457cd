"""The loops of gptq.py that go column by column through a block of columns, compiled.

Rows have nothing to do with each other. In the sweep sixteen go together, one to a lane. After it each row goes
alone: most columns ask for no change. There `pull` is e H, (rows, columns), for the row's error e: moving
weight j by x changes e H eᵀ by x² Hjj - 2 x pull[j].
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.floats import half_bits_of, half_to_float
from llmcompress.grids.lanes import WIDTH, fma, load, minimum, splat, store

NEVER = np.float32(1e30)
FOUR = 4  # columns of which errors are added at a time
WHOLE, HALF, SINGLE = 0, 1, 2  # what `refit` rounds to


@compiled(inline="always", fastmath=True)
def _nearest(at, levels, middles, uniform):
    """The code of the level nearest to `at`. middles: between each two levels; of uniform levels 0, 1, 2 ... unused."""
    if uniform:
        return int(min(max(np.floor(at + np.float32(0.5)), np.float32(0)), np.float32(len(middles))))
    code = 0
    for middle in middles:  # without branches
        code += at > middle
    return code


@compiled(fastmath=True, error_model="numpy")
def sweep(weights, scale, offset, levels, middles, uniform, factor, codes, errors):
    """Codes, and errors in units of the factor's diagonal, of a block of columns.

    weights, scale, offset, codes, errors: (rows, columns). factor: (columns, columns), upper triangular.
    """
    rows, columns = weights.shape
    left, error = np.empty((columns, WIDTH), np.float32), np.zeros((1, WIDTH), np.float32)
    for first in range(0, rows, WIDTH):
        count = min(WIDTH, rows - first)
        for lane in range(WIDTH):
            row = first + min(lane, count - 1)
            for j in range(columns):
                left[j, lane] = weights[row, j]
        for j in range(columns):
            inverse = np.float32(1) / factor[j, j]
            for lane in range(count):
                step, base = scale[first + lane, j], offset[first + lane, j]
                code = 0
                if step != np.float32(0):
                    code = _nearest((left[j, lane] - base) / step, levels, middles, uniform)
                error[0, lane] = (left[j, lane] - (base + step * levels[code])) * inverse
                codes[first + lane, j], errors[first + lane, j] = code, error[0, lane]
            made = load(error, 0)
            for i in range(j + 1, columns):
                store(left, i, fma(made, -factor[j, i], load(left, i)))


@compiled(fastmath=True, error_model="numpy")
def descend(pull, hessian, codes, scale, levels, middles, uniform, order, rounds):
    """Move every code to where it is best given all others, in the order of `order`, until none moves or `rounds` are over."""
    rows, columns = pull.shape
    inverse, least = np.empty(columns, np.float32), np.float32(0.5) * (levels[1:] - levels[:-1]).min()
    for j in range(columns):
        inverse[j] = np.float32(1) / hessian[j, j]
    for row in range(rows):
        for _ in range(rounds):
            moved = False
            for j in order:
                step, wanted = scale[row, j], pull[row, j] * inverse[j]
                if abs(wanted) < least * abs(step) or step == np.float32(0):
                    continue
                old = codes[row, j]
                code = _nearest(levels[old] + wanted / step, levels, middles, uniform)
                if code != old:
                    codes[row, j] = code
                    moved = True
                    change = step * (levels[code] - levels[old])
                    for i in range(columns):
                        pull[row, i] -= change * hessian[j, i]
            if not moved:
                break


@compiled(fastmath=True, error_model="numpy")
def move_pairs(pull, hessian, codes, scale, levels):
    """Move two codes to their next levels wherever that lowers the error and one alone does not.

    Every column looks once for its best partner, among those after it and a few before. Columns are a multiple of 16.
    """
    rows, columns = pull.shape
    flat = hessian.reshape(-1)
    rise, fall = np.empty(columns, np.float32), np.empty(columns, np.float32)  # twice what a weight moves by
    up, down = np.empty(columns, np.float32), np.empty(columns, np.float32)  # what that costs alone
    lanes, root = np.empty((2, WIDTH), np.float32), np.empty(columns, np.float32)
    strongest = np.zeros(
        columns, np.float32
    )  # what a column has to do with others, at most, over their roots
    for j in range(columns):
        root[j] = np.sqrt(hessian[j, j])
    for i in range(columns):
        for j in range(columns):
            if i != j:
                strongest[i] = max(strongest[i], abs(hessian[i, j]) / root[j])
    for row in range(rows):
        reach = lowest = np.float32(
            0
        )  # how far a partner moves times its root, at most, and what that costs, at least
        for j in range(columns):
            _price(pull, hessian, codes, scale, levels, row, j, rise, fall, up, down)
            reach = max(reach, max(abs(rise[j]), abs(fall[j])) * root[j])
            lowest = min(lowest, min(up[j], down[j]))
        for i in range(columns):
            together = max(abs(rise[i]), abs(fall[i])) * strongest[i] * reach * np.float32(0.5)
            if min(up[i], down[i]) + lowest > together:
                continue  # no partner makes up for what it costs
            alone = up[i], down[i]
            up[i] = down[i] = NEVER
            x, y = np.float32(0.5) * rise[i], np.float32(0.5) * fall[i]
            start, best_up, best_down = i // WIDTH, splat(0.0), splat(0.0)
            for k in range(start, columns // WIDTH):
                share = load(flat, (i * columns) // WIDTH + k)
                higher, lower = share * load(rise, k), share * load(fall, k)
                one, other = load(up, k), load(down, k)
                best_up = minimum(best_up, minimum(fma(higher, x, one), fma(lower, x, other)))
                best_down = minimum(best_down, minimum(fma(higher, y, one), fma(lower, y, other)))
            store(lanes, 0, best_up)
            store(lanes, 1, best_down)
            for direction in range(2):
                x = np.float32(0.5) * (rise[i] if direction == 0 else fall[i])
                least = np.float32(0)
                for lane in range(WIDTH):
                    least = min(least, lanes[direction, lane])
                if not alone[direction] + least < np.float32(-1e-6) * abs(alone[direction]):
                    continue
                partner, upwards, least = i, True, np.float32(0)
                for j in range(start * WIDTH, columns):
                    share = hessian[i, j] * x
                    one, other = up[j] + share * rise[j], down[j] + share * fall[j]
                    if min(one, other) < least:
                        partner, upwards, least = j, one <= other, min(one, other)
                if partner == i:  # none gains anything beside it
                    continue
                y = np.float32(0.5) * (rise[partner] if upwards else fall[partner])
                codes[row, i] += 1 if direction == 0 else -1
                codes[row, partner] += 1 if upwards else -1
                for j in range(columns):
                    change = x * hessian[i, j] + y * hessian[partner, j]
                    pull[row, j] -= change
                    up[j] += rise[j] * change
                    down[j] += fall[j] * change
                    lowest = min(lowest, min(up[j], down[j]))
                _price(pull, hessian, codes, scale, levels, row, partner, rise, fall, up, down)
                reach = max(reach, max(abs(rise[partner]), abs(fall[partner])) * root[partner])
                break
            _price(pull, hessian, codes, scale, levels, row, i, rise, fall, up, down)
            reach = max(reach, max(abs(rise[i]), abs(fall[i])) * root[i])


@compiled(inline="always", fastmath=True)
def _price(pull, hessian, codes, scale, levels, row, j, rise, fall, up, down):
    """What `move_pairs` knows of a weight; without a next level, NEVER."""
    code, step = int(codes[row, j]), scale[row, j]
    rise[j] = fall[j] = np.float32(0)
    up[j] = down[j] = NEVER
    if step != np.float32(0):
        if code + 1 < len(levels):
            x = step * (levels[code + 1] - levels[code])
            rise[j], up[j] = x + x, x * (x * hessian[j, j] - np.float32(2) * pull[row, j])
        if code > 0:
            x = step * (levels[code - 1] - levels[code])
            fall[j], down[j] = x + x, x * (x * hessian[j, j] - np.float32(2) * pull[row, j])


@compiled(fastmath=True, error_model="numpy")
def refit(pull, hessian, slopes, values, kind, least, most):
    """Move numbers, of each of which a run of columns is linear, to where the row's error is least, one after the other.

    slopes: (rows, columns), what the weights rise by per unit. values: float32 (rows, runs), in place, rounded to `kind`
    and, whole ones, kept in least..most. Floats keep their sign.
    """
    rows, columns = pull.shape
    size = columns // values.shape[1]
    forward = np.empty(size, np.float32)
    for row in range(rows):
        for run in range(values.shape[1]):
            start = run * size
            slope, near, corner = (
                slopes[row, start : start + size],
                pull[row, start : start + size],
                hessian[start:],
            )
            whole = size // FOUR * FOUR
            forward[:] = np.float32(0)
            for i in range(0, whole, FOUR):
                for j in range(size):
                    at = start + j
                    two = slope[i] * corner[i, at] + slope[i + 1] * corner[i + 1, at]
                    forward[j] += two + slope[i + 2] * corner[i + 2, at] + slope[i + 3] * corner[i + 3, at]
            for i in range(whole, size):
                for j in range(size):
                    forward[j] += slope[i] * corner[i, start + j]
            product, square = np.float32(0), np.float32(0)
            for i in range(size):
                product += near[i] * slope[i]
                square += forward[i] * slope[i]
            if not square > np.float32(0):
                continue
            old = values[row, run]
            new = old + product / square
            if kind == WHOLE:
                new = min(max(np.floor(new + np.float32(0.5)), np.float32(least)), np.float32(most))
            elif kind == HALF:
                new = half_to_float(np.uint32(half_bits_of(np.float32(new).view(np.uint32))))
            change = new - old
            lower = change * (change * square - np.float32(2) * product) < np.float32(0)
            if lower and (kind == WHOLE or old * new > np.float32(0)):
                values[row, run] = new
                for i in range(0, whole, FOUR):
                    a, b = change * slope[i], change * slope[i + 1]
                    c, d = change * slope[i + 2], change * slope[i + 3]
                    for j in range(columns):
                        two = a * corner[i, j] + b * corner[i + 1, j]
                        pull[row, j] -= two + c * corner[i + 2, j] + d * corner[i + 3, j]
                for i in range(whole, size):
                    for j in range(columns):
                        pull[row, j] -= change * slope[i] * corner[i, j]
