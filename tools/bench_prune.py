"""Pruning: what each way of taking weights away costs, beside the order that was published.

    python tools/bench_prune.py
    python tools/bench_prune.py --parts table --models examples/sample-llama-6m
    python tools/bench_prune.py --parts memory --memory-size 3b

table: perplexity on held-out text of the dense model and of what `prune` makes of it, by method, for half of the weights
    of every matrix, 4:8 and 2:4; the published perplexities of LLaMA-2-7B on wikitext2 beside them. Then the ways
    of dividing half of the weights up: over the whole model, by the rows' scores, by the blocks' outliers (OWL).
joint: mean KL divergence of a Q3_K file whose weights were pruned and rounded in one sweep, and of those that were pruned
    first and quantized after, on the same tokens.
memory: peak of pruning a large bf16 checkpoint by wanda, by sparsegpt's sweep alone (the rest would take two cores
    hours), by dropping layers and by width, above the interpreter with its libraries.

Prints the rows of each part, with bars and whether they are met.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from measure import machine, measure

import llmcompress
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import GRIDS
from llmcompress.progress import Progress
from llmcompress.sizes import format_size

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = [ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m"]
PARTS = ("table", "joint", "memory")
CORPUS = SHARED / "corpora" / "sample-heldout"
TOKENS, HELD_OUT = 2**15, 12288
MOST_MEMORY = 3 * 2**30  # of 3 billion weights in bf16, as for calibration
METHODS = ("magnitude", "wanda", "sparsegpt")
SHAPES = {"50 %": {"sparsity": 0.5}, "4:8": {"pattern": "4:8"}, "2:4": {"pattern": "2:4"}}
# LLaMA-2-7B, wikitext2, windows of 4096 tokens; the table of Wanda's own repository. Magnitude at 4:8 is not in it.
PUBLISHED = {
    "dense": {"": 5.12},
    "50 %": {"magnitude": 14.89, "wanda": 6.42, "sparsegpt": 6.51},
    "4:8": {"wanda": 7.97, "sparsegpt": 8.12},
    "2:4": {"magnitude": 54.59, "wanda": 11.02, "sparsegpt": 10.17},
}
DIVISIONS = {
    "magnitude, whole model": {"method": "magnitude", "whole_model": True},
    "wanda, by score": {"method": "wanda", "by_score": True},
    "wanda, OWL": {"method": "wanda", "allocate": "owl"},
    "sparsegpt, OWL": {"method": "sparsegpt", "allocate": "owl"},
}
IMPORTS = "import llmcompress.cli, llmcompress.model_display, llmcompress.converters.sequential, llmcompress.converters.pruning, llmcompress.methods.sparsegpt; from transformers import AutoTokenizer, LlamaForCausalLM"


class Subject:
    """A model, texts to calibrate on and to measure on, and a folder to work in."""

    def __init__(self, model: Path, calibration: Path, held_out: Path, work: Path) -> None:
        self.model, self.work = model, work
        self.given = {"data": str(calibration), "tokens": TOKENS}
        self.options = EvaluationOptions(data=(str(held_out),), tokens=HELD_OUT)

    def figure(self, artefact: Path, name: str, reference: Path | None = None) -> float:
        report = evaluate_model(str(artefact), reference and str(reference), self.options, Progress())
        return report.as_dict()["figures"][name]["value"]

    def pruned(self, name: str, **options) -> tuple[Path, float]:
        """The folder or file, and its achieved sparsity."""
        out = self.work / name
        shutil.rmtree(out, ignore_errors=True)
        given = self.given if options["method"] != "magnitude" else {}
        report = llmcompress.prune(self.model, out, **given, **options)
        return out, report.sparsity


def table(subject: Subject, methods: Sequence[str]) -> None:
    """Print a row for each shape and method, then the bars."""
    dense = subject.figure(subject.model, "perplexity")
    print(
        "| model | what goes | method | sparsity | perplexity | log less dense | s | LLaMA-2-7B |\n|---|---|---|---:|---:|---:|---:|---:|"
    )
    print(f"| {subject.model.name} | dense | | 0 | {dense:.3f} | | | {PUBLISHED['dense']['']} |", flush=True)
    lost: dict[tuple[str, str], float] = {}

    def row(shape: str, way: str, published: object = "", **options) -> None:
        started = time.perf_counter()
        folder, sparsity = subject.pruned("pruned", **options)
        seconds, found = time.perf_counter() - started, subject.figure(folder, "perplexity")
        lost[shape, way] = math.log(found / dense)
        print(
            f"| {subject.model.name} | {shape} | {way} | {sparsity:.2%} | {found:.3f} | {lost[shape, way]:.4f} | {seconds:.1f} | {published} |",
            flush=True,
        )

    for shape, options in SHAPES.items():
        for method in methods:
            row(shape, method, PUBLISHED[shape].get(method, ""), method=method, **options)
    for name, options in DIVISIONS.items() if set(methods) == set(METHODS) else ():
        row("50 %", name, sparsity=0.5, **options)
    if set(methods) != set(METHODS):
        return
    print("\n| model | bar | measured | bar | |\n|---|---|---:|---:|---|")
    for shape in ("50 %", "2:4"):
        bar(
            subject,
            f"{shape}: log-perplexity lost, wanda / magnitude",
            lost[shape, "wanda"] / lost[shape, "magnitude"],
            0.9,
        )
    bar(
        subject,
        "2:4: log-perplexity lost, sparsegpt / wanda",
        lost["2:4", "sparsegpt"] / lost["2:4", "wanda"],
        1,
    )
    print(flush=True)


def joint(subject: Subject) -> None:
    """Print the divergences of the ways to a Q3_K file in which half of the blocks' weights are zeros."""
    print(
        "| model | Q3_K, half of the blocks' weights pruned by sparsegpt | zeros | KL |\n|---|---|---:|---:|"
    )
    common = {"type": "Q3_K_S", "pure": True, "token_embedding_type": "F32", "output_tensor_type": "F32",
              "calibrate": True, **subject.given}  # fmt: skip
    folder, _ = subject.pruned("pruned", method="sparsegpt", sparsity=0.5)
    found = []
    for way, source, options in (
        ("not pruned, gptq", subject.model, {"method": "gptq"}),
        ("pruned, then rounded to nearest with importance", folder, {}),
        ("pruned, then gptq, which fills zeros", folder, {"method": "gptq"}),
        ("in one sweep", subject.model, {"method": "gptq", "sparsity": 0.5}),
        ("in one sweep, sequential", subject.model, {"method": "gptq", "sparsity": 0.5, "sequential": True}),
    ):
        out = subject.work / "out.gguf"
        llmcompress.quantize(source, out, **common, **options)
        found.append(subject.figure(out, "mean_kl", subject.model))
        print(f"| {subject.model.name} | {way} | {zeros_of(out):.1%} | {found[-1]:.6f} |", flush=True)
    _, nearest, filled, once, sequential = found
    print("\n| model | bar | measured | bar | |\n|---|---|---:|---:|---|")
    bar(subject, "joint: KL in one sweep / pruned, then rounded", once / nearest, 1)
    bar(subject, "joint, sequential: the same", sequential / nearest, 1)
    bar(subject, "joint, sequential: KL / pruned, then gptq, which fills zeros", sequential / filled, 1)
    print(flush=True)


