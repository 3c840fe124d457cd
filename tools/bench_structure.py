"""What whole parts cost a model: layers chosen by measure and at random, and narrower models with and without making up for it.

    python tools/bench_structure.py
    python tools/bench_structure.py --parts layers --models examples/sample-llama-6m

layers: perplexity on held-out text without one layer and without two, by the way they are chosen; every single layer beside, of
    which three are drawn at random: the bar is the best of the three.
width: perplexity of models of which a quarter and half of the channels went, chosen by norm and by what the rest makes up for.

Prints a table for each part and model, and the bar.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from llmcompress.converters.dropping import drop_layers, layer_count
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.narrowing import narrow

from llmcompress.checkpoint import Checkpoint
from llmcompress.progress import Progress
from llmcompress.structure_options import StructureOptions

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = [ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m"]
CORPUS = SHARED / "corpora" / "sample-heldout"
TOKENS, HELD_OUT = 2**14, 2**16  # all there is
RANDOM = 3  # layers, by a fixed seed


class Subject:
    """A model, texts to measure on, and a folder to work in."""

    def __init__(self, model: Path, calibration: Path, held_out: Path, work: Path) -> None:
        self.model, self.work = model, work
        self.given = {"data": (str(calibration),), "tokens": TOKENS}
        self.options = EvaluationOptions(data=(str(held_out),), tokens=HELD_OUT)

    def row(self, what: str, job, method: str, **options) -> float:
        """Print what is left of a model, and return its perplexity."""
        shutil.rmtree(self.work / "smaller", ignore_errors=True)
        given = {} if options.get("layers") else self.given
        started = time.perf_counter()
        report = job(self.model, self.work / "smaller", StructureOptions(method, **given, **options))
        seconds = time.perf_counter() - started
        found = evaluate_model(str(self.work / "smaller"), None, self.options, Progress()).evaluation.figures
        perplexity = found["perplexity"].value
        gone = report.went.get("layers_dropped") or report.went["kept"]
        print(
            f"| {self.model.name} | {what} | {gone} | {report.share:.1%} | {perplexity:.2f} | {seconds:.0f} |",
            flush=True,
        )
        return perplexity


HEAD = "| model | chosen by | {} | gone | perplexity | s |\n|---|---|---|---:|---:|---:|"


def layers(subject: Subject) -> None:
    """Print the rows of dropped layers, and the bar."""
    print(HEAD.format("layers that went"))
    chosen = subject.row("kl", drop_layers, "layers", drop=1)
    for by in ("loss", "influence"):
        subject.row(by, drop_layers, "layers", drop=1, by=by)
    count = layer_count(Checkpoint.open(subject.model))
    single = {layer: subject.row("", drop_layers, "layers", layers=(layer,)) for layer in range(count)}
    for by in ("kl", "loss", "influence"):
        subject.row(by, drop_layers, "layers", drop=2, by=by)
    drawn = random.Random(0).sample(range(count), RANDOM)
    best = min(single[layer] for layer in drawn)
    verdict = "met" if chosen <= best else "MISSED"
    print(
        f"\n{subject.model.name}: by kl {chosen:.2f}, best of the layers {sorted(drawn)} drawn at random {best:.2f}: {verdict}\n"
    )


def width(subject: Subject) -> None:
    """Print the rows of narrower models."""
    print(HEAD.format("what stays"))
    for options in ({"ratio": 0.25}, {"ratio": 0.5, "parts": ("ffn",)}, {"ratio": 0.5}):
        for by in ("reconstruction", "norm"):
            subject.row(by, narrow, "width", by=by, **options)
    print(flush=True)


PARTS = {"layers": layers, "width": width}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--calibration", type=Path, default=CORPUS / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=CORPUS / "heldout.txt")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for model in given.models:
            for part in given.parts:
                PARTS[part](Subject(model, given.calibration, given.held_out, Path(work)))


if __name__ == "__main__":
    main()
