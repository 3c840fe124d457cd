"""What `llmcompress stats show` prints: tables on a terminal, or plain data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from llmcompress.errors import shown
from llmcompress.gguf.imatrix_file import ImatrixFile
from llmcompress.stats_table import ExpertTokens, LayerFigures, TensorFigures

LISTED = 20  # experts named in a line
FILE_WIDTH = 220  # of tables that go to a file or another program

_PLAIN = {"highlight": False, "markup": False, "emoji": False}  # names stand as they are


def figures_dict(
    file: ImatrixFile, tensors: Sequence[TensorFigures], layers: Sequence[LayerFigures]
) -> dict[str, Any]:
    """Everything that is shown, as plain data for JSON. `calls` says that tokens are a .dat's calls."""
    return {
        "path": str(file.path),
        "datasets": list(file.datasets),
        "chunks": file.chunks,
        "chunk_size": file.chunk_size,
        "calls": file.chunk_size is None,
        "notes": dict(file.notes),
        "unused": list(file.unused),
        "unreached": unreached(file),
        "tensors": [asdict(row) for row in tensors],
        "layers": [asdict(row) for row in layers],
    }


def unreached(file: ImatrixFile) -> list[str]:
    """Weights that no token reached."""
    return [name for name, place in file.places.items() if not place.tokens.any()]


def show_figures(file: ImatrixFile, tensors: Sequence[TensorFigures], layers: Sequence[LayerFigures]) -> None:
    """Every weight, then every layer, then where it all comes from."""
    out = Console(**_PLAIN)
    if not out.is_terminal:
        out = Console(width=FILE_WIDTH, **_PLAIN)
    out.print(_tensor_table(tensors, "calls" if file.chunk_size is None else "tokens"))
    out.print()
    out.print(_layer_table(layers))
    out.print()
    for row in tensors:
        if row.experts and row.experts.unreached:
            out.print(f"no token reached of {shown(row.name)}: {_experts(row.experts)}", soft_wrap=True)
    for name in unreached(file):
        out.print(f"no token reached {shown(name)}", soft_wrap=True)
    for name in file.unused:
        out.print(f"not used: {shown(name)}", soft_wrap=True)
    for key, text in file.notes.items():
        out.print(f"{shown(key)[1:-1]}: {shown(text)[1:-1]}", soft_wrap=True)
    out.print(f"datasets: {', '.join(map(shown, file.datasets)) or 'not said'}", soft_wrap=True)
    chunks = "a number of chunks not said" if file.chunks is None else f"{file.chunks} chunks"
    size = "" if file.chunk_size is None else f" of {file.chunk_size} tokens"
    out.print(f"{len(file)} weights, from {chunks}{size}")


def _tensor_table(tensors: Sequence[TensorFigures], counted: str) -> Table:
    table = _table(
        "layer", "tensor", "sum(Act²)", "min", "max", "mean", "sigma", "% active", "N", "entropy", "% of log2 N",
        "% z > 1", "cosine", counted, "experts: min / median / max", "never",
    )  # fmt: skip
    for row in tensors:
        table.add_row(
            "-" if row.layer is None else str(row.layer), shown(row.kind)[1:-1],
            f"{row.total:.2f}", f"{row.smallest:.4f}", f"{row.largest:.4f}", f"{row.mean:.2f}", f"{row.sigma:.2f}",
            f"{row.active:.2%}", f"{row.count}", f"{row.entropy:.4f}", f"{row.normalized_entropy:.2%}",
            f"{row.z_above_one:.2%}", _cosine(row.cosine), f"{row.tokens}", *_spread(row.experts),
        )  # fmt: skip
    return table


def _layer_table(layers: Sequence[LayerFigures]) -> Table:
    table = _table("layer", "mean sum(Act²)", "mean % z > 1", "mean cosine")
    for row in layers:
        table.add_row(str(row.layer), f"{row.total:.2f}", f"{row.z_above_one:.4%}", _cosine(row.cosine))
    return table


def _spread(experts: ExpertTokens | None) -> tuple[str, str]:
    if experts is None:
        return "", ""
    spread = f"{experts.smallest} / {experts.median:g} / {experts.largest}"
    return spread, f"{len(experts.unreached)} of {experts.experts}"


def _experts(experts: ExpertTokens) -> str:
    listed = ", ".join(map(str, experts.unreached[:LISTED]))
    return f"experts {listed}" + (", ..." if len(experts.unreached) > LISTED else "")


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column == "tensor" else "right", overflow="fold")
    return table
