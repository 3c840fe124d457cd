"""GPTQ on the grids of GGUF: how close a file stays to its model beside ggml's own quantizer, and the time of a solve.

    python tools/bench_gptq.py
    python tools/bench_gptq.py --parts kl --types Q3_K --models examples/sample-llama-6m
    python tools/bench_gptq.py --parts time --size 2048

kl: mean KL divergence on held-out text, by `evaluate`, of files in which every matrix of the blocks has one type
    and all else is F32. One is by `quantize --method gptq`; its peer has the same tensors, each quantized by ggml (the
    one in the xllamacpp wheel, tests/llama_cpp.py) with the importance of the same tokens; a third is our rounding to
    nearest. Files are of one size to the byte.
time: of a square matrix, statistics given, on one core: factor and solve, beside column loops in torch that have the
    same scales for nothing but the fit. One of them changes all columns that follow at once, the other, as
    auto-gptq's, 128 at a time and the rest by a matrix product.

Prints the rows of each part, with bars and whether they are met.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from measure import machine

import llmcompress
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import find_grid
from llmcompress.grids.code_bits import lattice_of
from llmcompress.grids.grid import Grid
from llmcompress.hessians import HessianFolder
from llmcompress.methods import gptq
from llmcompress.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llama_cpp import Ggml  # noqa: E402

SHARED = ROOT.parent / "shared"
MODELS = [ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m"]
CORPUS = SHARED / "corpora" / "sample-heldout"
TOKENS, HELD_OUT = 2**15, 12288
FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # others are called as their grid
TYPES = ["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K"]
BARS = {  # KL over the peer's, of sample-llama-6m and of other models
    **dict.fromkeys(["Q4_K", "Q5_K", "IQ4_XS"], (0.40, 0.65)),
    **dict.fromkeys(["Q3_K", "IQ3_S", "IQ3_XXS"], (0.40, 0.60)),
    "Q2_K": (0.50, 0.65),
}
FASTER = 10
PEER_BLOCK = 128  # columns


def divergences(model: Path, types: list[str], calibration: Path, held_out: Path, work: Path) -> None:
    """Print a row for each type."""
    hessian = work / "hessian"
    options = CalibrationOptions(data=(str(calibration),), tokens=TOKENS)
    calibrate_model(model, work / "imatrix.gguf", options, Progress(), hessian)
    for name in types:
        kl = {}
        for method in ("nearest", "gptq"):
            out = work / f"{method}.gguf"
            made = llmcompress.quantize(
                model, out, type=FILE_TYPES.get(name, name), pure=True, method=method, hessian=str(hessian),
                token_embedding_type="F32", output_tensor_type="F32",
            )  # fmt: skip
            kl[method] = mean_kl(out, model, held_out)
        used = {tensor.method for tensor in made.outputs[0].tensors if tensor.type == name}
        shutil.copy(work / "gptq.gguf", work / "ggml.gguf")
        quantize_by_ggml(work / "ggml.gguf", model, name, HessianFolder(hessian), work)
        kl["ggml"] = mean_kl(work / "ggml.gguf", model, held_out)
        ratio = kl["gptq"] / kl["ggml"]
        bar = BARS[name][model.name != MODELS[0].name] if name in BARS else None
        verdict = "" if bar is None else f"{bar:.2f} | {'met' if ratio <= bar else 'MISSED'}"
        print(
            f"| {model.name} | {name} | {kl['ggml']:.6f} | {kl['nearest']:.6f} | {kl['gptq']:.6f} | {ratio:.3f} | "
            f"{verdict if used == {'gptq'} else f'{bar}, not by gptq'} |",
            flush=True,
        )


def quantize_by_ggml(path: Path, model: Path, type: str, hessian: HessianFolder, work: Path) -> None:
    """Put ggml's bytes into the tensors of `type` of a GGUF file."""
    grid, ggml, plain = find_grid(type), Ggml(), work / "f32.gguf"
    if not plain.exists():
        llmcompress.quantize(model, plain, type="F32")
    with GGUFFile.open(plain) as source, GGUFFile.open(path) as target, open(path, "r+b") as file:
        for name, tensor in target.tensors.items():
            if tensor.type.name != type:
                continue
            weights = source.read(name).view(np.float32)
            importance = hessian.weights(name, 1, weights.shape[1])[0]
            data = ggml.quantize(weights, grid.ggml_type, importance)
            assert data.nbytes == tensor.nbytes
            file.seek(tensor.offset)
            file.write(data.tobytes())


def mean_kl(artefact: Path, model: Path, held_out: Path) -> float:
    options = EvaluationOptions(data=(str(held_out),), tokens=HELD_OUT)
    report = evaluate_model(str(artefact), str(model), options, Progress())
    return report.as_dict()["figures"]["mean_kl"]["value"]


