"""`--max-ram` holds for checkpoints that are decoded, for experts that are fused and turned round, and for a GGUF that is
split or merged: what a job holds does not grow with them, and it writes no byte twice."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic_checkpoint import Llama, write_checkpoint
from tiny_families import MORE
from tiny_models import build

import llmcompress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory in /proc"
    ),
]

# A job on a small model compiles all that the large one needs; then the peak is counted anew.
JOB = """
import json, re, sys
from pathlib import Path
import llmcompress
small, large, out, options = sys.argv[1:]
options = json.loads(options)
number = lambda key, file: int(re.search(f"{key}:[^0-9]*([0-9]+)", Path(f"/proc/self/{file}").read_text())[1])
llmcompress.quantize(small, f"{out}/small.gguf", threads=2, **options)
Path("/proc/self/clear_refs").write_text("5")
before, bytes_before = number("VmRSS", "status"), number("wchar", "io")
llmcompress.quantize(large, f"{out}/large.gguf", threads=2, max_ram="300MiB", **options)
print((number("VmHWM", "status") - before) * 1024, number("wchar", "io") - bytes_before)
"""
MORE_THAN_BEFORE = 80 * 2**20  # bytes; two workers' slabs, and those of columns are four times as large


def gpt_oss(root: Path, folder: Path, experts: int, mxfp4: bool) -> Path:
    """A tiny gpt-oss whose experts are of another number: 3 million weights each."""
    made = build(
        "gpt-oss", folder / "made", {MORE["gpt-oss"][1]: root / "examples" / "sample-llama-6m"}, models=MORE
    )
    tensors, width = load_file(made / "model.safetensors"), 1024
    config = json.loads((made / "config.json").read_text()) | {
        "num_local_experts": experts,
        "intermediate_size": width,
    }
    for name in [name for name in tensors if ".experts." in name or ".router." in name]:
        rows, last = (256, 2 * width) if "gate_up" in name else (width, 256)
        if ".router." in name:
            tensors[name] = torch.randn(experts, *tensors[name].shape[1:])
        elif name.endswith("_bias"):
            tensors[name] = torch.randn(experts, last)
        elif mxfp4:
            del tensors[name]
            tensors[f"{name}_blocks"] = torch.randint(
                0, 256, (experts, last, rows // 32, 16), dtype=torch.uint8
            )
            tensors[f"{name}_scales"] = torch.randint(
                118, 124, (experts, last, rows // 32), dtype=torch.uint8
            )
        else:
            tensors[name] = torch.randn(experts, rows, last).bfloat16()
    if mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    (made / "config.json").write_text(json.dumps(config))
    save_file(tensors, made / "model.safetensors")
    return made


@functools.cache
def plain_gptq(shape: Llama, folder: Path) -> Path:
    """Made once; not to be changed."""
    plain = write_checkpoint(folder / "plain", shape)
    llmcompress.quantize(plain, folder / "made", format="gptq", bits=4, group_size=64)
    shutil.rmtree(plain)
    return folder / "made"


def gptq(folder: Path, shape: Llama, act_order: bool) -> Path:
    made = plain_gptq(shape, folder.parents[1] / f"gptq-{shape.hidden}")
    if not act_order:
        return made
    shutil.copytree(made, folder / "made")
    (file,) = (folder / "made").glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]))].contiguous()
    save_file(tensors, file)
    return folder / "made"


def blocks_of_fp8(folder: Path, shape: Llama) -> Path:
    made = write_checkpoint(folder / "made", shape)
    (file,) = made.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if "proj.weight" in name]:
        weight = tensors.pop(name)
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full([size // 128 for size in weight.shape], 0.01)
    save_file(tensors, file)
    config = json.loads((made / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return made


LARGE = Llama(layers=1, hidden=2048, feed_forward=8192, heads=16)
MADE: dict[str, Callable[[Path, Path, bool], Path]] = {
    "MXFP4 experts": lambda root, folder, large: gpt_oss(root, folder, 48 if large else 4, True),
    "fused experts": lambda root, folder, large: gpt_oss(root, folder, 48 if large else 4, False),
    "GPTQ": lambda root, folder, large: gptq(folder, LARGE if large else Llama(), False),
    "GPTQ, act-order": lambda root, folder, large: gptq(folder, LARGE if large else Llama(), True),
    "FP8 in blocks": lambda root, folder, large: blocks_of_fp8(folder, LARGE if large else Llama()),
}


def measured(small: Path, large: Path, out: Path, **options: Any) -> None:
    """The job in a process of its own: memory above what the small model took, and bytes written for those of the files."""
    arguments = [sys.executable, "-c", JOB, str(small), str(large), str(out), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    more, bytes_written = map(int, done.stdout.split())
    size = sum(file.stat().st_size for file in out.glob("large*.gguf"))
    assert size > 30 * 2**20 and more < MORE_THAN_BEFORE, (
        f"{more / 2**20:.0f} MiB more for {size / 2**20:.0f}"
    )
    assert size <= bytes_written < 1.02 * size + 2**20


@pytest.mark.parametrize("kind", MADE)
def test_what_a_job_holds_does_not_grow_with_a_source(kind: str, root: Path, tmp_path: Path) -> None:
    small, large = (MADE[kind](root, tmp_path / name, name == "large") for name in ("small", "large"))
    measured(small, large, tmp_path, type="Q4_K_M")


def test_a_gguf_is_split_and_merged_without_holding_it(tmp_path: Path) -> None:
    shapes = (("small", Llama()), ("large", LARGE))
    made = [write_checkpoint(tmp_path / name, shape) for name, shape in shapes]
    whole = [
        llmcompress.quantize(model, tmp_path / f"{model.name}.gguf", type="BF16").paths[0] for model in made
    ]
    for folder in ("split", "merged"):
        (tmp_path / folder).mkdir()
    measured(*whole, tmp_path / "split", type="COPY", split_max_size="50M")
    shard = min((tmp_path / "split").glob("large-*.gguf"))
    measured(whole[0], shard, tmp_path / "merged", type="COPY")
    assert (tmp_path / "merged" / "large.gguf").read_bytes() == whole[1].read_bytes()
