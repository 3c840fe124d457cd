"""GPTQ and target sizes: how close what we make stays to its model, beside peers, and the time of a solve.

    python tools/bench_gptq.py --third DIR
    python tools/bench_gptq.py --parts grids --types Q3_K --models examples/sample-llama-6m
    python tools/bench_gptq.py --parts time --size 2048

Models are the two samples and a Gemma 3 that tools/train_model.py trains into DIR where it is not there yet, which
takes up to 45 minutes. All figures are mean KL divergences on held-out text, by `evaluate`, in nats a token.

grids: of files in which every matrix of the blocks has one type and all else is F32. One is by `quantize --method
    gptq`; its peer has the same tensors, each quantized by ggml (the one in the xllamacpp wheel, tests/llama_cpp.py)
    with the importance of the same tokens; a third is our rounding to nearest. Files are of one size to the byte.
sequential: of such files, each block calibrated on what the quantized ones before it put out, beside the one pass over
    the same tokens.
target: of a K-mix with importance, by us and by ggml, and of `--target-size` at that file's size, rounded to nearest
    and by gptq.
checkpoint: of GPTQ checkpoints of 4 bits in groups of 128, by gptq, by nearest rounding with the same search for
    scales, and by auto-gptq 0.7.1 (tests/auto_gptq_peer.py) on the same tokens, all read by tests/gptq_decoder.py.
time: of a square matrix, statistics given, on one core: factor and solve, beside column loops in torch that have the
    same scales for nothing but the fit. One of them changes all columns that follow at once, the other, as
    auto-gptq's, 128 at a time and the rest by a matrix product.

Prints the rows of each part, with bars and whether they are met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model, rows_of
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.to_gguf import measure_gguf
from measure import machine

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.filetypes import FLOATS
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import find_grid
from llmcompress.grids.code_bits import lattice_of
from llmcompress.grids.grid import Grid
from llmcompress.grids.integer import integer_grid
from llmcompress.hessians import HessianFolder
from llmcompress.methods import gptq
from llmcompress.methods.solver import DAMPING, Solver
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import auto_gptq_peer  # noqa: E402
from gptq_decoder import write_dequantized  # noqa: E402
from llama_cpp import Ggml  # noqa: E402

SHARED = ROOT.parent / "shared"
MODELS = [ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m"]
PARTS = ("grids", "sequential", "target", "checkpoint", "time")
CORPUS = SHARED / "corpora" / "sample-heldout"
TOKENS, HELD_OUT = 2**15, 12288
FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # others are called as their grid
TYPES = ["Q4_K", "Q5_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K"]
MIXES = ["Q3_K_M", "Q4_K_M"]
SEQUENTIAL = ["Q3_K"]
BARS = {  # of sample-llama-6m and of other models
    **dict.fromkeys(["Q4_K", "Q5_K", "IQ4_XS"], (0.40, 0.65)),
    **dict.fromkeys(["Q3_K", "IQ3_S", "IQ3_XXS"], (0.40, 0.60)),
    "Q2_K": (0.50, 0.65),
    "target, nearest": (0.75, 0.80),
    "target, gptq": (0.33, 0.50),
    "checkpoint": (0.32, 0.60),
    "auto-gptq": (1.00, 1.00),
}
FASTER = 10
INTEGERS = {"INT4": integer_grid(4, 128, True)}  # of GPTQ checkpoints, in groups of 128
PEER_BLOCK = 128  # columns


class Subject:
    """A model with its XᵀX of TOKENS tokens, and a folder to work in."""

    def __init__(self, model: Path, calibration: Path, held_out: Path, work: Path) -> None:
        self.model, self.held_out, self.work = model, held_out, work
        self.is_first = model.name == MODELS[0].name
        self.options = CalibrationOptions(data=(str(calibration),), tokens=TOKENS)
        self.hessian, self.imatrix = work / "hessian", work / "imatrix.gguf"
        calibrate_model(model, self.imatrix, self.options, Progress(), self.hessian)

    def kl(self, artefact: Path) -> float:
        """Mean divergence of a GGUF or a plain checkpoint."""
        options = EvaluationOptions(data=(str(self.held_out),), tokens=HELD_OUT)
        report = evaluate_model(str(artefact), str(self.model), options, Progress())
        return report.as_dict()["figures"]["mean_kl"]["value"]

    def made(self, name: str, **options) -> tuple[Path, object]:
        """A file or folder of the name. A checkpoint is by gptq, or to nearest where the options name an imatrix."""
        out = self.work / name
        source = {} if {"imatrix", "calibrate"} & options.keys() else {"hessian": str(self.hessian)}
        return out, llmcompress.quantize(self.model, out, **source, **options)

    def row(self, what: str, bar: str, ours: float, peer: float, note: str = "") -> None:
        """Print one comparison."""
        most = BARS[bar][not self.is_first] if bar in BARS else None
        verdict = "|" if most is None else f"{most:.2f} | {'met' if ours / peer <= most else 'MISSED'}"
        print(
            f"| {self.model.name} | {what} | {ours:.6f} | {peer:.6f} | {ours / peer:.3f} | {verdict}{note} |",
            flush=True,
        )


def grids(subject: Subject, types: list[str]) -> None:
    """Print a row for each type."""
    for name in types:
        kl = {}
        for method in ("nearest", "gptq"):
            out, made = subject.made(f"{method}.gguf", method=method, **of_one_type(name))
            kl[method] = subject.kl(out)
        used = {tensor.method for tensor in made.outputs[0].tensors if tensor.type == name}
        peer = by_ggml(out, subject)
        note = "" if used == {"gptq"} else f", by {' and '.join(sorted(used))}"
        subject.row(f"{name} gptq / ggml (nearest: {kl['nearest']:.6f})", name, kl["gptq"], peer, note)


def of_one_type(name: str) -> dict[str, object]:
    kept = {"token_embedding_type": "F32", "output_tensor_type": "F32"}
    return {"type": FILE_TYPES.get(name, name), "pure": True, **kept}


def sequential(subject: Subject, types: list[str]) -> None:
    """Print a row for each type."""
    calibrated = {"calibrate": True, "data": list(subject.options.data), "tokens": TOKENS}
    for name in types:
        one, _ = subject.made("one.gguf", method="gptq", **of_one_type(name))
        many, _ = subject.made(
            "sequential.gguf", method="gptq", sequential=True, **calibrated, **of_one_type(name)
        )
        subject.row(f"{name} gptq, sequential / one pass", "", subject.kl(many), subject.kl(one))


def targets(subject: Subject, mixes: list[str]) -> None:
    """Print two rows for each mix."""
    for method in ("nearest", "gptq"):
        recipe = Recipe(hessian=str(subject.hessian), method=method, data=subject.options.data)
        measure_gguf(subject.model, recipe).save(subject.work / f"{method}.json")
    for name in mixes:
        mix, _ = subject.made("mix.gguf", type=name)
        nearest, peer = subject.kl(mix), by_ggml(mix, subject)
        for method, beside, kl in (("nearest", "the mix by us", nearest), ("gptq", "the mix by ggml", peer)):
            out, _ = subject.made(
                "target.gguf", target_size=mix.stat().st_size, method=method,
                sensitivity=str(subject.work / f"{method}.json"),
            )  # fmt: skip
            assert out.stat().st_size <= mix.stat().st_size
            what = f"target of {name}'s size, {method} / {beside}"
            subject.row(what, f"target, {method}", subject.kl(out), kl)
            out.unlink()


def checkpoints(subject: Subject) -> None:
    """Print a row for each peer, and each of them in the order of importance."""
    with Checkpoint.open(subject.model) as checkpoint:
        rows = subject.work / "rows.json"
        rows.write_text(json.dumps([row.tolist() for row in rows_of(checkpoint, subject.options).rows]))

    def kl(name: str, **options) -> float:
        out = subject.work / name
        if name.startswith("auto-gptq"):
            config = out.with_suffix(".json")
            config.write_text(json.dumps({"bits": 4, "group_size": 128} | options))
            auto_gptq_peer.run("quantize", subject.model, out, rows, config)
        else:
            subject.made(name, format="gptq", bits=4, group_size=128, **options)
        plain = subject.work / f"{name}-plain"
        write_dequantized(out, subject.model, plain)
        return subject.kl(plain)

    nearest = kl("nearest", imatrix=str(subject.imatrix))
    for order, desc_act in (("", False), (", desc_act", True)):
        ours = kl(f"ours{order}", method="gptq", desc_act=desc_act)
        subject.row(f"4 bits, groups of 128{order}: gptq / nearest", "checkpoint", ours, nearest)
        if why := auto_gptq_peer.missing():
            print(f"not beside auto-gptq: {why}", flush=True)
            continue
        theirs = kl(f"auto-gptq{order}", desc_act=desc_act)
        subject.row(f"4 bits, groups of 128{order}: gptq / auto-gptq", "auto-gptq", ours, theirs)


def by_ggml(path: Path, subject: Subject) -> float:
    """The divergence of the file `path` with ggml's bytes in place of ours, in all types that lose something."""
    changed, plain, ggml = subject.work / "ggml.gguf", subject.work / "f32.gguf", Ggml()
    shutil.copy(path, changed)
    if not plain.exists():
        llmcompress.quantize(subject.model, plain, type="F32")
    hessian = HessianFolder(subject.hessian)
    with (
        GGUFFile.open(plain) as source,
        GGUFFile.open(changed) as target,
        open(changed, "r+b") as file,
    ):
        for name, tensor in target.tensors.items():
            if tensor.type.name in FLOATS:
                continue
            weights = source.read(name).view(np.float32)
            known = name in hessian.entries  # embeddings that are no head have no inputs
            importance = hessian.weights(name, 1, weights.shape[1])[0] if known else None
            data = ggml.quantize(weights, find_grid(tensor.type.name).ggml_type, importance)
            assert data.nbytes == tensor.nbytes
            file.seek(tensor.offset)
            file.write(data.tobytes())
    return subject.kl(changed)


