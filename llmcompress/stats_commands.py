"""`llmcompress stats`: look at statistics of a calibration, add them up, change their format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.errors import GGUFError, shown
from llmcompress.reported import reported

if TYPE_CHECKING:
    from llmcompress.stats import Statistics

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Show, merge or convert statistics: our own, and importance matrices of llama-imatrix (GGUF or .dat).",
)

LISTED = 5  # names in a note

ChunkSize = Annotated[
    int,
    typer.Option(
        "--chunk-size",
        metavar="TOKENS",
        min=1,
        max=2**31 - 1,
        help="Tokens of a chunk, which a .dat that is read does not say.",
    ),
]


@app.command("show")
@reported
def show(
    file: Annotated[str, typer.Argument(help="A GGUF or .dat importance matrix.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Figures about the inputs of every weight and layer: all that llama-imatrix --show-statistics has, and tokens."""
    from llmcompress import stats_display
    from llmcompress.gguf.imatrix_file import ImatrixFile
    from llmcompress.stats_table import layer_figures, tensor_figures

    held = ImatrixFile.open(file)
    tensors = tensor_figures(held)
    layers = layer_figures(tensors)
    if as_json:
        typer.echo(json.dumps(stats_display.figures_dict(held, tensors, layers), indent=1))
    else:
        stats_display.show_figures(held, tensors, layers)


@app.command("merge")
@reported
def merge(
    files: Annotated[list[str], typer.Argument(help="Files of one model, GGUF or .dat.")],
    out: Annotated[
        str,
        typer.Option("-o", "--output", metavar="OUT", help="The file to write, .gguf or .dat by its name."),
    ],
    chunk_size: ChunkSize = 512,
) -> None:
    """Add up the sums of several calibrations of one model."""
    from llmcompress.stats import Statistics

    merged = Statistics.load(files[0], chunk_size)
    held = {files[0]: set(merged.entries)}
    for file in files[1:]:
        more = Statistics.load(file, chunk_size)
        _check_related(file, merged, more)
        try:
            merged.merge(more)
        except GGUFError as error:
            raise GGUFError(f"{file}: does not fit {' and '.join(held)}: {error}") from None
        held[file] = set(more.entries)
    merged.save(out)
    _report(out, merged)
    for note in _only_in_some(held):
        typer.echo(f"note: {note}")


@app.command("convert")
@reported
def convert(
    file: Annotated[str, typer.Argument(help="A GGUF or .dat importance matrix.")],
    out: Annotated[str, typer.Argument(help="The file to write, .gguf or .dat by its name.")],
    chunk_size: ChunkSize = 512,
) -> None:
    """Write statistics in the other format."""
    from llmcompress.gguf.imatrix_file import ImatrixFile
    from llmcompress.stats import Statistics

    statistics = Statistics.load(file, chunk_size)
    statistics.save(out)
    _report(out, statistics)
    if Path(out).suffix.lower() == ".dat":
        for note in _lost(statistics):
            typer.echo(f"note: {note}")
    elif ImatrixFile.open(file).chunk_size is None:
        typer.echo(
            f"note: {file} counts calls, not tokens; each was taken for {chunk_size} tokens (--chunk-size)"
        )


def _report(out: str, statistics: Statistics) -> None:
    typer.echo(f"{out}: {len(statistics.entries)} weights, {statistics.chunks} chunks")


def _check_related(file: str, merged: Statistics, more: Statistics) -> None:
    if merged.entries.keys().isdisjoint(more.entries):
        first, other = min(merged.entries), min(more.entries)
        raise GGUFError(
            f"{file}: none of its {len(more.entries)} weights, such as {shown(other)}, is among the "
            f"{len(merged.entries)} of the files before, such as {shown(first)}; merge statistics of one model only"
        )


def _only_in_some(held: Mapping[str, set[str]]) -> list[str]:
    """A line for each file that lacks weights another one has."""
    everything = set().union(*held.values())
    notes = []
    for file, names in held.items():
        if missing := sorted(everything - names):
            notes.append(
                f"{file} has nothing on {len(missing)} weights, kept from the others: {_listed(missing)}"
            )
    return notes


def _lost(statistics: Statistics) -> list[str]:
    """What of these statistics a .dat cannot hold."""
    notes = [
        "a .dat holds means: the numbers of tokens are lost, and with them what merging needs to be exact"
    ]
    unreached = sorted(name for name, stats in statistics.entries.items() if not stats.tokens.any())
    if unreached:
        notes.append(f"left out, since no token reached them: {_listed(unreached)}")
    partial = [name for name, stats in statistics.entries.items() if stats.tokens.any() > stats.tokens.all()]
    if partial:
        notes.append(f"experts that no token reached have ones: {_listed(sorted(partial))}")
    if len(statistics.datasets) > 1:
        notes.append(f"of {len(statistics.datasets)} data sets only the last is named")
    if statistics.notes:
        notes.append(f"left out: {_listed(sorted(statistics.notes))}")
    return notes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:LISTED])) + (", ..." if len(names) > LISTED else "")
