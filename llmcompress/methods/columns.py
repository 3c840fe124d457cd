"""The loops of gptq.py that go column by column through a block of columns, compiled.

Rows have nothing to do with each other. In the sweep sixteen go together, one to a lane. After it each row goes
alone: most columns ask for no change. There `pull` is e H, (rows, columns), for the row's error e: moving
weight j by x changes e H eᵀ by x² Hjj - 2 x pull[j].
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.lanes import (
    WIDTH,
    absolute,
    ceil,
    fma,
    largest_lane,
    load,
    mask_bits,
    maximum,
    minimum,
    pick,
    select,
    splat,
    store,
)

NEVER = np.float32(1e30)
NOISE = np.float32(1e-6)
ALL = (1 << WIDTH) - 1


@compiled(inline="always", fastmath=True)
def _nearest(at, levels, middles, uniform):
    """The code of the level nearest to `at`. middles: between each two levels; of uniform levels 0, 1, 2 ... unused."""
    if uniform:
        return int(min(max(np.floor(at + np.float32(0.5)), np.float32(0)), np.float32(len(middles))))
    code = 0
    for middle in middles:  # without branches
        code += at > middle
    return code


@compiled(error_model="numpy")
def sweep(weights, scale, offset, levels, middles, uniform, factor, codes, errors):
    """Codes, and errors in units of the factor's diagonal, of a block of columns.

    weights, scale, offset, codes, errors: (rows, columns). factor: (columns, columns), upper triangular.
    """
    rows, columns = weights.shape
    left, step = np.empty((columns, WIDTH), np.float32), np.empty((columns, WIDTH), np.float32)
    base, made = np.empty((columns, WIDTH), np.float32), np.empty((columns, WIDTH), np.float32)
    half, last = np.float32(0.5), np.float32(len(levels) - 1)
    for first in range(0, rows, WIDTH):
        count = min(WIDTH, rows - first)
        for lane in range(WIDTH):
            row = first + min(lane, count - 1)
            for j in range(columns):
                left[j, lane], step[j, lane], base[j, lane] = weights[row, j], scale[row, j], offset[row, j]
        for j in range(columns):
            value, run = load(left, j), load(step, j)
            at = (value - load(base, j)) / run
            if uniform:
                code = minimum(-ceil(-(at + half)), splat(last))
                level = code = select(absolute(run) > splat(0.0), maximum(code, splat(0.0)), splat(0.0))
            else:
                code = splat(0.0)
                for middle in middles:
                    code = code + select(at > splat(middle), splat(1.0), splat(0.0))
                code = select(absolute(run) > splat(0.0), code, splat(0.0))
                level = pick(levels, code)
            error = (value - fma(run, level, load(base, j))) * (np.float32(1) / factor[j, j])
            store(made, j, error)
            store(step, j, code)
            for i in range(j + 1, columns):
                store(left, i, fma(error, -factor[j, i], load(left, i)))
        for lane in range(count):
            for j in range(columns):
                codes[first + lane, j], errors[first + lane, j] = step[j, lane], made[j, lane]


@compiled(fastmath=True, error_model="numpy")
def descend(pull, hessian, codes, scale, levels, middles, uniform, order, rounds):
    """Move every code to where it is best given all others, in the order of `order`, until none moves or `rounds` are over."""
    rows, columns = pull.shape
    least = np.float32(0.5) * (levels[1:] - levels[:-1]).min()
    own, enough = (
        np.empty(columns, np.float32),
        np.empty(columns, np.float32),
    )  # a pull that may ask for a move
    for j in range(columns):
        own[j] = hessian[j, j]
    for row in range(rows):
        pulled, held, steps = pull[row], codes[row], scale[row]
        for j in range(columns):
            enough[j] = least * abs(steps[j]) * own[j] if steps[j] != np.float32(0) else NEVER
        for _ in range(rounds):
            asking = 0
            for j in range(columns):
                asking += abs(pulled[j]) >= enough[j]
            if not asking:
                break
            moved = False
            for j in order:
                if abs(pulled[j]) < enough[j]:
                    continue
                old, step = held[j], steps[j]
                code = _nearest(levels[old] + pulled[j] / (own[j] * step), levels, middles, uniform)
                if code != old:
                    held[j] = code
                    moved = True
                    change = step * (levels[code] - levels[old])
                    for i in range(columns):
                        pulled[i] -= change * hessian[j, i]
            if not moved:
                break


@compiled(fastmath=True, error_model="numpy")
def move_pairs(pull, hessian, codes, scale, levels):
    """Move two codes to their next levels wherever that lowers the error and one alone does not.

    Every column looks once for its best partner, among those after it and a few before. Columns are a multiple of 16.
    """
    rows, columns = pull.shape
    flat = hessian.reshape(-1)
    above, below = np.zeros(len(levels), np.float32), np.zeros(len(levels), np.float32)
    above[:-1], below[1:] = levels[1:] - levels[:-1], levels[:-1] - levels[1:]
    rise, fall = np.empty(columns, np.float32), np.empty(columns, np.float32)  # twice what a weight moves by
    up, down = np.empty(columns, np.float32), np.empty(columns, np.float32)  # what that costs alone
    root, own = np.empty(columns, np.float32), np.empty(columns, np.float32)
    strongest = np.zeros(
        columns, np.float32
    )  # what a column has to do with others, at most, over their roots
    for j in range(columns):
        own[j] = hessian[j, j]
        root[j] = np.sqrt(own[j])
    for i in range(columns):
        for j in range(columns):
            if i != j:
                strongest[i] = max(strongest[i], abs(hessian[i, j]) / root[j])
    for row in range(rows):
        pulled, held, steps = pull[row], codes[row], scale[row]
        reach = lowest = np.float32(
            0
        )  # how far a partner moves times its root, at most, and what that costs, at least
        for j in range(columns):
            _price(pulled, own, held, steps, above, below, j, rise, fall, up, down)
        for j in range(columns):
            reach = max(reach, max(abs(rise[j]), abs(fall[j])) * root[j])
            lowest = min(lowest, min(up[j], down[j]))
        for i in range(columns):
            together = max(abs(rise[i]), abs(fall[i])) * strongest[i] * reach * np.float32(0.5)
            if min(up[i], down[i]) + lowest > together:
                continue  # no partner makes up for what it costs
            alone_up, alone_down = up[i], down[i]
            up[i] = down[i] = NEVER
            x, y = np.float32(0.5) * rise[i], np.float32(0.5) * fall[i]
            start, best_up, best_down = i // WIDTH, splat(0.0), splat(0.0)
            for k in range(start, columns // WIDTH):
                share = load(flat, (i * columns) // WIDTH + k)
                higher, lower = share * load(rise, k), share * load(fall, k)
                one, other = load(up, k), load(down, k)
                best_up = minimum(best_up, minimum(fma(higher, x, one), fma(lower, x, other)))
                best_down = minimum(best_down, minimum(fma(higher, y, one), fma(lower, y, other)))
            upward = _is_below(best_up, alone_up)
            if not upward and not _is_below(best_down, alone_down):
                up[i], down[i] = alone_up, alone_down
                continue
            if not upward:
                x, best_up = y, best_down
            least, partner, falls = -largest_lane(-best_up), i, False
            for k in range(start, columns // WIDTH):
                share = load(flat, (i * columns) // WIDTH + k)
                one = fma(share * load(rise, k), x, load(up, k))
                other = fma(share * load(fall, k), x, load(down, k))
                above_it = mask_bits(minimum(one, other) > splat(least))
                if above_it != ALL:
                    lane = 0
                    while above_it >> lane & 1:
                        lane += 1
                    partner, falls = k * WIDTH + lane, (mask_bits(one > splat(least)) >> lane & 1) == 1
                    break
            y = np.float32(0.5) * (fall[partner] if falls else rise[partner])
            held[i] += 1 if upward else -1
            held[partner] += -1 if falls else 1
            for j in range(columns):
                change = x * hessian[i, j] + y * hessian[partner, j]
                pulled[j] -= change
                up[j] += rise[j] * change
                down[j] += fall[j] * change
            for j in range(columns):
                lowest = min(lowest, min(up[j], down[j]))
            for j in (i, partner):
                _price(pulled, own, held, steps, above, below, j, rise, fall, up, down)
                reach = max(reach, max(abs(rise[j]), abs(fall[j])) * root[j])


@compiled(inline="always")
def _is_below(gains, alone):
    """Whether a lane makes up for what a move costs alone, by more than rounding does."""
    return mask_bits(gains < splat(min(-alone - NOISE * abs(alone), np.float32(0)))) != 0


@compiled(inline="always", fastmath=True)
def _price(pulled, own, held, steps, above, below, j, rise, fall, up, down):
    """What `move_pairs` knows of a weight; without a next level, NEVER."""
    x, y = steps[j] * above[held[j]], steps[j] * below[held[j]]
    rise[j], fall[j] = x + x, y + y
    up[j] = x * (x * own[j] - np.float32(2) * pulled[j]) if x != np.float32(0) else NEVER
    down[j] = y * (y * own[j] - np.float32(2) * pulled[j]) if y != np.float32(0) else NEVER
