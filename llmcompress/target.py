"""`--target-size` and `--target-bpw`: the type of every tensor such that the file is the best of its size.

The errors of all tensors in all types come from a sensitivity file or are measured here; which type each tensor gets is
a knapsack (allocate.py) over the bytes of the finished file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

from llmcompress.allocate import Option, allocate
from llmcompress.checkpoint import Checkpoint
from llmcompress.confirm import Swap, confirmed
from llmcompress.errors import PlanError, RecipeError
from llmcompress.filetypes import FILE_TYPES, FileType, TypeChoice
from llmcompress.gains import completed, gains_of
from llmcompress.gguf.layout import DEFAULT_ALIGNMENT
from llmcompress.grids import GRIDS
from llmcompress.importance import Importance
from llmcompress.mix import IMATRIX_REQUIRED
from llmcompress.output import Output
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.sensitivity import CANDIDATES, Sensitivity, candidates, measure
from llmcompress.sizes import format_size
from llmcompress.step import Step

# Programs that run the model multiply these as one matrix, which has one type.
FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
ROUNDS = 8  # of the search, where shards change the size of the headers
SLACK = 0.005  # of the budget, that a swap may leave empty
Measure = Callable[
    [Sequence[Step], Importance], AbstractContextManager[Callable[[Sequence[TypeChoice]], float]]
]
MeasureGains = Callable[[Sequence[Step], Importance, Mapping[str, float]], Mapping[str, float]]


@dataclass(frozen=True)
class Target:
    """Chooses the types of all tensors that no rule or option decides.

    measure: gives the mean KL divergence, in nats, of a model whose tensors have the chosen types; needed where the
    recipe has swaps confirmed. gains: measures those of tensors with these energies, where no file has them. notes: what
    came of it all.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    progress: Progress = Progress()
    measure: Measure | None = None
    gains: MeasureGains = lambda steps, importance, energies: {}
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """`4.0GiB` or `4.25bpw`: the result's name in the place of a file type's."""
        size = self.recipe.target_size
        return format_size(size).replace(" ", "") if size else f"{self.recipe.target_bpw:g}bpw"

    @property
    def file_type(self) -> FileType:
        """What stands in for the tensors whose types are not chosen yet."""
        return FileType(self.label, FILE_TYPES["Q4_K_M"].id, "Q4_K")

    def __call__(
        self,
        steps: Sequence[Step],
        choices: Sequence[TypeChoice],
        importance: Importance,
        lay_out: Callable[[Sequence[TypeChoice]], Output],
    ) -> tuple[FileType, list[TypeChoice]]:
        """The choices with the types that make the sum of errors least, and what to call the result.

        `lay_out` gives the files that choices lead to. Raises PlanError for a size that no choice has, RecipeError for a
        sensitivity file that is of something else, RunError for weights that are not finite.
        """
        free = [
            step
            for step, choice in zip(steps, choices)
            if not choice.fixed and candidates(step, CANDIDATES, step.name in importance)
        ]
        if not free:
            raise PlanError(
                f"--target-size: no tensor of {self.checkpoint.name} is free to take another type"
            )
        errors = self._counted(free, importance)
        weights = sum(step.weights for step in steps)
        budget = self.recipe.target_size or int(self.recipe.target_bpw * weights / 8)
        groups = [_Group.of(tensors, errors) for tensors in fused(free)]

        def chosen(numbers: Sequence[int]) -> list[TypeChoice]:
            return _with_types(steps, choices, groups, numbers)

        def size(numbers: Sequence[int]) -> int:
            output = lay_out(chosen(numbers))
            return (
                output.size if self.recipe.target_size else sum(place.nbytes for place in output.placements)
            )

        numbers = self._fitted(groups, budget, size)
        swaps: list[Swap] = []
        if self.recipe.confirm and self.measure:
            with self.measure(steps, importance) as divergence:
                numbers, swaps = confirmed(
                    [group.options for group in groups],
                    numbers,
                    _within(groups, numbers, budget, size),
                    lambda changed: divergence(chosen(changed)),
                    self.recipe.confirm,
                )
            self.notes.append(_told(swaps))
        result = _with_swaps(chosen(numbers), steps, groups, swaps)
        return _result_type(self.file_type, steps, result), result

    def _fitted(
        self, groups: Sequence[_Group], budget: int, size: Callable[[Sequence[int]], int]
    ) -> list[int]:
        """The best number of each group's options such that `size` of them is at most the budget."""
        options = [group.options for group in groups]
        ends = [
            [end(range(len(group)), key=lambda number: group[number].nbytes) for group in options]
            for end in (min, max)
        ]
        smallest, largest = map(size, ends)
        if not smallest <= budget <= largest:
            raise PlanError(
                f"{self.label} is {budget:,} bytes; with these types {self.checkpoint.name} takes from {smallest:,} "
                f"to {largest:,} bytes ({format_size(smallest)} to {format_size(largest)}); choose a size between"
            )
        room = budget - smallest + sum(min(option.nbytes for option in group) for group in options)
        for _ in range(ROUNDS):
            numbers = allocate(options, room)
            over = size(numbers) - budget if numbers else 0
            if over <= 0:
                break
            room -= over
        return numbers if numbers and over <= 0 else ends[0]

    def _counted(self, free: Sequence[Step], importance: Importance) -> dict[str, dict[str, float]]:
        """The error of each tensor in each type, as much as it counts in the model's output."""
        found = self._sensitivity(free, importance)
        predicted = gains_of(found.energies, {step.name: step.shape[-2] for step in free})
        gains = completed(found.gains, predicted)
        return {
            step.name: {name: gains[step.name] * error for name, error in found.errors[step.name].items()}
            for step in free
        }

    def _sensitivity(self, free: Sequence[Step], importance: Importance) -> Sensitivity:
        """From the file, if there is one."""
        recipe, path = self.recipe, self.recipe.sensitivity
        if path is None:
            return measure(
                self.checkpoint, free, importance, recipe.method, recipe.effort, progress=self.progress,
                gains=partial(self.gains, free, importance),
            )  # fmt: skip
        held = Sensitivity.load(path)
        held.check_made_from(self.checkpoint, importance, recipe.method, recipe.effort, path)
        missing = [step.name for step in free if not held.errors.get(step.name)]
        if missing:
            raise RecipeError(
                f"{path}: has nothing on {len(missing)} tensors, the first is {missing[0]}; measure again with "
                "`llmcompress sensitivity`"
            )
        return held


