"""Jobs on quantized checkpoints, which look like plain ones, and what is refused of them."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.torch import load_file, save_file
from synthetic_checkpoint import Llama, write_checkpoint

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError
from llmcompress.inspect import inspect
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.sources import FORMATS
from llmcompress.sources.stored import DecodedTensor

PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def gptq(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "model"
    llmcompress.quantize(plain, folder, format="gptq", bits=4, group_size=64)
    return folder


def rewritten(folder: Path, source: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a checkpoint whose tensors `change` has changed."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def dequantized(folder: Path, source: Path) -> Path:
    """The plain checkpoint that a quantized one stands for."""
    shutil.copytree(source, folder)
    tensors = {}
    with Checkpoint.open(source) as checkpoint:
        for name, tensor in checkpoint.index.items():
            values = torch.from_numpy(checkpoint.read(name)).reshape(tensor.shape)
            tensors[name] = values.view(torch.bfloat16) if tensor.dtype == "BF16" else values
        (folder / "config.json").write_text(json.dumps(checkpoint.config))
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file)
    return folder


def test_a_decoded_checkpoint_looks_like_the_plain_one(plain: Path, gptq: Path) -> None:
    with Checkpoint.open(plain) as before, Checkpoint.open(gptq) as after:
        assert {name: tensor.shape for name, tensor in after.index.items()} == {
            name: tensor.shape for name, tensor in before.index.items()
        }
        assert after.notes == ["decoded from GPTQ 4-bit, group 64 (14 weights)"] and not before.notes
        assert after.config == before.config
        whole = after.read(f"{PROJ}.weight")
        assert isinstance(after.index[f"{PROJ}.weight"], DecodedTensor) and whole.dtype == np.float16
        for first, rows in ((0, 1), (5, 70), (255, 1), (32, 0)):
            assert np.array_equal(after.read(f"{PROJ}.weight", first, rows), whole[first : first + rows])
        assert after.read_bytes(f"{PROJ}.weight", 1001, 3001) == whole.tobytes()[1001:4002]


def test_every_job_gives_what_it_gives_for_the_dequantized_model(gptq: Path, tmp_path: Path) -> None:
    plain = dequantized(tmp_path / "plain", gptq)
    for types in ("Q4_K_M", "Q8_0", "auto"):
        results = [
            llmcompress.quantize(source, tmp_path / f"{name}.gguf", type=types, name="model")
            for name, source in (("decoded", gptq), ("plain", plain))
        ]
        decoded, expected = (result.paths[0].read_bytes() for result in results)
        assert decoded == expected
        assert [note for note in results[0].notes if note not in results[1].notes] == [
            "decoded from GPTQ 4-bit, group 64 (14 weights)"
        ]
    sums = []
    for name, source in (("decoded", gptq), ("plain", plain)):
        report = calibrate_model(
            source, tmp_path / f"{name}.dat", CalibrationOptions(tokens=1024), Progress()
        )
        sums.append(report.statistics.entries)
    assert sums[0].keys() == sums[1].keys()
    assert all(np.array_equal(entry.squares, sums[1][name].squares) for name, entry in sums[0].items())
    options = EvaluationOptions(tokens=512, chunk=256, data=("prose",))
    found = evaluate_model(str(gptq), str(plain), options, Progress())
    assert found.evaluation.figures["mean_kl"].value == 0
    assert "decoded from GPTQ 4-bit, group 64 (14 weights)" in found.notes
    again = llmcompress.quantize(gptq, tmp_path / "again", format="gptq", bits=8, group_size=128)
    assert again.outputs[0].worst(1)[0].relative_error < 0.01
    assert "quantization_config" in json.loads((tmp_path / "again/config.json").read_text())


def test_inspect_and_plan_say_what_the_source_is(gptq: Path, tmp_path: Path) -> None:
    found = inspect(gptq)
    (row,) = [row for row in found.tensors if row.name == f"{PROJ}.weight"]
    assert (row.shape, row.type) == ((256, 256), "GPTQ 4-bit, group 64")
    assert row.nbytes == 256 * 256 // 2 + 4 * 256 // 2 + 4 * 256 * 2 + 256 * 4
    assert found.tensor_bytes == inspect(gptq / "model.safetensors").tensor_bytes
    plan = plan_gguf(gptq, tmp_path / "out.gguf", Recipe())
    assert plan.notes.count("decoded from GPTQ 4-bit, group 64 (14 weights)") == 1


def test_settings_of_the_codes_are_not_those_of_what_is_made_of_them(gptq: Path, tmp_path: Path) -> None:
    """Settings of the text part, and the file that modelopt keeps beside config.json."""
    folder = rewritten(tmp_path / "model", gptq, lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    config["text_config"] = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    llmcompress.quantize(folder, tmp_path / "out", format="nf4")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["text_config"] == {"model_type": "llama"}
    assert made["quantization_config"]["quant_method"] == "bitsandbytes"
    assert (
        not (tmp_path / "out" / "hf_quant_config.json").exists()
        and (folder / "hf_quant_config.json").exists()
    )


def test_modules_that_stayed_plain_and_names_of_experts(gptq: Path, plain: Path, tmp_path: Path) -> None:
    """Mixed checkpoints: each module is what its own tensors make it."""
    with Checkpoint.open(plain) as checkpoint:
        weight = torch.from_numpy(checkpoint.read(f"{PROJ}.weight")).view(torch.bfloat16)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{PROJ}.{part}"]
        tensors[f"{PROJ}.weight"] = weight
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            name = "model.layers.0.mlp.up_proj"
            tensors[f"model.layers.0.mlp.experts.12.up_proj.{part}"] = tensors.pop(f"{name}.{part}")

    with Checkpoint.open(rewritten(tmp_path / "mixed", gptq, change)) as mixed:
        assert not isinstance(mixed.index[f"{PROJ}.weight"], DecodedTensor)
        assert mixed.index["model.layers.0.mlp.experts.12.up_proj.weight"].shape == (512, 256)
        assert mixed.notes == ["decoded from GPTQ 4-bit, group 64 (13 weights)"]


def wrong(name: str, values: torch.Tensor | None) -> Callable[[dict], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if values is None:
            del tensors[name]
        else:
            tensors[name] = values

    return change


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("scales", None, r"no tensor '.*q_proj.scales', which a quantized weight needs"),
        ("qzeros", None, r"no tensor '.*q_proj.qzeros'"),
        ("qweight", torch.zeros(32, 256), "is F32, not I32"),
        ("qweight", torch.zeros(31, 256, dtype=torch.int32), "31 words to a column"),
        ("qweight", torch.zeros(32, dtype=torch.int32), "not matrices"),
        ("scales", torch.zeros(4, 255, dtype=torch.float16), r"shape \[4, 255\], its weight makes that \[4, 256\]"),
        ("scales", torch.zeros(0, 256, dtype=torch.float16), "shape"),
        ("scales", torch.zeros(4, 256, dtype=torch.float64), "is F64"),
        ("qzeros", torch.zeros(4, 31, dtype=torch.int32), r"makes that \[4, 32\]"),
        ("weight", torch.zeros(256, 256), "is there beside"),
    ],
)  # fmt: skip
def test_parts_that_are_missing_or_do_not_fit(part, values, message, gptq: Path, tmp_path: Path) -> None:
    folder = rewritten(tmp_path / "wrong", gptq, wrong(f"{PROJ}.{part}", values))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("g_idx", torch.full((256,), 4, dtype=torch.int32), "groups from 4 to 4, there are 4"),
        ("g_idx", torch.full((256,), -1, dtype=torch.int32), "groups from -1 to -1"),
        ("scales", torch.full((4, 256), torch.inf, dtype=torch.float16), "decodes to a NaN, an infinity"),
        ("scales", torch.full((4, 256), 60000.0, dtype=torch.float16), "beyond the largest F16"),
    ],
)
def test_values_that_decode_to_nothing(part, values, message, gptq: Path, tmp_path: Path) -> None:
    folder = rewritten(tmp_path / "wrong", gptq, wrong(f"{PROJ}.{part}", values))
    with pytest.raises(CheckpointError, match=message):
        llmcompress.quantize(folder, tmp_path / "out.gguf", type="Q8_0")


@pytest.mark.slow
def test_reading_holds_no_more_than_a_slab_beside_the_result(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", Llama(layers=1, hidden=2048, feed_forward=8192, heads=16))
    llmcompress.quantize(folder, tmp_path / "gptq", format="gptq", bits=4, group_size=64)
    name = "model.layers.0.mlp.down_proj.weight"
    with Checkpoint.open(tmp_path / "gptq") as checkpoint:
        checkpoint.read(name, 0, 1)  # compiles
        tracemalloc.start()
        size = checkpoint.read(name).nbytes
        peak = tracemalloc.get_traced_memory()[1] - size
        tracemalloc.stop()
    assert size == 2048 * 8192 * 2 and peak < 12 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_an_nf4_base_of_qlora_runs_in_llama_cpp(double: bool, tiny, tmp_path: Path) -> None:
    """What llama.cpp's converter refuses: the logits are those of transformers on the dequantized weights."""
    pytest.importorskip("bitsandbytes")
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    source = tiny("llama")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config
    )
    folder = tmp_path / "nf4"
    network.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    (path,) = llmcompress.quantize(folder, tmp_path / "model.gguf", type="F32").paths
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if hasattr(parameter, "quant_state"):
                plain.get_parameter(name).copy_(dequantize_4bit(parameter.data, parameter.quant_state))
        tokens = [1, 5, 300, 17, 250, 99, 4, 77]
        expected = plain(input_ids=torch.tensor([tokens])).logits[0].numpy()
    with Model(path) as model:
        found = model.logits(tokens)
    assert np.abs(found - expected).max() < 1e-3 * np.ptp(expected)
    llmcompress.quantize(folder, tmp_path / "small.gguf", type="Q4_K_M")


def test_the_readme_lists_every_format(root: Path) -> None:
    table = (root / "README.md").read_text().split("## Quantized sources")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)[1:]
    assert set(re.findall(r"`([\w-]+)`", "".join(rows))) == set(FORMATS)
