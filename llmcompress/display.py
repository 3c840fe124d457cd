"""What the command line shows: tables of plans and results, and progress on a terminal or in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from llmcompress.inspect import Inspection
from llmcompress.output import Output
from llmcompress.plan import Plan, disk_needs
from llmcompress.progress import Progress
from llmcompress.report import FileReport, Result
from llmcompress.sensitivity import Sensitivity
from llmcompress.sizes import format_size

if TYPE_CHECKING:
    from llmcompress.converters.tokenizer_check import TokenizerReport

LOG_SECONDS = 10.0  # between two lines of a log

LOG_WIDTH = 200  # of tables that go to a file or another program

_PLAIN = {"highlight": False, "markup": False, "emoji": False}  # names of files and tensors stand as they are
_out = Console(**_PLAIN)
if not _out.is_terminal:
    _out = Console(width=LOG_WIDTH, **_PLAIN)
_err = Console(stderr=True, **_PLAIN)


def live_progress() -> Progress:
    """A bar on a terminal, lines elsewhere; both on standard error."""
    return Bar() if _err.is_terminal else Log()


def print_out(shown: Any) -> None:
    """A line or a table on standard output."""
    _out.print(shown, soft_wrap=isinstance(shown, str))


class Bar(Progress):
    """What is done of the whole, its rate and the time left."""

    def __init__(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description:8}"), BarColumn(), TextColumn("{task.fields[amounts]}"),
            TimeRemainingColumn(), console=_err,
        )  # fmt: skip
        self._task = None

    def start(self, phase: str, total: int, unit: str = "bytes") -> None:
        self._unit = unit
        self._bar.start()
        self._task = self._bar.add_task(phase, total=total, amounts="")

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)
        task = self._bar.tasks[self._task]
        amounts = f"{_amount(task.completed, self._unit)}/{_amount(task.total, self._unit)}"
        rate = f"  {_amount(task.speed, self._unit)}/s" if task.speed else ""
        self._bar.update(self._task, amounts=amounts + rate)

    def say(self, line: str) -> None:
        _err.print(line, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class Log(Progress):
    """A plain line every LOG_SECONDS and at the end of each phase."""

    def __init__(self) -> None:
        self._phase, self._total, self._done, self._began, self._last = "", 0, 0, 0.0, 0.0

    def start(self, phase: str, total: int, unit: str = "bytes") -> None:
        self._unit = unit
        self._phase, self._total, self._done = phase, total, 0
        self._began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < LOG_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._began, 1e-6)
        left = (self._total - self._done) / rate
        done, total, each = (_amount(count, self._unit) for count in (self._done, self._total, rate))
        line = f"{self._phase}: {done} of {total}, {each}/s"
        self.say(line + (f", {left:.0f} s left" if self._done < self._total else ""))

    def say(self, line: str) -> None:
        _err.print(line, soft_wrap=True)


def _amount(count: float, unit: str) -> str:
    if unit == "bytes":
        return format_size(count)
    return f"{count:,.{0 if count == round(count) or count >= 10 else 1}f} {unit}"


def show_plan(plan: Plan) -> None:
    """Every tensor, its type in each output and the rule that decided it; then sizes, memory and disk."""
    for output in plan.outputs:
        table = _table("tensor", "shape", "from", "as", "bytes", "why")
        for step, place in zip(plan.steps, output.placements):
            source = step.dtype if step.pieces else "config"
            how = "" if step.operation.name == "copy" else f" ({step.operation.name})"
            table.add_row(
                step.name,
                _shape(step.shape),
                source + how,
                place.grid.name,
                f"{place.nbytes:,}",
                place.reason,
            )
        _out.print(table)
        _out.print(_size_line(output.file_type.name, output.size, _bits(plan, output), _counts(output)))
        for file in output.files:
            _out.print(
                f"  to {file.path}" + (" (replaces the file there)" if file.path.exists() else ""),
                soft_wrap=True,
            )
    _out.print(
        f"memory: {format_size(plan.ram)} of --max-ram {format_size(plan.recipe.max_ram)}, {plan.workers} workers"
    )
    for disk in disk_needs(plan):
        _out.print(
            f"disk: {format_size(disk.needed)} of {format_size(disk.free)} free in {disk.folder}",
            soft_wrap=True,
        )
    _show_notes(plan.notes)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data for JSON."""
    return {
        "name": plan.name,
        "ram": plan.ram,
        "workers": plan.workers,
        "disk": [{"folder": str(disk.folder), "needed": disk.needed, "free": disk.free} for disk in disk_needs(plan)],
        "notes": list(plan.notes),
        "outputs": [
            {
                "type": output.file_type.name,
                "paths": [str(file.path) for file in output.files],
                "nbytes": output.size,
                "bits_per_weight": _bits(plan, output),
                "tensors": [
                    {
                        "name": step.name, "shape": step.shape, "source": step.dtype, "operation": step.operation.name,
                        "type": place.grid.name, "reason": place.reason, "nbytes": place.nbytes,
                    }
                    for step, place in zip(plan.steps, output.placements)
                ],
            }
            for output in plan.outputs
        ],
    }  # fmt: skip


