"""Calibration and evaluation against llama.cpp's own tools and transformers: speed, agreement, memory, perplexity.

    python tools/bench_calibrate.py --llama-bin llama.cpp/build/bin
    python tools/bench_calibrate.py --parts calibrate --models sample --repeat 1 --llama-bin llama.cpp/build/bin
    python tools/bench_calibrate.py --parts memory perplexity      # needs nothing of llama.cpp

calibrate: `llmcompress calibrate` and llama-imatrix by turns, on the same text, windows and threads; llama-imatrix
    reads the model as F32, F16 and BF16, and its fastest counts. The sums of the two are compared,
    also with attention in float32, which llama.cpp computes in float16 unless told otherwise.
memory: the peak of calibrating a large bf16 checkpoint, above the interpreter with its libraries.
perplexity: of an F32 GGUF by `evaluate`, by transformers on the checkpoint, and by llama-perplexity on the GGUF.
compare: the time `evaluate` takes for a Q4_K_M file beside its model, and llama-perplexity --kl-divergence does.

Prints a table of all runs, then one of the bars. What needs --llama-bin, a folder with llama-imatrix and
llama-perplexity, is left out without it. Large checkpoints are made by tools/synthetic.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from against_peers import CHUNK, OURS, PROGRAM, ROOT, SAMPLE, WINDOWS, Bench, synthetic
from bench_evaluate import compare, perplexity
from measure import Cost, machine, measure, middle
from tokenizers import Tokenizer

from llmcompress.machine import cores
from llmcompress.stats import Statistics

TEXT = ROOT.parent / "shared" / "corpora" / "sample-heldout" / "heldout.txt"
GIB = 2**30
# By itself llama.cpp computes attention in float16, whatever type the model has, and its sums are off by that.
EXACT_ATTENTION = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
# What `calibrate` imports before it reads the checkpoint.
IMPORTS = """import llmcompress.cli, llmcompress.model_display, llmcompress.converters.calibration
from transformers import AutoTokenizer, LlamaForCausalLM"""


@dataclass
class Contender:
    """A program that calibrates. `busy` tells from what it printed and its wall seconds how many of these came
    after its start: importing libraries, reading the model's header, tokenizing the text."""

    name: str
    command: list[str | Path]
    out: Path
    busy: Callable[[str, float], float]
    costs: list[Cost] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    printed: str = ""

    def run(self, bench: Bench) -> None:
        self.out.unlink(missing_ok=True)
        cost, self.printed = bench.run(self.command)
        self.costs.append(cost)
        self.after.append(self.busy(self.printed, cost.seconds))


def our_busy(printed: str, seconds: float) -> float:
    """From reading the first block's weights to the end of the last; by the rate in our last line."""
    done, rate = re.findall(
        r"calibrate: ([\d,]+) tokens x blocks of .*, ([\d,]+) tokens x blocks/s", printed
    )[-1]
    return int(done.replace(",", "")) / int(rate.replace(",", ""))


def their_busy(printed: str, seconds: float) -> float:
    """From llama-imatrix's first batch to the end of the process; its lines start with the time they are of."""
    stamp = re.search(r"^(\d+)\.(\d+)\.(\d+)\.(\d+) I compute_imatrix: computing over", printed, re.MULTILINE)
    minutes, whole, milli, micro = map(int, stamp.groups())
    return seconds - (60 * minutes + whole + milli / 1e3 + micro / 1e6)


def calibrate(bench: Bench) -> None:
    for name in bench.given.models:
        model = SAMPLE if name == "sample" else synthetic(bench.work / name, name)
        whole = bench.given.text.read_bytes().decode()
        text = bench.work / f"{model.name}.txt"
        text.write_bytes(cut(whole, model, None if name == "sample" else bench.given.chunks).encode())
        calibrate_model(bench, model, text, ("auto",) if name == "sample" else ("auto", "f32"))


def calibrate_model(bench: Bench, model: Path, text: Path, dtypes: tuple[str, ...]) -> None:
    def ours(dtype: str) -> Contender:
        out = bench.work / f"ours-{dtype}.gguf"
        options = ["-o", out, "--data", text, *WINDOWS, "--dtype", dtype]
        return Contender(f"{OURS} --dtype {dtype}", [*PROGRAM, "calibrate", model, *options], out, our_busy)

    def theirs(type: str, how: str = "", *more: str) -> Contender:
        out = bench.work / f"theirs-{type}{how}.gguf"
        command = bench.llama("imatrix", bench.gguf(model, type), text, "-o", out, "--no-ppl", *more)
        return Contender(f"llama-imatrix, {type}{how}", command, out, their_busy)

    mine = [ours(dtype) for dtype in dtypes]
    peers, exact = [], []
    if bench.given.llama_bin:
        peers = [theirs(type) for type in ("F32", "F16", "BF16")]
        exact = [theirs("F32", " with float32 attention", *EXACT_ATTENTION)]
    for _ in range(bench.given.repeat):
        for contender in [mine[0], *peers]:
            contender.run(bench)
    for contender in [*mine[1:], *exact]:  # only their sums are judged
        contender.run(bench)
    sums = Statistics.load(mine[0].out)
    tokens = sums.chunks * sums.chunk_size
    for contender in [*mine, *peers, *exact]:
        name = f"{model.name}: {contender.name}, median of {len(contender.costs)}"
        bench.row(name, middle(contender.costs), tokens, median(contender.after))
    if peers:
        bench.peer_build = re.search(r"CPU : .*|$", peers[0].printed)[0]
        judge_speed(bench, model.name, mine[0], peers)
        for contender in mine:
            for peer in [*exact, peers[0]]:
                judge_sums(bench, model.name, contender, peer)


