"""The parts of bench_calibrate.py that evaluate: perplexities side by side, and the time of a comparison."""

from __future__ import annotations

import re
import sys

from against_peers import CHUNK, OURS, PROGRAM, SAMPLE, WINDOWS, Bench, printed_json
from measure import middle

# Perplexity as transformers' guide has it, in windows that do not overlap, and in llama-perplexity's windows.
TRANSFORMERS = """import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, chunk = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
text = open(file, encoding="utf-8", newline="").read()
def windows(text):
    ids = tokenizer(text).input_ids
    return [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
@torch.no_grad()
def perplexity(rows, first):
    total = count = 0
    for row in rows:
        logits, targets = model(torch.tensor([row])).logits[0, first:-1], torch.tensor(row[first + 1 :])
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        count += len(targets)
    return torch.tensor(total / count).double().exp().item()
guide = [row for row in windows(text) if len(row) > 1]
halves = [row for row in windows(text.removesuffix("\\n")) if len(row) == chunk]
starts = tokenizer("").input_ids[:1]
halves = [starts + row[len(starts) :] for row in halves]
print(json.dumps({"transformers": perplexity(guide, 0), "llama.cpp": perplexity(halves, chunk // 2)}, indent=1))"""


def perplexity(bench: Bench) -> None:
    text, gguf = bench.given.text, bench.gguf(SAMPLE, "F32")
    _, printed = bench.run([sys.executable, "-c", TRANSFORMERS, SAMPLE, text, str(CHUNK)])
    transformers = printed_json(printed)
    for style, expected in transformers.items():
        options = ["--data", text, "--windows", style, "--chunk", str(CHUNK), "--json"]
        _, printed = bench.run([*PROGRAM, "evaluate", gguf, "--reference", SAMPLE, *options])
        found = printed_json(printed)["figures"]["perplexity"]["value"]
        judge_perplexity(bench, f"{style} windows", found, "transformers on the checkpoint", expected, 1e-4)
    if bench.given.llama_bin:
        _, printed = bench.run(bench.llama("perplexity", gguf, text))
        theirs = float(re.search(r"Final estimate: PPL = ([\d.]+)", printed)[1])
        judge_perplexity(bench, "llama.cpp windows", found, "llama-perplexity", theirs, 5e-3)


def judge_perplexity(bench: Bench, where: str, found: float, name: str, expected: float, bar: float) -> None:
    apart = abs(found - expected) / expected
    what = f"perplexity of an F32 GGUF, {where}, beside {name}"
    bench.bar(what, f"{found:.4f}, {expected:.4f}: {apart:.1e} apart", f"{bar:.0e} relative", apart <= bar)


def compare(bench: Bench) -> None:
    """One command of ours, two of llama-perplexity: it writes the model's probabilities, then compares."""
    text, gguf = bench.given.text, bench.gguf(SAMPLE, "Q4_K_M")
    ours = [*PROGRAM, "evaluate", gguf, "--reference", SAMPLE, "--data", text, *WINDOWS, "--json"]
    base = ["--kl-divergence-base", bench.work / "base.kld"]
    mine, peers = [], []
    for _ in range(bench.given.repeat):
        cost, printed = bench.run(ours)
        mine.append(cost)
        if bench.given.llama_bin:
            saved, _ = bench.run(bench.llama("perplexity", bench.gguf(SAMPLE, "F32"), text, *base))
            compared, theirs = bench.run(bench.llama("perplexity", gguf, text, *base, "--kl-divergence"))
            peers.append(saved.then(compared))
    report = printed_json(printed)
    bench.row(f"compare a Q4_K_M file: {OURS}, median of {len(mine)}", middle(mine), report["tokens"])
    if peers:
        name = f"compare a Q4_K_M file: llama-perplexity twice, median of {len(peers)}"
        bench.row(name, middle(peers), report["tokens"])
        ratio = middle(peers).seconds / middle(mine).seconds
        kl = float(re.search(r"Mean\s+KLD:\s+(\S+)", theirs)[1])
        measured = f"{ratio:.2f}; mean KL {report['figures']['mean_kl']['value']:.6f}, llama.cpp {kl:.6f}"
        bench.bar("compare a Q4_K_M file, whole process: speed over llama-perplexity", measured, "none", None)