def show_result(result: Result) -> None:
    """Types, sizes, the worst tensors and where the files are."""
    for output in result.outputs:
        _out.print(_size_line(output.type, output.nbytes, output.bits_per_weight, output.type_counts))
        by_method = Counter(tensor.method for tensor in output.tensors if len(tensor.shape) > 1)
        if set(by_method) != {"nearest"}:
            _out.print(", ".join(f"{count} matrices by {method}" for method, count in by_method.items()))
        _show_worst(output)
        for path in output.paths:
            _out.print(str(path), style="bold", soft_wrap=True)
    _show_notes(result.notes)
    resumed = (
        f", {result.slabs_kept} of {result.slabs} slabs kept from an earlier run" if result.slabs_kept else ""
    )
    _out.print(f"done in {result.seconds:.1f} s{resumed}")


def show_planned(result: Result) -> None:
    """Every tensor of a job that was not carried out."""
    for output in result.outputs:
        table = _table("tensor", "shape", "source", "type", "bytes", "why")
        for tensor in output.tensors:
            how = "" if tensor.operation == "copy" else f" ({tensor.operation})"
            table.add_row(tensor.name, _shape(tensor.shape), tensor.source + how, tensor.type, f"{tensor.nbytes:,}",
                          tensor.reason)  # fmt: skip
        _out.print(table)
        _out.print(_size_line(output.type, output.nbytes, output.bits_per_weight, output.type_counts))
        for path in output.paths:
            _out.print(f"  to {path}", soft_wrap=True)
    _show_notes(result.notes)


def show_inspection(found: Inspection, tensors: bool = True) -> None:
    """Metadata, tensors, totals of each type and bits per weight."""
    metadata = _table("key", "type", "value")
    for item in found.metadata:
        more = f" ... ({item.length:,} in all)" if item.length is not None else ""
        metadata.add_row(item.key, item.type, Text(f"{item.value}{more}".replace("\n", "\\n")))
    _out.print(metadata)
    if tensors:
        table = _table("tensor", "shape", "type", "bytes")
        for row in found.tensors:
            table.add_row(row.name, _shape(row.shape), row.type, f"{row.nbytes:,}")
        _out.print(table)
    for total in found.types:
        _out.print(
            f"{total.type:>8}: {total.tensors} tensors, {total.parameters:,} weights, {format_size(total.nbytes)}"
        )
    _out.print(
        f"{found.kind} of {len(found.files)} files: {len(found.tensors)} tensors, {found.parameters:,} weights, "
        f"{format_size(found.file_bytes)}, {found.bits_per_weight:.4f} bits per weight"
    )
    for warning in found.warnings:
        _out.print(f"warning: {warning}", style="yellow")


def show_tokenizer_check(checked: TokenizerReport) -> None:
    """The share of texts that llama.cpp gives other ids, and the first of them."""
    for kind in checked.kinds:
        share = kind.differ / kind.compared if kind.compared else 0.0
        _out.print(
            f"{kind.texts}: {kind.differ} of {kind.compared} have other ids in llama.cpp ({share:.2%})"
        )
    for label, one in [(kind.texts, one) for kind in checked.kinds for one in kind.first]:
        start = next(
            (i for i, pair in enumerate(zip(one.llama_cpp, one.tokenizer)) if pair[0] != pair[1]), None
        )
        at = min(len(one.llama_cpp), len(one.tokenizer)) if start is None else start
        _out.print(
            f"  {label}: {one.text!r}: from token {at} on {one.llama_cpp[at : at + 8]}, the tokenizer has "
            f"{one.tokenizer[at : at + 8]}", soft_wrap=True,
        )  # fmt: skip
    if checked.added:
        _out.print(
            f"around a text: {checked.added.text!r} is {checked.added.llama_cpp} in llama.cpp, "
            f"{checked.added.tokenizer} by the tokenizer"
        )  # fmt: skip
    _out.print(f"{checked.file} against {checked.tokenizer}", soft_wrap=True)


def show_sensitivity(found: Sensitivity) -> None:
    """The relative error of every tensor in every type."""
    types = list(dict.fromkeys(name for errors in found.errors.values() for name in errors))
    table = _table("tensor", *types)
    for tensor, errors in found.errors.items():
        table.add_row(tensor, *(f"{errors[name]:.2g}" if name in errors else "" for name in types))
    _out.print(table)


def _show_worst(output: FileReport) -> None:
    worst = output.worst()
    if not worst:
        return
    rows = "all rows" if all(t.rows_checked >= prod(t.shape[:-1]) for t in output.tensors) else "sampled rows"
    listed = ", ".join(f"{tensor.name} {tensor.type} {tensor.relative_error:.2%}" for tensor in worst)
    _out.print(f"largest relative errors ({rows}): {listed}", soft_wrap=True)


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        _out.print(f"note: {note}", style="yellow", soft_wrap=True)


def _size_line(name: str, size: int, bits: float, counts: dict[str, int]) -> str:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{name}: {format_size(size)}, {bits:.4f} bits per weight; tensors: {listed}"


def _counts(output: Output) -> dict[str, int]:
    return dict(Counter(place.grid.name for place in output.placements))


def _bits(plan: Plan, output: Output) -> float:
    return 8 * sum(place.nbytes for place in output.placements) / plan.weights


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    return table