def zeros_of(path: Path) -> float:
    """The share of zeros among the weights of the blocks' matrices."""
    zeros = weights = 0
    with GGUFFile.open(path) as file:
        for name, tensor in file.tensors.items():
            if tensor.type.name == "Q3_K":
                values = GRIDS["Q3_K"].dequantize(file.read(name))
                zeros, weights = zeros + int((values == 0).sum()), weights + values.size
    return zeros / weights


def bar(subject: Subject, what: str, measured: float, most: float) -> None:
    verdict = "met" if measured < most else "MISSED"
    print(f"| {subject.model.name} | {what} | {measured:.3f} | under {most:g} | {verdict} |", flush=True)


def memory(model: Path, tokens: str, layers: int, work: Path) -> None:
    """Print the peak of a run of each method that looks at inputs, with the bar of calibration."""
    others = rf"layers\.(?!({'|'.join(map(str, range(layers)))})\.)"
    ways = (
        ["wanda"],
        ["sparsegpt", "--effort", "fast", *(["--keep", others] if layers else [])],
        ["layers", "--drop", "2", "--by", "influence"],
        ["width", "--ratio", "0.25"],
    )
    libraries = measure([sys.executable, "-c", IMPORTS])
    print(
        "| checkpoint | method | tokens | s | CPU s | peak above the libraries | without pages of files | bar | |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---|"
    )
    for way in ways:
        out = work / way[0]
        command = [
            sys.executable,
            "-m",
            "llmcompress",
            "prune",
            model,
            "-o",
            out,
            "--tokens",
            tokens,
            "--method",
        ]
        cost = measure([*command, *way])
        shutil.rmtree(out)  # as large as the checkpoint
        above, own = cost.peak - libraries.peak, cost.own - libraries.own
        verdict = "met" if above < MOST_MEMORY else "MISSED"
        print(
            f"| {model.name}, bf16 | {' '.join(way)} | {tokens} | {cost.seconds:.0f} | {cost.cpu:.0f} | {format_size(above)} | "
            f"{format_size(own)} | {format_size(MOST_MEMORY)} | {verdict} |",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", type=Path, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="for the table")
    parser.add_argument("--calibration", type=Path, default=CORPUS / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=CORPUS / "heldout.txt")
    parser.add_argument("--memory-size", default="3b", help="of the checkpoint for the memory")
    parser.add_argument("--memory-tokens", default="2k")
    parser.add_argument(
        "--memory-layers",
        type=int,
        default=0,
        help="sparsegpt prunes only so many; 0: all, which takes hours",
    )
    return parser.parse_args()


def main() -> int:
    given = arguments()
    print(f"{machine()}\n")
    for model in given.models:
        with tempfile.TemporaryDirectory(prefix="bench-prune-") as work:
            subject = Subject(model, given.calibration, given.held_out, Path(work))
            if "table" in given.parts:
                table(subject, given.methods)
            if "joint" in given.parts:
                joint(subject)
    if "memory" in given.parts:
        with tempfile.TemporaryDirectory(prefix="bench-prune-") as work:
            size = given.memory_size
            made = [ROOT / "tools" / "synthetic.py", Path(work) / size, "--size", size, "--shard-size", "2G"]
            measure([sys.executable, *made])
            memory(Path(work) / size, given.memory_tokens, given.memory_layers, Path(work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