def plain_loop(weights: np.ndarray, grid: Grid, products: np.ndarray, block: int) -> torch.Tensor:
    """GPTQ as its authors wrote it, in torch, column by column; returns the rounded weights.

    `block` columns hear of an error at once, the rest by a matrix product. Scales come from the grid's own kernel.
    """
    hessian = torch.from_numpy(products.copy())
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
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
        grid = INTEGERS[name] if name in INTEGERS else find_grid(name)
        nearest = error_of(weights, grid.dequantize(grid.quantize(weights, products.diagonal())), products)

        def ours(effort: str, grid: Grid = grid) -> np.ndarray:
            return grid.dequantize(gptq.quantize(weights, grid, Solver.of(products), effort))

        def plain(block: int, grid: Grid = grid) -> np.ndarray:
            return plain_loop(weights, grid, products, block).numpy()

        ways: dict[str, Callable[[], np.ndarray]] = {
            "plain loop in torch": lambda: plain(size),
            f"loop in torch, blocks of {PEER_BLOCK}": lambda: plain(PEER_BLOCK),
            "ours, factor alone": lambda: Solver.of(products).factor,
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", type=Path, default=MODELS)
    parser.add_argument(
        "--third", type=Path, metavar="DIR", help="one more; trained into DIR if nothing is there"
    )
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help="for grids")
    parser.add_argument("--mixes", nargs="+", default=MIXES, metavar="TYPE", help="for target")
    parser.add_argument("--calibration", type=Path, default=CORPUS / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=CORPUS / "heldout.txt")
    parser.add_argument("--size", type=int, default=2048, help="rows and columns, for time")
    parser.add_argument("--time-types", nargs="+", default=["INT4", "Q4_K"], metavar="TYPE")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the median is taken")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    print(f"{machine()}\n")
    if given.third:
        if not given.third.exists():
            subprocess.run([sys.executable, ROOT / "tools" / "train_model.py", given.third], check=True)
        given.models = [*given.models, given.third]
    if set(given.parts) - {"time"}:
        print(
            "| model | what | KL | KL of the peer | ratio | bar | |\n|---|---|---:|---:|---:|---:|---|",
            flush=True,
        )
        for model in given.models:
            with tempfile.TemporaryDirectory(prefix="bench-gptq-") as work:
                subject = Subject(model, given.calibration, given.held_out, Path(work))
                if "grids" in given.parts:
                    grids(subject, given.types)
                if "sequential" in given.parts:
                    sequential(subject, [name for name in SEQUENTIAL if name in given.types])
                if "target" in given.parts:
                    targets(subject, given.mixes)
                if "checkpoint" in given.parts:
                    checkpoints(subject)
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
