"""The example model on text it has not seen: what each file type costs, in the real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Ggml, Model

import llmcompress
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import GRIDS

pytest_plugins = ["sample_files"]
pytestmark = pytest.mark.slow

WINDOW = 512
# Largest rise of perplexity over F32 that is allowed, in percent.
ALLOWED = {
    "F16": 0.05, "BF16": 0.5, "Q8_0": 0.5, "Q6_K": 1, "Q5_K_M": 2, "Q5_K_S": 2, "Q5_1": 2, "Q5_0": 2.5, "Q4_K_M": 5,
    "Q4_K_S": 6, "Q4_1": 8, "Q4_0": 10, "Q3_K_L": 15, "Q3_K_M": 18, "Q3_K_S": 30, "Q2_K": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def windows(root: Path, model: Path) -> list[list[int]]:
    text = (root / "tests" / "data" / "richard-iii.txt").read_text()
    ids = transformers.AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)]


def perplexity(path: Path, windows: list[list[int]]) -> float:
    with Model(path, context=WINDOW) as engine:
        return float(np.exp(np.mean([np.log(engine.perplexity(window)) for window in windows])))


@pytest.fixture(scope="module")
def exact(files: dict[str, Path], windows: list[list[int]]) -> float:
    return perplexity(files["F32"], windows)


def test_f32_perplexity_is_transformers(exact: float, model: Path, windows: list[list[int]]) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(network(torch.tensor([w]), labels=torch.tensor([w])).loss) for w in windows]
    assert exact == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


@pytest.mark.parametrize("name", ALLOWED)
def test_perplexity_rises_no_more_than_the_type_costs(
    name: str, files: dict[str, Path], windows: list[list[int]], exact: float
) -> None:
    assert perplexity(files[name], windows) / exact - 1 < ALLOWED[name] / 100


def rounded_by_ggml(path: Path, exact: Path, to: Path, importance: dict[str, np.ndarray]) -> Path:
    """A copy of the file at `path` with every tensor rounded by ggml in place of llmcompress."""
    to.write_bytes(path.read_bytes())
    ggml = Ggml()
    with GGUFFile.open(exact) as source, GGUFFile.open(to) as target, to.open("r+b") as file:
        for tensor in target.tensors.values():
            if tensor.type.name == "F32":
                continue
            weights = GRIDS["F32"].dequantize(source.read(tensor.name))
            file.seek(tensor.offset)
            file.write(ggml.quantize(weights, tensor.type.id, importance.get(tensor.name)).tobytes())
    return to


@pytest.mark.parametrize("name", ["Q4_K_M", "Q3_K_M", "Q4_0"])
def test_perplexity_is_no_worse_than_with_ggmls_own_rounding(
    name: str, files: dict[str, Path], windows: list[list[int]], tmp_path: Path
) -> None:
    theirs = rounded_by_ggml(files[name], files["F32"], tmp_path / "ggml.gguf", {})
    assert perplexity(files[name], windows) < perplexity(theirs, windows) * 1.02


HOOKED = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_imatrix(path: Path, model: Path, windows: list[list[int]]) -> None:
    """What llama-imatrix would write: sums of squared inputs and counts, taken with hooks."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(module, inputs, output) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].square().sum((0, 1))

        return add

    for i, layer in enumerate(network.model.layers):
        for module, target in HOOKED.items():
            layer.get_submodule(module).register_forward_hook(hook(f"blk.{i}.{target}.weight"))
    with torch.no_grad():
        for window in windows:
            network(torch.tensor([window]))
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["richard-iii.txt"])
    writer.add_uint32("imatrix.chunk_count", len(windows))
    writer.add_uint32("imatrix.chunk_size", WINDOW)
    for name, total in sums.items():
        writer.add_tensor(f"{name}.in_sum2", total.numpy()[None])
        writer.add_tensor(f"{name}.counts", np.array([[len(windows) * WINDOW]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(path: Path, windows: list[list[int]]) -> np.ndarray:
    with Model(path, context=WINDOW) as engine:
        logits = np.concatenate([engine.logits(window) for window in windows]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def imatrix(model: Path, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    write_imatrix(path, model, windows)
    return path


def test_an_importance_matrix_brings_q2_k_closer(
    model: Path, imatrix: Path, windows: list[list[int]], files: dict[str, Path], tmp_path: Path
) -> None:
    """In Kullback-Leibler divergence from the F32 file, on the text the importance was taken from."""
    types, out = ["Q2_K", "Q2_K_S"], tmp_path / "{type}.gguf"
    weighed, small = llmcompress.quantize(model, out, type=types, imatrix=str(imatrix)).paths
    exact = log_probabilities(files["F32"], windows)
    divergence = {
        path: float((np.exp(exact) * (exact - log_probabilities(path, windows))).sum(-1).mean())
        for path in (weighed, files["Q2_K"])
    }
    assert divergence[weighed] < divergence[files["Q2_K"]]
    with Model(small) as engine:  # llama.cpp makes no Q2_K_S without one
        assert engine.meta("quantize.imatrix.file") == "imatrix.gguf"
        assert engine.meta("quantize.imatrix.chunks_count") == str(len(windows))


# With importance: the largest rise of perplexity over F32 in percent.
ALLOWED_WEIGHTED = {
    "IQ2_XXS": 12, "IQ2_XS": 8, "IQ2_S": 8, "IQ2_M": 6, "IQ3_XXS": 5, "IQ3_XS": 3, "IQ3_S": 2, "IQ3_M": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def weighted_files(quantized: Callable[..., dict[str, Path]], imatrix: Path) -> dict[str, Path]:
    return quantized([*ALLOWED_WEIGHTED], imatrix=str(imatrix))


@pytest.mark.parametrize("name", ALLOWED_WEIGHTED)
def test_weighted_perplexity_is_sane_and_no_worse_than_with_ggmls_own_rounding(
    name: str,
    files: dict[str, Path],
    weighted_files: dict[str, Path],
    imatrix: Path,
    windows: list[list[int]],
    exact: float,
    tmp_path: Path,
) -> None:
    sums = {tensor.name: np.array(tensor.data).reshape(-1) for tensor in gguf.GGUFReader(imatrix).tensors}
    importance = {
        name.removesuffix(".in_sum2"): total for name, total in sums.items() if name.endswith(".in_sum2")
    }
    theirs = rounded_by_ggml(weighted_files[name], files["F32"], tmp_path / "ggml.gguf", importance)
    ours = perplexity(weighted_files[name], windows)
    assert ours / exact - 1 < ALLOWED_WEIGHTED[name] / 100
    assert ours < perplexity(theirs, windows) * 1.03
