"""What a low-rank adapter takes back of what quantizing lost, in llama.cpp.

    python tools/bench_lowrank.py
    python tools/bench_lowrank.py --ranks 16 --models examples/sample-llama-6m

Of each model: Q2_K files, rounded to nearest without and with importance, and by gptq; an adapter of each by
`compensate`, in F16, from the XᵀX of the same tokens; and their mean KL divergence from the model's F32 GGUF on held-out
text, in nats a token, all computed by llama.cpp (the one in the xllamacpp wheel, tests/llama_cpp.py) with the adapter
loaded as --lora does. Beside them the files of larger types, for what the adapter's bytes would buy there.

Prints a row for each file, with the bar of rank 16 and whether it is met.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.compensation import CompensationOptions, compensate
from measure import machine

import llmcompress
from llmcompress.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from llama_cpp import Model  # noqa: E402

SHARED = ROOT.parent / "shared"
MODELS = [ROOT / "examples" / "sample-llama-6m", SHARED / "models" / "sample-qwen3-7m"]
CORPUS = SHARED / "corpora" / "sample-heldout"
TOKENS, WINDOW = 2**15, 512
LARGER = ("Q3_K_S", "Q3_K_M", "Q4_K_S")
BAR_RANK, BAR = 16, 0.80


class Reference:
    """The F32 GGUF's log-probabilities on held-out text, cut at WINDOW."""

    def __init__(self, base: Path, count: int) -> None:
        with Model(base, WINDOW) as model:
            ids = model.tokenize((CORPUS / "heldout.txt").read_text()[: 12 * WINDOW * count])
            self.rows = [ids[first : first + WINDOW] for first in range(0, WINDOW * count, WINDOW)]
            self.logs = [log_probabilities(model, row) for row in self.rows]

    def mean_kl(self, path: Path, adapter: Path | None = None) -> float:
        """Of all positions."""
        with Model(path, WINDOW) as model:
            if adapter:
                model.use_adapter(adapter)
            pairs = ((p, log_probabilities(model, row)) for p, row in zip(self.logs, self.rows))
            return float(np.mean([(np.exp(p) * (p - q)).sum(1).mean() for p, q in pairs]))


def log_probabilities(model: Model, row: list[int]) -> np.ndarray:
    """float32 (tokens, vocabulary)."""
    logits = model.logits(row)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)


def measure_model(model: Path, ranks: list[int], count: int, work: Path) -> None:
    hessian, statistics = work / "hessian", work / "statistics.gguf"
    data = (str(CORPUS / "calibration.txt"),)
    calibrate_model(model, statistics, CalibrationOptions(data=data, tokens=TOKENS), Progress(), hessian)
    base = llmcompress.quantize(model, work / "base.gguf", type="F32", verify="off").paths[0]
    reference = Reference(base, count)
    ways = {
        "to nearest": {},
        "with importance": {"imatrix": str(statistics)},
        "gptq": {"hessian": str(hessian), "method": "gptq"},
    }
    for way, given in ways.items():
        path = llmcompress.quantize(model, work / f"{way}.gguf", type="Q2_K", verify="off", **given).paths[0]
        plain, size = reference.mean_kl(path), path.stat().st_size
        print(f"| {model.name} | Q2_K, {way} | {size:,} | {plain:.5f} | | |", flush=True)
        for rank in ranks:
            adapter = work / f"{way}-{rank}.gguf"
            compensate(str(path), model, adapter, CompensationOptions(rank, str(hessian), type="F16"))
            found = reference.mean_kl(path, adapter)
            verdict = ("met" if found <= BAR * plain else "MISSED") if rank == BAR_RANK else ""
            more = adapter.stat().st_size
            print(f"| | and rank {rank} | {size + more:,} | {found:.5f} | {found / plain:.3f} | {verdict} |", flush=True)  # fmt: skip
    for type in LARGER:
        path = llmcompress.quantize(
            model, work / "larger.gguf", type=type, verify="off", imatrix=str(statistics)
        ).paths[0]
        print(f"| | {type}, with importance | {path.stat().st_size:,} | {reference.mean_kl(path):.5f} | | |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", type=Path, default=[path for path in MODELS if path.is_dir()])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens")
    arguments = parser.parse_args()
    print(machine())
    print(f"| model | file | bytes | mean KL | of that without | bar {BAR} at rank {BAR_RANK} |\n|---|---|---:|---:|---:|---|")  # fmt: skip
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            measure_model(model, arguments.ranks, arguments.windows, Path(folder))


if __name__ == "__main__":
    main()
