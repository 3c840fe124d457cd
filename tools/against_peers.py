"""What benchmarks against llama.cpp's own tools share: how its programs are called, and the tables they fill."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Cost, measure

from llmcompress import __version__

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "examples" / "sample-llama-6m"
CHUNK = 512
WINDOWS = ["--windows", "llama.cpp", "--chunk", str(CHUNK)]
OURS = f"llmcompress {__version__}"
PROGRAM = [sys.executable, "-m", "llmcompress"]
MIB = 2**20


@dataclass
class Bench:
    """What all parts share, and the two tables they fill."""

    given: argparse.Namespace
    work: Path
    threads: int
    bars: list[str] = field(default_factory=list)
    peer_build: str = ""  # the processor features that llama.cpp says it was compiled for

    def llama(self, tool: str, model: Path, text: Path, *more: str | Path) -> list[str | Path]:
        program = self.given.llama_bin / f"llama-{tool}"
        return [program, "-m", model, "-f", text, "-c", str(CHUNK), "-t", str(self.threads), *more]

    def gguf(self, model: Path, type: str) -> Path:
        out = self.work / f"{model.name}-{type}.gguf"
        how = "convert" if type in ("F32", "F16", "BF16") else "quantize"
        if not out.exists():
            measure([*PROGRAM, how, model, "-o", out, "--type", type])
        return out

    def run(self, command: list[str | Path]) -> tuple[Cost, str]:
        """The cost of a command, and what it printed."""
        printed = self.work / "printed"
        cost = measure(command, printed=printed)
        return cost, printed.read_text(errors="replace")

    def row(self, name: str, cost: Cost, tokens: int = 0, busy: float = 0) -> None:
        """Print a line of the table of runs; `busy` seconds are those after the start, where they are known."""
        rates = f"{tokens / cost.seconds:,.0f} | {f'{tokens / busy:,.0f}' if busy else ''}" if tokens else "|"
        memory = f"{cost.peak / MIB:,.0f} | {cost.own / MIB:,.0f}"
        print(
            f"| {name} | {tokens or ''} | {cost.seconds:.1f} | {cost.cpu:.1f} | {rates} | {memory} |",
            flush=True,
        )

    def bar(self, what: str, measured: str, bar: str, met: bool | None) -> None:
        """Add a line to the table of bars; `met` is None where there is none."""
        verdict = {True: "met", False: "MISSED", None: ""}[met]
        self.bars.append(f"| {what} | {measured} | {bar} | {verdict} |")


def printed_json(printed: str) -> dict[str, Any]:
    """The last JSON object, written over several lines, in what a program printed."""
    lines = printed.splitlines()
    first = len(lines) - 1 - lines[::-1].index("{")
    return json.loads("\n".join(lines[first:]))


def synthetic(folder: Path, size: str, *more: str) -> Path:
    """A synthetic checkpoint, made by another process so that this one, which measures, stays small."""
    script = Path(__file__).with_name("synthetic.py")
    command = [sys.executable, script, folder, "--size", size, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