def fused(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in groups that get one type."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        name = step.name
        for parts in FUSED:
            name = re.sub(rf"\.({'|'.join(parts)})(?=(_\w*exps?)?\.weight$)", f".{parts[0]}", name)
        groups.setdefault(name, []).append(step)
    return list(groups.values())


@dataclass(frozen=True)
class _Group:
    """Tensors that get one type, what they weigh, and their options in each: bytes in the file and errors."""

    tensors: tuple[Step, ...]
    types: tuple[str, ...]
    options: tuple[Option, ...]
    errors: dict[str, dict[str, float]]  # by tensor and type, as counted

    @classmethod
    def of(cls, tensors: Sequence[Step], errors: dict[str, dict[str, float]]) -> _Group:
        counted = {step.name: errors[step.name] for step in tensors}
        first, *others = counted.values()
        types = tuple(name for name in first if all(name in other for other in others))
        if not types:
            raise PlanError(
                f"{tensors[0].name}: has no type in common with {tensors[-1].name}; add one to --types"
            )
        options = tuple(
            Option(
                sum(_padded(step, name) for step in tensors),
                sum(counted[step.name][name] for step in tensors),
            )
            for name in types
        )
        return cls(tuple(tensors), types, options, counted)


def _padded(step: Step, type: str) -> int:
    nbytes = GRIDS[type].row_bytes(step.columns) * step.rows
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _with_types(
    steps: Sequence[Step], choices: Sequence[TypeChoice], groups: Sequence[_Group], numbers: Sequence[int]
) -> list[TypeChoice]:
    types = {
        step.name: group.types[number] for group, number in zip(groups, numbers) for step in group.tensors
    }
    counted = {name: errors[types[name]] for group in groups for name, errors in group.errors.items()}
    total = sum(counted.values()) or 1.0
    return [
        replace(
            choice,
            type=types[step.name],
            reason=f"target: {counted[step.name] / total:.1%} of all error, "
            f"{GRIDS[types[step.name]].bits_per_weight:g} bits per weight",
            imatrix_required=types[step.name] in IMATRIX_REQUIRED,
            instead_of=None,
        )
        if step.name in types
        else choice
        for step, choice in zip(steps, choices)
    ]


def _within(
    groups: Sequence[_Group], numbers: Sequence[int], budget: int, size: Callable[[Sequence[int]], int]
) -> Callable[[Sequence[int]], bool]:
    """Whether other numbers fill the budget as well as these, or all but SLACK of it."""

    def nbytes(
        chosen: Sequence[int],
    ) -> int:  # all but headers, for which there are too many swaps to lay out
        return sum(group.options[number].nbytes for group, number in zip(groups, chosen))

    now = size(numbers)
    room, least = budget - now + nbytes(numbers), min(now, budget * (1 - SLACK))
    return lambda chosen: nbytes(chosen) <= room and least <= size(chosen) <= budget


def _with_swaps(
    choices: Sequence[TypeChoice], steps: Sequence[Step], groups: Sequence[_Group], swaps: Sequence[Swap]
) -> list[TypeChoice]:
    """The choices with what was measured in the reasons of those that a swap changed."""
    measured = {
        step.name: f"; confirmed: KL {swap.before:.5f} to {swap.after:.5f}"
        for swap in swaps
        if swap.kept
        for group in (swap.better, swap.worse)
        for step in groups[group].tensors
    }
    return [
        replace(choice, reason=choice.reason + measured.get(step.name, ""))
        for step, choice in zip(steps, choices)
    ]


def _told(swaps: Sequence[Swap]) -> str:
    if not swaps:
        return "confirm: there is nothing to swap"
    kept = [swap for swap in swaps if swap.kept]
    end = kept[-1].after if kept else swaps[0].before
    return f"confirm: {len(swaps)} swaps tried, {len(kept)} kept; measured KL {swaps[0].before:.5f} before, {end:.5f} after"


def _result_type(file_type: FileType, steps: Sequence[Step], choices: Sequence[TypeChoice]) -> FileType:
    """The file type with the number of the one that most weights have, which readers show."""
    totals: Counter[str] = Counter()
    for step, choice in zip(steps, choices):
        totals[choice.type] += step.weights
    common = totals.most_common(1)[0][0]
    return replace(file_type, id=FILE_TYPES[common].id, default=common)
