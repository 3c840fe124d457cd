"""The loops of gptq.py that go column by column, compiled.

Rows have nothing to do with each other. A few of them go through the columns together, so that a row of H or of its
factor is read from memory once for all of them.
"""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled

STRIP = 16  # rows that go together: their part of `left` or `pull` stays in a core's cache


@compiled(inline="always", fastmath=True)
def _nearest(at, middles, uniform):
    """The code of the level nearest to `at`. middles: between each two levels; of uniform levels 0, 1, 2 ... unused."""
    if uniform:
        return int(min(max(np.floor(at + np.float32(0.5)), np.float32(0)), np.float32(len(middles))))
    code = 0
    for middle in middles:  # without branches
        code += at > middle
    return code


@compiled(fastmath=True)
def sweep(left, scale, offset, levels, middles, uniform, factor, codes, errors):
    """Codes, and errors in units of the factor's diagonal, of a block of columns; `left` is used up.

    left, scale, offset, codes, errors: (rows, columns). factor: (columns, columns), upper triangular.
    """
    rows, columns = left.shape
    for first in range(0, rows, STRIP):
        for j in range(columns):
            column = factor[j]
            inverse = np.float32(1) / column[j]
            for row in range(first, min(first + STRIP, rows)):
                step, base, weights = scale[row, j], offset[row, j], left[row]
                code = 0
                if step != np.float32(0):
                    code = _nearest((weights[j] - base) / step, middles, uniform)
                error = (weights[j] - (base + step * levels[code])) * inverse
                codes[row, j], errors[row, j] = code, error
                for i in range(j + 1, columns):
                    weights[i] -= error * column[i]


@compiled(fastmath=True)
def descend(pull, hessian, codes, scale, levels, middles, uniform, order, rounds):
    """Move every code to where it is best given all others, in the order of `order`, until none moves or `rounds` are over.

    `pull` is e H, (rows, columns). Moving weight j by x changes the row's error by x² Hjj - 2 x pull[j]: best at
    pull[j] / Hjj.
    """
    rows, columns = pull.shape
    inverse = np.empty(columns, np.float32)
    for j in range(columns):
        inverse[j] = np.float32(1) / hessian[j, j]
    moving = np.empty(STRIP, np.bool_)
    for first in range(0, rows, STRIP):
        count = min(STRIP, rows - first)
        moving[:] = True
        for _ in range(rounds):
            moved = np.zeros(STRIP, np.bool_)
            for j in order:
                column = hessian[j]
                for k in range(count):
                    step, old = scale[first + k, j], codes[first + k, j]
                    if not moving[k] or step == np.float32(0):
                        continue
                    at = levels[old] + pull[first + k, j] * inverse[j] / step
                    code = _nearest(at, middles, uniform)
                    if code != old:
                        codes[first + k, j] = code
                        moved[k] = True
                        change, row = step * (levels[code] - levels[old]), pull[first + k]
                        for i in range(columns):
                            row[i] -= change * column[i]
            moving[:] = moved
            if not moving.any():
                break