def plain_loop(weights: np.ndarray, grid: Grid, products: np.ndarray, block: int) -> torch.Tensor:
    """GPTQ as its authors wrote it, in torch, column by column; returns the rounded weights.

    `block` columns hear of an error at once, the rest by a matrix product. Scales come from the grid's own kernel.
    """
    hessian = torch.from_numpy(products.copy())
    hessian.diagonal().add_(gptq.DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    importance = np.ascontiguousarray(products.diagonal())
    left, rounded = torch.from_numpy(weights.copy()), torch.empty(weights.shape)
    columns, last = weights.shape[1], 2**4 - 1
    for first in range(0, columns, block):
        end = min(first + block, columns)
        errors = torch.empty(len(weights), end - first)
        for j in range(first, end):
            if j % grid.block == 0:
                span = slice(j, j + grid.block)
                data = grid.quantize(left[:, span].numpy(), importance[span])
                scale, offset = map(torch.from_numpy, lattice_of(grid, data))
            at = j % grid.block
            column, step, base = left[:, j], scale[:, at], offset[:, at]
            code = torch.clamp(torch.round((column - base) / step), 0, last)
            rounded[:, j] = base + step * code
            error = (column - rounded[:, j]) / factor[j, j]
            left[:, j:end] -= torch.outer(error, factor[j, j:end])
            errors[:, j - first] = error
        left[:, end:] -= errors @ factor[first:end, end:]
    return rounded


def solve_times(size: int, types: list[str], repeat: int) -> None:
    """Print a row for each type and way."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_t(5, (size, size)) * 0.02).astype(np.float32)
    inputs = rng.standard_normal((4 * size, size)).astype(np.float32) @ rng.standard_normal(
        (size, size)
    ).astype(np.float32)
    inputs *= np.exp(rng.standard_normal(size)).astype(np.float32)
    products = inputs.T @ inputs
    for name in types:
        grid = find_grid(name)
        nearest = error_of(weights, grid.dequantize(grid.quantize(weights, products.diagonal())), products)

        def ours(effort: str, grid: Grid = grid) -> np.ndarray:
            return grid.dequantize(gptq.quantize(weights, grid, gptq.Solver.of(products), effort))

        def plain(block: int, grid: Grid = grid) -> np.ndarray:
            return plain_loop(weights, grid, products, block).numpy()

        ways: dict[str, Callable[[], np.ndarray]] = {
            "plain loop in torch": lambda: plain(size),
            f"loop in torch, blocks of {PEER_BLOCK}": lambda: plain(PEER_BLOCK),
            "ours, factor alone": lambda: gptq.Solver.of(products).factor,
            "ours, effort fast": lambda: ours("fast"),
            "ours, effort normal": lambda: ours("normal"),
        }
        base = None
        for way, run in ways.items():
            seconds, found = timed(run, 1 if base is None else repeat)
            base = base or seconds
            error = f"{error_of(weights, found, products) / nearest:.3f}" if "alone" not in way else ""
            verdict = (
                (f"{FASTER} | {'met' if base / seconds >= FASTER else 'MISSED'}") if "normal" in way else "|"
            )
            print(
                f"| {name} | {way} | {seconds:.2f} | {base / seconds:.1f} | {error} | {verdict} |", flush=True
            )


def timed(run: Callable[[], np.ndarray], repeat: int) -> tuple[float, np.ndarray]:
    """The median of some runs after the first, which compiles."""
    found, seconds = run(), []
    for _ in range(repeat):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return median(seconds), found


def error_of(weights: np.ndarray, rounded: np.ndarray, products: np.ndarray) -> float:
    errors = weights - rounded
    return float(np.einsum("ri,ri->", errors @ products, errors, dtype=np.float64))


def arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--parts", nargs="+", choices=("kl", "time"), default=["kl", "time"])
    parser.add_argument("--models", nargs="+", type=Path, default=MODELS)
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help="for kl")
    parser.add_argument("--calibration", type=Path, default=CORPUS / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=CORPUS / "heldout.txt")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns, for time")
    parser.add_argument("--time-types", nargs="+", default=["Q4_K"], metavar="TYPE")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the median is taken")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    print(f"{machine()}\n")
    if "kl" in given.parts:
        print("| model | type | KL by ggml | KL nearest | KL gptq | gptq / ggml | bar | |")
        print("|---|---|---:|---:|---:|---:|---:|---|", flush=True)
        for model in given.models:
            with tempfile.TemporaryDirectory(prefix="bench-gptq-") as work:
                divergences(model, given.types, given.calibration, given.held_out, Path(work))
    if "time" in given.parts:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        torch.set_num_threads(1)
        print(f"\n{given.size} x {given.size}, one core; error e H e over that of rounding to nearest\n")
        print(
            "| type | way | s | times as fast | error | bar | |\n|---|---|---:|---:|---:|---:|---|",
            flush=True,
        )
        solve_times(given.size, given.time_types, given.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
