"""bitsandbytes checkpoints: what GPTQ's codes are worth in NF4, the rate of our kernels, the memory of a large job.

    python tools/bench_nf4.py
    python tools/bench_nf4.py --parts kl
    python tools/bench_nf4.py --parts memory --size 3b --work /somewhere/large

kl: mean KL divergence on held-out text, by `evaluate`, of NF4 checkpoints by `--method gptq` and by rounding to nearest,
    which is bitsandbytes' own, bit for bit.
speed: of rounding normal weights in bfloat16 on one core, beside `bitsandbytes.functional` with one thread.
memory: the most a job that writes NF4 takes above the interpreter and its libraries, of a synthetic checkpoint.

Prints the rows of each part, with bars and whether they are met.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from against_peers import MIB, PROGRAM, synthetic
from measure import machine, measure

PARTS = ("memory", "speed", "kl")  # memory first: a child's peak counts from that of its parent
BAR, MAX_RAM = 0.30, 512
IMPORTS = "import llmcompress.cli, llmcompress.display, llmcompress.converters.to_gguf, llmcompress.converters.to_checkpoint"
ROWS, COLUMNS = 2048, 4096


def memory(size: str, work: Path) -> None:
    model = synthetic(work / size, size)
    print("| job | s | MiB above the libraries | bar | |\n|---|---:|---:|---:|---|", flush=True)
    for what, flags, more in (("nf4", [], ""), ("nf4 --double-quant", ["--double-quant"], ", torch")):
        libraries = measure([sys.executable, "-c", IMPORTS + more]).peak
        out = work / f"out{len(flags)}"
        command = [
            *PROGRAM,
            "quantize",
            model,
            "-o",
            out,
            "--format",
            "nf4",
            "--max-ram",
            f"{MAX_RAM}MiB",
            *flags,
        ]
        cost = measure(command)
        taken = (cost.peak - libraries) / MIB
        verdict = "met" if taken <= MAX_RAM else "MISSED"
        print(f"| {size}, {what} | {cost.seconds:.1f} | {taken:.0f} | {MAX_RAM} | {verdict} |", flush=True)


def speed() -> None:
    import bitsandbytes.functional as theirs
    import torch

    from llmcompress.grids.floats import to_float32
    from llmcompress.grids.int8 import row_grid
    from llmcompress.grids.nf4 import FP4, NF4

    torch.set_num_threads(1)
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = weights.view(torch.uint16).numpy()
    print("\n| format | our M weights/s of a core | bitsandbytes' | times as fast |\n|---|---:|---:|---:|")
    for grid in (NF4, FP4, row_grid(COLUMNS)):

        def by_bitsandbytes(name=grid.name.lower()):
            if name == "int8":
                return theirs.int8_vectorwise_quant(weights.half())
            return theirs.quantize_4bit(weights, quant_type=name)

        ours = rate(lambda: grid.quantize(to_float32(raw, "BF16")))
        peer = rate(by_bitsandbytes)
        print(f"| {grid.name} | {ours:.0f} | {peer:.1f} | {ours / peer:.0f} |", flush=True)


def rate(run: Callable[[], object]) -> float:
    """Million weights in a second of processor time, of this thread; the best of five."""
    run()
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        run()
        seconds.append(time.thread_time() - started)
    return ROWS * COLUMNS / min(seconds) / 1e6


def divergences(models: list[Path], calibration: Path, held_out: Path, work: Path) -> None:
    from bench_gptq import Subject

    import llmcompress

    print(
        "\n| model | format | KL nearest | KL gptq | gptq / nearest | bar | |\n|---|---|---:|---:|---:|---:|---|",
        flush=True,
    )
    for model in models:
        subject = Subject(model, calibration, held_out, work / model.name)
        for name, double in (("nf4", False), ("nf4, double", True)):
            llmcompress.quantize(model, subject.work / f"{name} nearest", format="nf4", double_quant=double)
            nearest = subject.kl(subject.work / f"{name} nearest")
            out, made = subject.made(f"{name} gptq", format="nf4", double_quant=double)
            assert {tensor.method for tensor in made.outputs[0].tensors if tensor.type == "NF4"} == {"gptq"}
            ratio = (ours := subject.kl(out)) / nearest
            verdict = f"{BAR:.2f} | {'met' if ratio <= BAR else 'MISSED'}"
            print(
                f"| {model.name} | {name} | {nearest:.6f} | {ours:.6f} | {ratio:.3f} | {verdict} |",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    corpus = root.parent / "shared" / "corpora" / "sample-heldout"
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--models", nargs="+", type=Path, default=[root / "examples" / "sample-llama-6m"])
    parser.add_argument("--calibration", type=Path, default=corpus / "calibration.txt")
    parser.add_argument("--held-out", type=Path, default=corpus / "heldout.txt")
    parser.add_argument("--size", default="3b", help="of the synthetic checkpoint")
    parser.add_argument("--work", type=Path, help="where a folder for all files is made")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="bench-nf4-", dir=given.work) as work:
        for part in (part for part in PARTS if part in given.parts):
            if part == "memory":
                memory(given.size, Path(work))
            elif part == "speed":
                speed()
            else:
                divergences(given.models, given.calibration, given.held_out, Path(work))
    return 0


if __name__ == "__main__":
    sys.exit(main())
