"""`--confirm N`: swaps near an allocation's optimum, kept where the measured KL divergence falls.

A swap gives one group of tensors its next better option and another its next worse one. Those that raise the predicted
error least are tried first, since there the prediction says least, and each group is tried once each way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmcompress.allocate import Option


@dataclass(frozen=True)
class Swap:
    """Group `better` went to its option `up`, `worse` to `down`, and the divergence from `before` to `after` nats."""

    better: int
    up: int
    worse: int
    down: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before


def confirmed(
    groups: Sequence[Sequence[Option]],
    numbers: Sequence[int],
    fits: Callable[[Sequence[int]], bool],
    divergence: Callable[[Sequence[int]], float],
    tries: int,
) -> tuple[list[int], list[Swap]]:
    """The numbers of the groups' options after at most `tries` swaps that fit, and the swaps, in the order tried.

    `divergence` is called once more, for the numbers as they are.
    """
    numbers, least = list(numbers), divergence(numbers)
    raised: set[int] = set()
    lowered: set[int] = set()
    swaps: list[Swap] = []
    while len(swaps) < tries:
        for better, up, worse, down in _swaps(groups, numbers, raised, lowered):
            changed = list(numbers)
            changed[better], changed[worse] = up, down
            if fits(changed):
                break
        else:
            break
        swaps.append(Swap(better, up, worse, down, least, divergence(changed)))
        raised.add(better)
        lowered.add(worse)
        if swaps[-1].kept:
            numbers, least = changed, swaps[-1].after
    return numbers, swaps


def _swaps(
    groups: Sequence[Sequence[Option]], numbers: Sequence[int], raised: set[int], lowered: set[int]
) -> Iterator[tuple[int, int, int, int]]:
    """(better, up, worse, down) of groups not tried that way, by what they add to the predicted error."""
    ups = [(group, *_steepest(options, number, 1)) for group, (options, number) in enumerate(zip(groups, numbers))
           if group not in raised]  # fmt: skip
    downs = [(group, *_steepest(options, number, -1)) for group, (options, number) in enumerate(zip(groups, numbers))
             if group not in lowered]  # fmt: skip
    pairs = [
        (more + less, better, up, worse, down)
        for better, up, less in ups
        for worse, down, more in downs
        if up >= 0 and down >= 0 and better != worse
    ]
    for _, *pair in sorted(pairs):
        yield tuple(pair)


def _steepest(options: Sequence[Option], number: int, way: int) -> tuple[int, float]:
    """The option that is larger (way 1) by the most error a byte, or smaller (-1) by the least, and the change of error;
    -1 where there is none."""
    now = options[number]
    found = [
        (way * (option.error - now.error) / abs(option.nbytes - now.nbytes), other, option.error - now.error)
        for other, option in enumerate(options)
        if way * (option.nbytes - now.nbytes) > 0 and way * (option.error - now.error) < 0
    ]
    if not found:
        return -1, 0.0
    _, other, change = min(found) if way > 0 else max(found)
    return other, change
