"""Every number format against ggml's own quantizer: weights per second, and the error llama.cpp minimises.

    python tools/bench_grids.py
    python tools/bench_grids.py --formats Q4_K Q6_K --rows 16 --markdown
    python tools/bench_grids.py --optimum --rows 8

Both sides run on one thread, in turns; times are medians of five, of that thread. Cases are normal weights,
Student-t weights of 4 degrees, and the matrices of a small trained model, each with and without importance.
Speed is given for each case, error as our weighted squared error over ggml's (tests/objectives.py): of the
one matrix, or the mean and the worst of many. A format passes where the least of its speeds and the
worst of its errors meet the bars. Where the speed does not, weights that no cache holds are quantized in turns
with a pass that only reads them and writes as many bytes: the verdict says what memory allows, and a
format whose bar is "or memory bandwidth" passes from 80 % of that. `--optimum` tells, for grids without a
base, what error no search can go below (tests/optimum.py). ggml is the one in the xllamacpp wheel (tests/llama_cpp.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from measure import machine
from memory_pass import WEIGHTS, touch

from llmcompress.grids import GRIDS, find_grid
from llmcompress.grids.effort import EFFORTS
from llmcompress.grids.floats import to_float32
from llmcompress.grids.grid import Grid
from llmcompress.safetensors_header import read_header

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llama_cpp import Ggml  # noqa: E402
from objectives import NEEDS_IMPORTANCE, error_weights, weighted_error  # noqa: E402
from optimum import least_errors  # noqa: E402

SAMPLE = ROOT / "examples/sample-llama-6m/model.safetensors"
COLUMNS = 4096
REPEATS = 5
LEAST_SECONDS = 0.01  # shorter runs are repeated within one measurement
NEAR_MEMORY = 0.8  # of the speed of reading and writing alone
OR_MEMORY = ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "F16", "BF16")
BARS = {  # throughput and error against ggml's
    **dict.fromkeys(["Q4_K", "Q5_K", "Q2_K", "Q4_1", "Q5_1", "IQ4_NL", "IQ4_XS"], (20, 1.0)),
    **dict.fromkeys(["Q3_K", "Q4_0"], (8, 0.97)),
    **dict.fromkeys(["Q6_K", "Q5_0"], (8, 1.0)),
    **dict.fromkeys(["IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"], (10, 1.0)),
    **dict.fromkeys(OR_MEMORY, (3, 1.0)),
}


# Weights under one scale, and the codes. The scales of Q3_K are free here, which bounds what its grid can do.
WITHOUT_BASE = {"Q4_0": (32, -8, 7), "Q5_0": (32, -16, 15), "Q3_K": (16, -4, 3)}


@dataclass(frozen=True)
class Case:
    """Matrices that are quantized one after the other, float32 `(rows, columns)` each."""

    name: str
    matrices: list[np.ndarray]


@dataclass(frozen=True)
class Result:
    """`speed` in weights per second, ours; `ratio` that over ggml's; `errors` ours over ggml's, by matrix."""

    case: str
    speed: float
    ratio: float
    errors: list[float]
    same_bytes: bool


def cases(rows: int) -> list[Case]:
    rng = np.random.default_rng(0)
    made = {
        "normal": rng.standard_normal((rows, COLUMNS)),
        "Student t": rng.standard_t(4, (rows, COLUMNS)),
    }
    synthetic = [Case(name, [matrix.astype(np.float32)]) for name, matrix in made.items()]
    return [*synthetic, Case("sample model", sample_matrices(rows))] if SAMPLE.exists() else synthetic


def sample_matrices(rows: int) -> list[np.ndarray]:
    """`rows` rows of each matrix of the sample model, evenly spread."""
    data, matrices = np.memmap(SAMPLE, np.uint8, "r"), []
    for tensor in read_header(SAMPLE).tensors.values():
        if len(tensor.shape) == 2:
            raw = data[tensor.offset : tensor.offset + tensor.nbytes].view(np.uint16).reshape(tensor.shape)
            chosen = np.linspace(0, len(raw) - 1, min(rows, len(raw))).astype(int)
            matrices.append(to_float32(np.ascontiguousarray(raw[chosen]), tensor.dtype))
    return matrices


def importance_of(matrix: np.ndarray) -> np.ndarray:
    """As uneven as an imatrix: log-normal."""
    return np.random.default_rng(1).lognormal(0, 1, matrix.shape[1]).astype(np.float32)


def stacked(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Those of equal width in one, so that small ones do not measure the call; rows are quantized alone."""
    widths = sorted({matrix.shape[1] for matrix in matrices})
    return [np.concatenate([matrix for matrix in matrices if matrix.shape[1] == width]) for width in widths]


