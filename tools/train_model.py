"""Train a small Gemma 3 on a CPU: a third family beside the two sample models, for benchmarks.

    python tools/train_model.py OUT
    python tools/train_model.py OUT --tokens 6500000 --minutes 45

Takes the text of ../shared/corpora/sample-train (its SOURCE.txt names what it is of) and the tokenizer of
examples/sample-llama-6m (CC0). The model is as large as that one: 5.8 million parameters, hidden 256, feed-forward
768, 6 layers, 4 heads of 64, 2 of them for keys, tied embeddings; the last layer sees all tokens, the others 128. OUT
becomes a folder that `llmcompress quantize` takes, with bf16 weights, and is made whole or not at all.

The rate falls to nothing as the tokens or the minutes run out, whichever is first; where the minutes decide, the same
command gives another model on another machine.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples" / "sample-llama-6m"
TEXT = ROOT.parent / "shared" / "corpora" / "sample-train" / "train.txt"
ROWS, LENGTH = 8, 256
RATE, WARM_UP = 2e-3, 0.02  # of AdamW; the part of the training in which it climbs
SAID_EVERY = 100  # steps


def gemma3(vocabulary: int) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=128,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=None,
            attn_implementation="eager",
        )
    )


def token_ids(text: Path) -> torch.Tensor:
    """The whole text as one row of tokens, encoded in pieces that end with a line."""
    tokenizer, ids = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")), []
    with open(text, encoding="utf-8") as lines:
        while piece := lines.readlines(1 << 20):
            ids.append(np.array(tokenizer.encode("".join(piece), add_special_tokens=False).ids, np.int64))
    return torch.from_numpy(np.concatenate(ids))


def train(model: Gemma3ForCausalLM, ids: torch.Tensor, tokens: int, minutes: float) -> None:
    """On windows drawn at random, ROWS of LENGTH + 1 tokens a step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    drawn, started, step, done, losses = torch.Generator().manual_seed(0), time.monotonic(), 0, 0.0, []
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
        first = torch.randint(len(ids) - LENGTH, (ROWS,), generator=drawn)
        rows = ids[first[:, None] + torch.arange(LENGTH + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, spent = step + 1, time.monotonic() - started
        done = max(step * ROWS * LENGTH / tokens, spent / (60 * minutes))
        losses.append(loss.item())
        if step % SAID_EVERY == 0 or done >= 1:
            mean = sum(losses) / len(losses)
            print(f"{step * ROWS * LENGTH:>9,} tokens  {spent:6.0f} s  loss {mean:.3f}", flush=True)
            losses.clear()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=6_500_000)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} is there already")
    torch.manual_seed(given.seed)
    ids = token_ids(given.text)
    model = gemma3(Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).get_vocab_size())
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, text of {len(ids):,} tokens", flush=True
    )
    train(model.train(), ids, given.tokens, given.minutes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent) as work:
        made = Path(work) / "model"
        model.to(torch.bfloat16).save_pretrained(made)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TOKENIZER / name, made / name)
        made.rename(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