def judge_speed(bench: Bench, model: str, mine: Contender, peers: list[Contender]) -> None:
    def seconds(contender: Contender) -> float:
        return middle(contender.costs).seconds

    views = [("whole process", seconds), ("without start-up", lambda contender: median(contender.after))]
    for view, of in views:
        fastest = min(peers, key=of)
        ratio = of(fastest) / of(mine)
        what = f"calibrate {model}, {view}: tokens/s over {fastest.name}"
        bench.bar(what, f"{ratio:.2f}", "at least 2", ratio >= 2)


def judge_sums(bench: Bench, model: str, mine: Contender, peer: Contender) -> None:
    own = Statistics.load(mine.out)
    differences = differences_of(own, Statistics.load(peer.out))
    worst = max(differences, key=lambda name: differences[name].max())
    largest, middling = differences[worst].max(), np.median(np.concatenate(list(differences.values())))
    what = f"calibrate {model} in {own.notes['calibration.dtype']}: sums of x² beside those of {peer.name}"
    measured = f"{largest:.1e} at most ({worst}), median {middling:.1e}, {len(differences)} weights"
    bench.bar(what, measured, "1e-3 relative", largest <= 1e-3)


def differences_of(mine: Statistics, theirs: Statistics) -> dict[str, np.ndarray]:
    """|a - b| / b of every sum, by the weights both have. Raises RuntimeError where tokens were not the same."""
    found = {}
    for name in sorted(mine.entries.keys() & theirs.entries.keys()):
        ours, peers = mine.entries[name], theirs.entries[name]
        if not np.array_equal(ours.tokens, peers.tokens):
            raise RuntimeError(
                f"{name}: {ours.tokens.sum()} tokens in one file, {peers.tokens.sum()} in the other"
            )
        apart = np.abs(ours.squares - peers.squares)
        with np.errstate(divide="ignore"):
            found[name] = np.divide(apart, peers.squares, out=np.zeros_like(apart), where=apart != 0).ravel()
    return found


def cut(text: str, model: Path, chunks: int | None) -> str:
    """As much of a text as the model's tokenizer makes `chunks` windows and a bit of, or fewer where it is short.

    They are a multiple of 4, as llama-imatrix runs 4 at once: of 3 that are left at the end it drops 6 tokens, as it
    splits them over micro-batches and skips those of under 16 tokens. Raises RuntimeError for a text of fewer.
    """
    offsets = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).offsets
    whole = min(chunks or len(offsets), len(offsets) // CHUNK) // 4 * 4
    if not whole:
        raise RuntimeError(f"a text of {len(offsets)} tokens; give at least {4 * CHUNK}")
    return text[: offsets[: whole * CHUNK + CHUNK // 8][-1][1]]


def memory(bench: Bench) -> None:
    size = bench.given.memory_size
    model = synthetic(bench.work / f"{size} in shards", size, "--shard-size", "2G")
    libraries = measure([sys.executable, "-c", IMPORTS])
    bench.row("the interpreter with its libraries", libraries)
    for tokens in bench.given.memory_tokens:
        out = bench.work / f"memory-{tokens}.gguf"
        command = [*PROGRAM, "calibrate", model, "-o", out, "--tokens", tokens, "--chunk", str(CHUNK)]
        cost, printed = bench.run(command)
        sums = Statistics.load(out)
        bench.row(f"{model.name}: {OURS} --tokens {tokens}", cost, int(sums.notes["calibration.tokens"]),
                  our_busy(printed, cost.seconds))  # fmt: skip
        above = (cost.peak - libraries.peak) / GIB
        own = (cost.own - libraries.own) / GIB
        what = f"calibrate {model.name}, {tokens} tokens: peak memory above the libraries'"
        bench.bar(what, f"{above:.2f} GiB (without file pages {own:.2f})", "under 3 GiB", above < 3)


PARTS = {"calibrate": calibrate, "memory": memory, "perplexity": perplexity, "compare": compare}


def arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parts = list(PARTS)
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts)
    )
    parser.add_argument("--llama-bin", type=Path, help="the folder of llama-imatrix and llama-perplexity")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--threads", type=int, default=2, help="cores that every program gets")
    parser.add_argument("--repeat", type=int, default=3, help="rounds, of which medians are taken")
    parser.add_argument(
        "--models", nargs="+", default=["sample", "0.5b"], help="to calibrate: sample, or sizes"
    )
    parser.add_argument(
        "--chunks", type=int, default=16, help=f"of {CHUNK} tokens; the sample gets the whole text"
    )
    parser.add_argument("--memory-size", default="3b", help="of the checkpoint for the memory")
    parser.add_argument("--memory-tokens", nargs="+", default=["8k", "64k"])
    parser.add_argument("--work", type=Path, help="where a folder for all files is made")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    work = Path(tempfile.mkdtemp(prefix="bench-calibrate-", dir=given.work))
    bench = Bench(given, work, min(given.threads, cores()))
    print(f"{machine()}; text {given.text.name}{'' if given.llama_bin else '; no --llama-bin: no peers'}\n")
    print("| run | tokens | wall s | CPU s | tokens/s | after start | peak MiB | own MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    try:
        for part in given.parts:
            PARTS[part](bench)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        print("\n| what | measured | bar | |\n|---|---|---|---|", *bench.bars, sep="\n")
        if bench.peer_build:
            print(f"\nllama.cpp was compiled for {bench.peer_build}")
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
