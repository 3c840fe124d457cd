"""How much of what pruning loses healing brings back, and what it takes.

    python tools/bench_heal.py                                   # both sample models, all ways of healing
    python tools/bench_heal.py --models examples/sample-llama-6m --ways full --steps 120

Each model is pruned to half by wanda with the bundled texts, and healed with the same texts, zeros held, a part of
them held out to choose the best step by:

full: all weights, learning from the unpruned model's probabilities, as `prune --heal` does.
lora: a LoRA of rank 64, learning the same.
text: all weights, learning the texts themselves.

Losses are logarithms of perplexities on text that no part of it saw (../shared/corpora/sample-heldout). Recovered is
(pruned - healed) / (pruned - dense). Seconds are those of healing alone, from reading the model to the written
checkpoint; CPU seconds are of all threads. The bar: half recovered, in 600 seconds on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.finetuning import finetune_model
from llmcompress.converters.gradual import healing_options
from llmcompress.converters.pruning import prune_model
from measure import machine

from llmcompress.checkpoint import Checkpoint
from llmcompress.divergence import Estimate
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MODELS = (ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m")
HELD_OUT = SHARED / "corpora" / "sample-heldout" / "heldout.txt"
TOKENS = 12_288
WAYS = {"full": "full", "lora": "lora", "text": "full"}  # and what is trained
LOST, SECONDS = 0.5, 600  # the bar


class Lines(Progress):
    """Shows what a training says."""

    def say(self, line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)


def loss(model: Path, dense: Path) -> dict[str, Estimate]:
    """Figures on the held-out text."""
    options = EvaluationOptions(data=(str(HELD_OUT),), tokens=TOKENS)
    return evaluate_model(str(model), str(dense), options, Progress()).evaluation.figures


def heal(dense: Path, pruned: Path, out: Path, way: str, **given: Any) -> tuple[float, float, int]:
    """Seconds, CPU seconds and steps of healing with the bundled texts."""
    taught = {} if way == "text" else {"teachers": (str(dense),)}
    with Checkpoint.open(dense) as checkpoint:
        options = healing_options(
            checkpoint, keep_zeros=True, evaluations=4, method=WAYS[way], **taught, **given
        )
    began, spent = time.monotonic(), time.process_time()
    report = finetune_model(pruned, out, ["default"], options, Lines())
    return time.monotonic() - began, time.process_time() - spent, report.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", type=Path, default=[model for model in MODELS if model.is_dir()]
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--effort", nargs="+", default=["fast", "normal"], help="of wanda; fast is the paper's"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--lr", type=float, help="learning rate, in place of the default")
    given = parser.parse_args()
    print(machine())
    print(
        "| model | wanda's effort | healed by | steps | dense | pruned | healed | recovered | KL, pruned | healed | s | CPU s | bar |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for model in given.models:
        for effort in given.effort:
            with tempfile.TemporaryDirectory() as folder:
                measured(model, effort, Path(folder), given)


def measured(model: Path, effort: str, folder: Path, given: argparse.Namespace) -> None:
    """Print a row for each way of healing a model that was pruned once."""
    pruned = folder / "pruned"
    prune_model(model, pruned, PruningOptions(method="wanda", sparsity=0.5, tokens=2**16, effort=effort))
    before = loss(pruned, model)
    lost = before["ln_perplexity_ratio"].value
    for way in given.ways:
        out = folder / way
        settings = {"steps": given.steps, "max_length": given.length, "learning_rate": given.lr}
        seconds, cpu, steps = heal(model, pruned, out, way, **settings)
        after = loss(out, model)
        recovered = (lost - after["ln_perplexity_ratio"].value) / lost
        perplexities = before["reference_perplexity"], before["perplexity"], after["perplexity"]
        nats = " | ".join(f"{math.log(each.value):.4f}" for each in perplexities)
        met = recovered >= LOST and seconds <= SECONDS
        print(
            f"| {model.name} | {effort} | {way} | {steps} | {nats} | {recovered:.0%} | "
            f"{before['mean_kl'].value:.4f} | {after['mean_kl'].value:.4f} | {seconds:.0f} | {cpu:.0f} | "
            f"{'met' if met else 'MISSED'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
