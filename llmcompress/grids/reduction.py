"""One number of each of sixteen blocks, found along their weights, one to a lane.

A block gives a vector, or several, whose lanes are to be summed up (or their extremes found). Two such vectors
are merged: half of the lanes of each make one vector, the other halves another, and those are added. After four
rounds one vector is left of sixteen.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from llmcompress.grids.lanes import _FLOATS, _INTS, LANES, WIDTH, _constant, maximum, minimum

# LLVM would make the larger ones calls, which pass lanes through memory.
inlined = register_jitable(forceinline=True)


def _halving(first: list[int], step: int):
    """Vectors of lanes `first` of a and b, those of b counted from 16 on, and of the lanes `step` later."""
    masks = [ir.Constant(_INTS, [lane + later for lane in first]) for later in (0, step)]

    @intrinsic
    def function(typing_context, a, b):
        def lower(context, builder, sig, args):
            halves = [builder.shuffle_vector(*args, mask) for mask in masks]
            return context.make_tuple(builder, sig.return_type, halves)

        return types.UniTuple(LANES, 2)(a, b), lower

    return function


# Four lanes are what a CPU shuffles cheapest: two rounds within those, then one each of the quarters of a vector.
within_quarters = _halving([q + k // 2 + WIDTH * (k % 2) for q in range(0, WIDTH, 4) for k in range(4)], 2)
of_two_quarters = _halving([*range(8), *range(WIDTH, WIDTH + 8)], 8)
of_quarters = _halving([q + k for q in range(0, 2 * WIDTH, 8) for k in range(4)], 4)


def _rotation(left: int):
    """Turn the 32 bits of each lane."""

    @intrinsic
    def function(typing_context, a):
        def lower(context, builder, sig, args):
            bits = builder.bitcast(args[0], _INTS)
            up, down = (_constant(_INTS, distance) for distance in (left, 32 - left))
            return builder.bitcast(builder.or_(builder.shl(bits, up), builder.lshr(bits, down)), _FLOATS)

        return LANES(LANES), lower

    return function


# With its sign in the last bit, a float's bits order by size.
sign_last, sign_first = _rotation(1), _rotation(31)


@intrinsic
def larger_bits(typing_context, a, b):
    """The one whose bits are the larger whole number: of floats made `sign_last`, the larger in size."""

    def lower(context, builder, sig, args):
        first, second = (builder.bitcast(vector, _INTS) for vector in args)
        return builder.select(builder.icmp_unsigned(">", first, second), *args)

    return LANES(LANES, LANES), lower


@inlined
def reduced(leaf, merge, flat, first, inverses, count, k):
    """`leaf(flat, first + j, inverses[j], count)` of blocks j = k to k + 15, each reduced to one lane."""
    eight = reduced_eight(leaf, merge, flat, first, inverses, count, k)
    return merge(of_quarters, eight, reduced_eight(leaf, merge, flat, first, inverses, count, k + 8))


@inlined
def reduced_eight(leaf, merge, flat, first, inverses, count, k):
    four = reduced_four(leaf, merge, flat, first, inverses, count, k)
    return merge(of_two_quarters, four, reduced_four(leaf, merge, flat, first, inverses, count, k + 4))


@inlined
def reduced_four(leaf, merge, flat, first, inverses, count, k):
    two = reduced_two(leaf, merge, flat, first, inverses, count, k)
    return merge(within_quarters, two, reduced_two(leaf, merge, flat, first, inverses, count, k + 1))


@inlined
def reduced_two(leaf, merge, flat, first, inverses, count, k):
    one = leaf(flat, first + k, inverses[k], count)
    return merge(within_quarters, one, leaf(flat, first + k + 2, inverses[k + 2], count))


@inlined
def merge_ranges(halving, a, b):
    least, most = halving(a[0], b[0]), halving(a[1], b[1])
    return minimum(least[0], least[1]), maximum(most[0], most[1])


@inlined
def merge_extremes(halving, a, b):
    extremes = halving(a, b)
    return larger_bits(extremes[0], extremes[1])


@inlined
def merge_sums(halving, a, b):
    sum_xl, sum_ll = halving(a[0], b[0]), halving(a[1], b[1])
    return sum_xl[0] + sum_xl[1], sum_ll[0] + sum_ll[1]
