"""What `llmcompress prune` does where layers, widths or experts go."""

from __future__ import annotations

import json
from typing import Any

import typer

from llmcompress.sizes import parse_count, parse_size


def make_smaller(given: dict[str, Any]) -> None:
    """--method layers, width, experts: `given` holds the command's options. Raises LlmcompressError."""
    from llmcompress import model_display
    from llmcompress.converters.structure import JOBS
    from llmcompress.structure_options import StructureOptions, parse_layers, parse_parts

    same = ("method", "drop", "ratio", "by", "chunk", "seed", "dtype", "batch_tokens", "device", "threads")
    options = StructureOptions(
        **{name: given[name] for name in same},
        **{name: given[name] and parse_size(given[name], f"--{name.replace('_', '-')}") for name in ("hidden_ram", "split_max_size")},
        tokens=given["tokens"] and parse_count(given["tokens"], "--tokens"),
        layers=parse_layers(given["layers"]) if given["layers"] else (),
        parts=parse_parts(given["parts"]),
        data=tuple(given["data"] or ("default",)),
    )  # fmt: skip
    progress = model_display.live_progress()
    try:
        report = JOBS[options.method](given["model"], given["out"], options, progress)
    finally:
        progress.close()
    if given["as_json"]:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        model_display.show_smaller(report)