def seconds(work: Callable[[], object]) -> float:
    """Of CPU time for one call, repeated until the clock is fine enough; others may use the machine too."""
    started, count = time.thread_time(), 0
    while count == 0 or time.thread_time() - started < LEAST_SECONDS:
        work()
        count += 1
    return (time.thread_time() - started) / count


def compare(grid: Grid, ggml: Ggml, case: Case, with_importance: bool, effort: str) -> Result:
    vectors = {x.shape[1]: importance_of(x) if with_importance else None for x in case.matrices}
    ggmls = vectors
    if not with_importance and grid.name in NEEDS_IMPORTANCE:
        ggmls = {columns: np.ones(columns, np.float32) for columns in vectors}

    def ours(x: np.ndarray) -> np.ndarray:
        return grid.quantize(x, vectors[x.shape[1]], effort)

    def theirs(x: np.ndarray) -> np.ndarray:
        return ggml.quantize(x, grid.ggml_type, ggmls[x.shape[1]])

    errors, same = [], True  # kernels are compiled on the way, and ggml's tables made
    for x in case.matrices:
        pair, vector = (ours(x), theirs(x)), vectors[x.shape[1]]
        our, their = (weighted_error(grid.name, x, grid.dequantize(data), vector) for data in pair)
        errors.append(our / their if their else 1.0 if our == 0 else np.inf)
        same = same and np.array_equal(*pair)
    timed = stacked(case.matrices)
    times = [
        tuple(seconds(lambda: list(map(side, timed))) for side in (ours, theirs)) for _ in range(REPEATS)
    ]
    our_time, their_time = (median(column) for column in zip(*times))
    weights = sum(matrix.size for matrix in case.matrices)
    return Result(case.name, weights / our_time, their_time / our_time, errors, same)


