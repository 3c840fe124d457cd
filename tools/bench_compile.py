"""Seconds until the kernels of a file type are ready: compiled on a machine that has none, and read from its disk.

    python tools/bench_compile.py --types Q4_K_M IQ3_XXS --repeat 3

Each figure is of a process of its own, with an empty cache, then with what the first left there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MODEL = Path(__file__).parent.parent / "examples/sample-llama-6m"
TYPES = ["Q4_0", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ3_XS", "IQ3_M",
         "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "TQ1_0", "MXFP4_MOE"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help="names of llama-quantize")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the median counts")
    parser.add_argument("--inside", nargs=2, metavar=("TYPE", "IMATRIX"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return prepare(*given.inside)
    print("| file type | number formats | compiled, s | from the disk, s |\n|---|---|---:|---:|")
    for name in given.types:
        runs = [measure(name) for _ in range(given.repeat)]
        cold, warm = (statistics.median(times) for times in zip(*(times for _, times in runs)))
        print(f"| {name} | {runs[0][0]} | {cold:.1f} | {warm:.2f} |", flush=True)


def measure(name: str) -> tuple[str, tuple[float, float]]:
    """The formats of a file type, and the seconds without and with kernels on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--inside", name, str(Path(folder) / "flat.gguf")]
        reports = [json.loads(subprocess.check_output(command, env=environment)) for _ in range(2)]
    return reports[0]["formats"], (reports[0]["seconds"], reports[1]["seconds"])


def prepare(name: str, imatrix: str) -> None:
    """Make the kernels ready, as the first lines of a job do, and print how long that took."""
    from llmcompress.converters.to_gguf import plan_gguf

    from llmcompress.grids.compiling import prepare_kernels
    from llmcompress.plan import Plan
    from llmcompress.recipe import parse_recipe
    from llmcompress.run import kernel_uses

    def planned(**options: str) -> Plan:
        return plan_gguf(MODEL, imatrix + ".out", parse_recipe(options))

    write_flat_importance(planned(types="F32"), imatrix)
    plan = planned(types=name, imatrix=imatrix)
    uses = kernel_uses(plan)
    started = time.monotonic()
    prepare_kernels(uses, plan.recipe.effort, lambda line: None)
    seconds = time.monotonic() - started
    print(json.dumps({"formats": " ".join(sorted({grid.name for grid, _ in uses})), "seconds": seconds}))


def write_flat_importance(plan, path: str) -> None:
    """An importance matrix of ones, without which some types are refused."""
    from llmcompress.stats import Statistics, TensorStats

    entries = {step.name: TensorStats.zeros(1, step.columns) for step in plan.steps}
    for entry in entries.values():
        entry.add(0, 1, np.ones(entry.squares.shape[1]))
    Statistics(entries, datasets=(), chunks=1, chunk_size=1, notes={}).save(path)


if __name__ == "__main__":
    main()
