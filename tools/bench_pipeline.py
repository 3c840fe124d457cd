"""Our one pass from a checkpoint to a quantized GGUF against the two-step route: F16 GGUF, then llama.cpp.

    python tools/bench_pipeline.py --size 200m
    python tools/bench_pipeline.py --size tinyllama --repeat 3 --kills 5 \\
        --convert-script llama.cpp/convert_hf_to_gguf.py --llama-quantize llama.cpp/build/bin/llama-quantize

Prints medians of time, memory and bytes written, and the ratios. Without --convert-script our own `convert`
makes the F16 file; without --llama-quantize the cyllama wheel quantizes it, where one is installed. What
was not run is said. The checkpoint is made by tools/synthetic.py unless --model gives one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from against_peers import MIB, PROGRAM, synthetic
from measure import Cost, end_of, machine, measure, middle

from llmcompress import __version__
from llmcompress.filetypes import find_file_type

# What a job imports before it reads the checkpoint.
IMPORTS = "import llmcompress.cli, llmcompress.display, llmcompress.converters.to_gguf, llmcompress.run"
CYLLAMA = """import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
params = LlamaModelQuantizeParams()
params.ftype = int(sys.argv[3])
model_quantize(sys.argv[1], sys.argv[2], params)"""


@dataclass(frozen=True)
class Bench:
    """The commands to compare, and the folder they write to."""

    model: Path
    work: Path
    type: str
    max_ram: str | None
    convert_script: Path | None
    convert_python: str
    llama_quantize: Path | None
    cyllama_python: str | None

    @property
    def env(self) -> dict[str, str]:
        """Compiled kernels are kept here, so that how long compiling takes can be told."""
        return {"NUMBA_CACHE_DIR": str(self.work / "kernels")}

    def ours(self, model: Path, out: Path) -> list[str | Path]:
        limit = ["--max-ram", self.max_ram] if self.max_ram else []
        return [*PROGRAM, "quantize", model, "-o", out, "--type", self.type, *limit]

    def convert(self, out: Path) -> tuple[str, list[str | Path]]:
        if self.convert_script:
            settings = ["--outtype", "f16", "--outfile", out]
            return self.convert_script.name, [self.convert_python, self.convert_script, self.model, *settings]
        return "our own convert --type F16", [*PROGRAM, "convert", self.model, "-o", out, "--type", "F16"]

    def quantize(self, source: Path, out: Path) -> tuple[str, list[str | Path]] | None:
        if self.llama_quantize:
            return "llama-quantize", [self.llama_quantize, source, out, self.type]
        if self.cyllama_python:
            number = str(find_file_type(self.type).id)
            return "llama_model_quantize (cyllama)", [self.cyllama_python, "-c", CYLLAMA, source, out, number]
        return None


def one_pass(bench: Bench) -> Cost:
    out = bench.work / "one-pass.gguf"
    out.unlink(missing_ok=True)
    os.sync()  # what earlier runs left to be written is not charged to this one
    return measure(bench.ours(bench.model, out), bench.env, out)


def two_steps(bench: Bench) -> list[tuple[str, Cost]]:
    """Name and cost of each step; the second is missing where there is nothing to run it with."""
    half, out = bench.work / "half.gguf", bench.work / "two-steps.gguf"
    for file in (half, out):
        file.unlink(missing_ok=True)
    os.sync()
    name, command = bench.convert(half)
    steps = [(name, measure(command, bench.env, half))]
    if second := bench.quantize(half, out):
        name, command = second
        steps.append((name, measure(command, out=out)))
    half.unlink()
    return steps


def compare(bench: Bench, repeat: int) -> None:
    """Run both routes by turns and print medians and ratios."""
    libraries = measure([sys.executable, "-c", IMPORTS]).peak
    firsts, seconds = [], []
    for number in range(1, repeat + 1):
        firsts.append(one_pass(bench))
        seconds.append(two_steps(bench))
        steps = " + ".join(f"{cost.seconds:.1f} s" for _, cost in seconds[-1])
        print(f"round {number} of {repeat}: one pass {firsts[-1].seconds:.1f} s, steps {steps}", flush=True)
    first = middle(firsts)
    show(repeat, first, [(column[0][0], middle([cost for _, cost in column])) for column in zip(*seconds)])
    print(f"one pass: peak {(first.peak - libraries) / MIB:.0f} MiB above the interpreter and its libraries "
          f"({libraries / MIB:.0f} MiB); --max-ram {bench.max_ram or '512MiB, the default'}")  # fmt: skip


def show(repeat: int, first: Cost, steps: list[tuple[str, Cost]]) -> None:
    print(f"\n| {f'medians of {repeat}':36} | wall s |  CPU s | peak MiB | own MiB | written MiB |")
    print(f"|{'-' * 38}|-------:|-------:|---------:|--------:|------------:|")
    print(row(f"llmcompress {__version__}, one pass", first))
    for name, cost in steps:
        print(row(f"step: {name}", cost))
    if len(steps) < 2:
        print("\nnot run: llama.cpp's quantizer (no --llama-quantize, no cyllama), so there is no ratio")
        return
    both = steps[0][1].then(steps[1][1])
    print(row("two steps together", both))
    figures = zip(vars(both), vars(both).values(), vars(first).values())
    ratios = ", ".join(f"{name} {theirs / ours:.1f}" for name, theirs, ours in figures if ours)
    print(f"\ntwo steps / one pass: {ratios}")


def row(name: str, cost: Cost) -> str:
    memory = f"{cost.peak / MIB:8.0f} | {cost.own / MIB:7.0f}"
    return f"| {name:36} | {cost.seconds:6.1f} | {cost.cpu:6.1f} | {memory} | {cost.written / MIB:11.0f} |"


def compile_kernels(bench: Bench, model: Path) -> None:
    """A tiny job, twice: the first compiles the kernels, which every later one finds on disk."""
    costs = [measure(bench.ours(model, bench.work / "tiny.gguf"), bench.env) for _ in range(2)]
    extra, least = costs[0].seconds - costs[1].seconds, costs[1]
    print(f"first job on a machine: {extra:.1f} s for compiling, not counted below")
    memory = f"{least.peak / MIB:.0f} MiB"
    print(f"smallest job: {least.seconds:.1f} s, {least.cpu:.1f} CPU s, {memory}", flush=True)


def kill_and_resume(bench: Bench, kills: int, seed: int) -> bool:
    """Kill the job at random moments, go on from there, and compare what it ends in with an undisturbed file.

    A run that ends before its moment is compared as well, and the next one starts from nothing.
    """
    out, draw = bench.work / "killed.gguf", random.Random(seed)
    usual = one_pass(bench).seconds
    expected = sha256(bench.work / "one-pass.gguf")
    moments: list[float] = []
    finished: list[str] = []
    while len(moments) < kills:
        moment = draw.uniform(0, usual)
        if run_until(bench, out, moment):
            finished.append(sha256(out))
            out.unlink()
        else:
            moments.append(moment)
    run_until(bench, out, None)
    finished.append(sha256(out))
    same = all(found == expected for found in finished)
    after = ", ".join(f"{moment:.1f}" for moment in moments)
    verdict = "all with the same" if same else "NOT ALL with the"
    print(f"killed {kills} times, after {after} s (undisturbed: {usual:.1f} s)")
    print(f"files finished in between and in the end: {len(finished)}, {verdict} sha256 {expected}")
    return same


def run_until(bench: Bench, out: Path, wait: float | None) -> bool:
    """Run the job; kill -9 after `wait` seconds. Returns whether it came to its end before."""
    command = [str(part) for part in bench.ours(bench.model, out)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | bench.env, stdout=log, stderr=log)
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        if code:
            raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{end_of(log)}")
    return True


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def help_time() -> str:
    costs = [measure([*PROGRAM, "--help"]) for _ in range(9)]
    return f"llmcompress --help: {middle(costs).seconds:.3f} s (median of 9)"


def arguments() -> argparse.Namespace:
    installed = sys.executable if importlib.util.find_spec("cyllama") else None
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--size", default="tinyllama", help="of the checkpoint: tinyllama, 200m, 3b ...")
    parser.add_argument("--model", type=Path, help="a checkpoint to take instead")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--max-ram", help="passed on to our job")
    parser.add_argument("--convert-script", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--convert-python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--llama-quantize", type=Path, help="llama.cpp's program")
    parser.add_argument("--cyllama-python", default=installed, help="the Python that has the cyllama wheel")
    parser.add_argument("--repeat", type=int, default=1, help="rounds, of which medians are taken")
    parser.add_argument("--kills", type=int, default=0, help="also kill our job this often, and resume it")
    parser.add_argument("--seed", type=int, default=0, help="of the moments it is killed at")
    parser.add_argument("--work", type=Path, help="where a folder for all files is made")
    parser.add_argument("--keep", action="store_true", help="leave that folder")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    work = Path(tempfile.mkdtemp(prefix="bench-pipeline-", dir=given.work))
    print(f"{machine()}; {given.type}", flush=True)
    try:
        model = given.model or synthetic(work / given.size, given.size)
        bench = Bench(
            model, work, given.type, given.max_ram, given.convert_script, given.convert_python,
            given.llama_quantize, given.cyllama_python,
        )  # fmt: skip
        compile_kernels(bench, synthetic(work / "tiny", "1m"))
        compare(bench, given.repeat)
        same = kill_and_resume(bench, given.kills, given.seed) if given.kills else True
        print(help_time())
        return 0 if same else 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if given.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