def of_memory(grid: Grid, with_importance: bool, effort: str) -> tuple[float, float]:
    """Weights per second that memory allows, and our share of it."""
    weights = np.random.default_rng(0).standard_normal((WEIGHTS // COLUMNS, COLUMNS), np.float32)
    out = np.empty((len(weights), grid.row_bytes(COLUMNS)), np.uint8)
    vector = importance_of(weights) if with_importance else None
    kernel = grid.kernels_by_effort.get(effort, grid.kernel_quantize)

    def passing() -> None:
        touch(weights.reshape(-1), out.reshape(-1))

    def quantizing() -> None:
        kernel(weights, vector, out)

    passing(), quantizing()
    times = [(seconds(passing), seconds(quantizing)) for _ in range(REPEATS)]
    bound, ours = (median(column) for column in zip(*times))
    return WEIGHTS / bound, bound / ours


def verdict(name: str, results: list[Result], memory: Callable[[], tuple[float, float]]) -> str:
    """`memory` as `of_memory` has it; called where a speed bar is missed."""
    speed_bar, error_bar = BARS[name]
    missed, near = [], ""
    if min(result.ratio for result in results) < speed_bar:
        bound, share = memory()
        if name in OR_MEMORY and share >= NEAR_MEMORY:
            near = f" ({share:.0%} of memory)"
        else:
            allowed = min(bound * result.ratio / result.speed for result in results)
            missed.append(f"speed (memory allows {allowed:.1f}x, {share:.0%} of that reached from memory)")
    if max(max(result.errors) for result in results) > error_bar:
        missed.append("error")
    return "missed: " + ", ".join(missed) if missed else "met" + near


def shown_error(result: Result) -> str:
    worst = f"{max(result.errors):.4f}"
    if result.same_bytes:
        return "same bytes"
    return worst if len(result.errors) == 1 else f"{mean(result.errors):.4f}, worst {worst}"


def cells(name: str, weighing: str, results: list[Result], verdict: str) -> list[str]:
    speed_bar, error_bar = BARS[name]
    speed = f"{min(result.speed for result in results) / 1e6:.0f}"
    ratios = " / ".join(f"{result.ratio:.1f}" for result in results)
    shown = [shown_error(result) for result in results]
    bars = f">= {speed_bar}x, <= {error_bar:.3g}"
    return [name, weighing, speed, ratios, *shown, bars, verdict]


def print_row(columns: list[str], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(columns) + " |", flush=True)
    else:
        widths = [8, 11, 6, 20, 11, 11, *[22] * (len(columns) - 8), 16, 8]
        print(" ".join(text.ljust(width) for text, width in zip(columns, widths)).rstrip(), flush=True)


def print_optimum(ggml: Ggml, chosen: list[Case], effort: str) -> None:
    """The least error there is with importance, and ours, over ggml's: mean and range over matrices."""
    for name, (size, low, high) in WITHOUT_BASE.items():
        grid = find_grid(name)
        for case in chosen:
            least, found = [], []
            for x in case.matrices:
                vector = importance_of(x)
                weights = error_weights(name, x, vector).reshape(-1, size)
                ours, theirs = grid.quantize(x, vector, effort), ggml.quantize(x, grid.ggml_type, vector)
                our, their = (
                    weighted_error(name, x, grid.dequantize(data), vector) for data in (ours, theirs)
                )
                least.append(least_errors(x.reshape(-1, size), weights, low, high).sum() / their)
                found.append(our / their)
            shown = [f"{mean(part):.4f} ({min(part):.4f} to {max(part):.4f})" for part in (least, found)]
            print(f"{name:6} {case.name:14} least possible {shown[0]}, {effort} {shown[1]}", flush=True)


def main() -> None:
    arguments = parsed()
    ggml, chosen = Ggml(), cases(arguments.rows)
    if arguments.optimum:
        print_optimum(ggml, chosen, arguments.effort)
        return
    print(f"{machine()}; one thread each, medians of {REPEATS}\n")
    names = [case.name for case in chosen]
    speeds = "x ggml, by case" if arguments.markdown else "x ggml"
    header = ["format", "weighing", "M/s", speeds, *names, "bars", "verdict"]
    print_row(header, arguments.markdown)
    if arguments.markdown:
        print_row(["---"] * len(header), markdown=True)
    for name in arguments.formats:
        for weighing in ("plain", "importance"):
            given = weighing == "importance"
            grid, effort = find_grid(name), arguments.effort
            results = [compare(grid, ggml, case, given, effort) for case in chosen]
            judged = verdict(grid.name, results, lambda: of_memory(grid, given, effort))
            print_row(cells(grid.name, weighing, results, judged), arguments.markdown)


def parsed() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    known = [name for name in GRIDS if name in BARS]
    parser.add_argument("--formats", nargs="+", default=known, metavar="NAME", help="by default all")
    parser.add_argument("--rows", type=int, default=64, help="rows of each matrix (64)")
    parser.add_argument("--effort", choices=EFFORTS, default="normal", help="of our search")
    parser.add_argument(
        "--optimum", action="store_true", help="only: how far below ggml's error any search can go"
    )
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    return parser.parse_args()


if __name__ == "__main__":
    main()
