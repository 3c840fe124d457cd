"""One number of each of sixteen blocks, found along their weights, one to a lane.

A block gives a vector, or several, whose lanes are to be summed up (or their extremes found). Two such vectors
are merged by interleaving their first and their second halves and adding those, until sixteen have become one.
"""

from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic, register_jitable

from llmcompress.grids.lanes import _FLOATS, _INTS, LANES, _constant, maximum, minimum
from llmcompress.grids.transpose import FIRST_HALVES, SECOND_HALVES

# LLVM would make the larger ones calls, which pass lanes through memory.
inlined = register_jitable(forceinline=True)


def _interleaving(chosen: ir.Constant):
    @intrinsic
    def function(typing_context, a, b):
        def lower(context, builder, sig, args):
            return builder.shuffle_vector(*args, chosen)

        return LANES(a, b), lower

    return function


# a0 b0 a1 b1 ... a7 b7, and a8 b8 ... a15 b15. Added up, each lane of a and b has half of their numbers left;
# sixteen vectors k merged so with k + 8, then with k + 4, k + 2, k + 1 leave the sum of vector k in lane k.
first_halves, second_halves = _interleaving(FIRST_HALVES), _interleaving(SECOND_HALVES)


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
    even = reduced_half(leaf, merge, flat, first, inverses, count, k)
    return merge(even, reduced_half(leaf, merge, flat, first, inverses, count, k + 1))


@inlined
def reduced_half(leaf, merge, flat, first, inverses, count, k):
    even = reduced_quarter(leaf, merge, flat, first, inverses, count, k)
    return merge(even, reduced_quarter(leaf, merge, flat, first, inverses, count, k + 2))


@inlined
def reduced_quarter(leaf, merge, flat, first, inverses, count, k):
    even = reduced_eighth(leaf, merge, flat, first, inverses, count, k)
    return merge(even, reduced_eighth(leaf, merge, flat, first, inverses, count, k + 4))


@inlined
def reduced_eighth(leaf, merge, flat, first, inverses, count, k):
    even = leaf(flat, first + k, inverses[k], count)
    return merge(even, leaf(flat, first + k + 8, inverses[k + 8], count))


@inlined
def merge_ranges(a, b):
    least = minimum(first_halves(a[0], b[0]), second_halves(a[0], b[0]))
    return least, maximum(first_halves(a[1], b[1]), second_halves(a[1], b[1]))


@inlined
def merge_extremes(a, b):
    return larger_bits(first_halves(a, b), second_halves(a, b))


@inlined
def merge_sums(a, b):
    sum_xl = first_halves(a[0], b[0]) + second_halves(a[0], b[0])
    return sum_xl, first_halves(a[1], b[1]) + second_halves(a[1], b[1])
