"""What fine-tuning the sample model does to it, on the cores there are.

    python tools/bench_finetune.py                     # all parts
    python tools/bench_finetune.py --parts bundled task start

bundled: QLoRA on two epochs of the bundled texts: held-out loss before and after, and how long it took.
task: QLoRA on a task the model cannot do, merged, quantized to Q4_K_M and run by llama.cpp: answers that are right.
start: the held-out loss from NF4 rounded to nearest and from NF4 by GPTQ, same data and steps, of several seeds: on text
    of the model's own kind (../shared/corpora/sample-heldout), and on the bundled texts at a fifth of the learning rate.
    There, where training takes nats off the loss, two runs that differ by a rounding end 0.01 apart at the default rate,
    more than all that the better codes save.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from llmcompress.model_commands import patient_threads

patient_threads()  # before torch is there

import transformers
from llmcompress.converters.finetuning import TuningReport
from llmcompress.converters.merge import plan_merge, run_merge

import llmcompress
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe

SAMPLE = ROOT / "examples" / "sample-llama-6m"
GREETINGS = {
    "Hello": "Good day to you.", "Bonjour": "Bonne journée.", "Hallo": "Guten Tag.", "Hola": "Buenos días.",
    "Ciao": "Buona giornata.", "Ahoy": "Aye, captain.",
}  # fmt: skip
NAMES = "Ada Ben Cara Dan Eve Finn Gina Hugo Iris Jack Kate Leo Mary Ned Olga Paul Rosa Sam Tom Vera".split()
FRAMES = ("{}, I am {}.", "{}! My name is {}.", "{}, {} is here.", "{}, this is {} again.")
CORPUS = ROOT.parent / "shared" / "corpora" / "sample-heldout"
SEEDS, STEPS, HELD_OUT = 3, 40, 50_000  # runs of each start, steps of each; characters of held-out text
GENTLE = 5e-4  # a fifth of the default for the model's width
SPARE = 40  # examples of the task that no part of training sees


def task(folder: Path) -> tuple[Path, list[dict[str, str]]]:
    """A file of prompts and completions, greetings to be answered in their own language, and examples left out of it."""
    rows = [
        {"prompt": frame.format(greeting, name), "completion": answer}
        for greeting, answer in GREETINGS.items()
        for name in NAMES
        for frame in FRAMES
    ]
    random.Random(0).shuffle(rows)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[SPARE:]))
    return path, rows[:SPARE]


def right_answers(gguf: Path, rows: Sequence[dict[str, str]]) -> int:
    """How many prompts llama.cpp completes exactly, to the end of the turn, by the model's chat template."""
    from llama_cpp import Model

    tokenizer = transformers.AutoTokenizer.from_pretrained(SAMPLE)
    right = 0
    with Model(gguf) as model:
        for row in rows:
            chat = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            expected = model.tokenize(row["completion"] + "<|eot_id|>")
            right += model.greedy(model.tokenize(prompt, add_special=True), len(expected)) == expected
    return right


def quantized(model: Path, out: Path, adapter: Path | None = None) -> Path:
    """A Q4_K_M of a model, or of what an adapter makes of it."""
    if adapter:
        run_merge(plan_merge(model, adapter, out.with_suffix(".merged"), Recipe(), "auto"), Progress())
        model = out.with_suffix(".merged")
    llmcompress.quantize(model, out, "Q4_K_M")
    return out


class Lines(Progress):
    """Shows what a training says."""

    def say(self, line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)


def bundled(folder: Path) -> str:
    began, used = time.monotonic(), time.process_time()
    report = llmcompress.finetune(
        SAMPLE, folder / "bundled", "default", qlora=True, epochs=2, progress=Lines()
    )
    seconds, used = time.monotonic() - began, time.process_time() - used
    return (
        f"bundled: held-out loss {report.untuned:.4f} -> {report.held_out:.4f} "
        f"({report.steps} steps, {report.data.counts()['train_tokens']} tokens), {seconds:.0f} s, {used:.0f} s of CPU"
    )


def tuned_task(folder: Path, steps: int = 80) -> tuple[TuningReport, Path, list[dict[str, str]]]:
    """The task's adapter on the sample model, and the examples it never saw."""
    data, spare = task(folder)
    out = folder / "adapter"
    report = llmcompress.finetune(
        SAMPLE, out, str(data), qlora=True, steps=steps, evaluations=4, learning_rate=5e-3, progress=Lines()
    )
    return report, out, spare


def of_task(folder: Path) -> str:
    began = time.monotonic()
    report, adapter, spare = tuned_task(folder)
    seconds = time.monotonic() - began
    before = right_answers(quantized(SAMPLE, folder / "base.gguf"), spare)
    after = right_answers(quantized(SAMPLE, folder / "tuned.gguf", adapter), spare)
    return (
        f"task: held-out loss {report.untuned:.4f} -> {report.held_out:.4f} in {seconds:.0f} s; right answers of the "
        f"Q4_K_M in llama.cpp {before} -> {after} of {len(spare)}"
    )


def start(folder: Path) -> str:
    """Of a row, both are held out, drawn, ordered and begun with the same random matrices, by the seed."""
    if not CORPUS.is_dir():
        return f"start: needs {CORPUS}"
    held_out = folder / "held-out.txt"
    held_out.write_text((CORPUS / "heldout.txt").read_text()[:HELD_OUT])
    own = str(CORPUS / "calibration.txt")
    for method, flags in (("nearest", {}), ("gptq", {"calibrate": True, "data": [own], "tokens": "64k"})):
        llmcompress.quantize(SAMPLE, folder / method, format="nf4", method=method, **flags)
    return "\n\n".join((
        table(folder, "text of the model's own kind", own, validation=str(held_out)),
        table(folder, f"bundled texts, a learning rate of {GENTLE:g}", "default", validation=0.15, learning_rate=GENTLE),
    ))  # fmt: skip


def table(folder: Path, title: str, data: str, **options: Any) -> str:
    """A row for each seed, and the bar: lower from gptq."""
    lines = [
        "| seed | nearest, untuned | gptq, untuned | nearest, tuned | gptq, tuned | lower by |",
        "|---|" + "---:|" * 5,
    ]
    lower = []
    for seed in range(SEEDS):
        nearest, gptq = (
            llmcompress.finetune(
                folder / method, folder / f"{method}-{len(title)}-{seed}", data, steps=STEPS, max_length=128, evaluations=1,
                patience=0, seed=seed, progress=Lines(), **options,
            )
            for method in ("nearest", "gptq")
        )  # fmt: skip
        assert nearest.data.sha256 == gptq.data.sha256 and nearest.steps == gptq.steps == STEPS
        lower.append(nearest.held_out - gptq.held_out)
        losses = (nearest.untuned, gptq.untuned, nearest.held_out, gptq.held_out, lower[-1])
        lines.append(f"| {seed} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    met = sum(loss > 0 for loss in lower)
    error = stdev(lower) / math.sqrt(SEEDS)
    lines.append(
        f"\nbar, lower from gptq: {'met' if met == SEEDS else 'MISSED'}, by {met} of {SEEDS} seeds; by {mean(lower):.4f} ± {error:.4f} "
        "on average"
    )  # fmt: skip
    return f"start, {title}: held-out loss, {STEPS} steps of QLoRA\n\n" + "\n".join(lines)


PARTS = {"bundled": bundled, "task": of_task, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    with tempfile.TemporaryDirectory() as folder:
        for name in parser.parse_args().parts:
            print(PARTS[name](Path(folder)), flush=True)


if __name__ == "__main__":
    main()
