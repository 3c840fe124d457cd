"""GPTQ checkpoints, read back by a decoder written from the format's description and by the real auto-gptq."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import auto_gptq_peer
import numpy as np
import pytest
import torch
import transformers
from gptq_decoder import decoded, fields, modules_of, tensors_of, write_dequantized
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.to_checkpoint import plan_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from synthetic_checkpoint import Llama, poke, write_checkpoint
from tiny_families import MORE
from tiny_models import build
from typer.testing import CliRunner

import llmcompress
from llmcompress.cli import app
from llmcompress.errors import LlmcompressError, PlanError, RecipeError, RunError
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe

SAMPLE = "examples/sample-llama-6m"


def weights_of(folder: Path, name: str) -> np.ndarray:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name).float().numpy()
    raise KeyError(name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def hessian(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XᵀX of the sample model, of few tokens."""
    folder = tmp_path_factory.mktemp("hessian")
    options = CalibrationOptions(tokens=8192)
    calibrate_model(root / SAMPLE, folder / "sums.gguf", options, Progress(), folder / "products")
    return folder / "products"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_an_independent_decoder_reads_the_weights(
    bits: int, group: int, sym: bool, small: Path, tmp_path: Path
) -> None:
    result = llmcompress.quantize(
        small, tmp_path / "out", format="gptq", bits=bits, group_size=group, sym=sym
    )
    tensors, config = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    settings = config["quantization_config"]
    assert settings == json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (bits, group, sym)
    version = settings["checkpoint_format"]
    assert version == settings["format"] == ("gptq" if sym else "gptq_v2")
    reports = {tensor.name: tensor for tensor in result.outputs[0].tensors}
    modules = modules_of(tensors)
    assert len(modules) == 14 and not any("lm_head" in module for module in modules)
    for module in modules:
        weights = weights_of(small, f"{module}.weight").astype(np.float64)
        values = decoded(tensors, module, bits, version)
        assert values.shape == weights.shape and f"{module}.weight" not in tensors
        error = np.sqrt(((values - weights) ** 2).sum() / (weights**2).sum())
        assert abs(error - reports[module].relative_error) < 1e-4 * error
        assert error < {2: 0.45, 3: 0.25, 4: 0.13, 8: 0.01}[bits]
        assert reports[module].rows_checked == len(weights)
        size = weights.shape[1] if group == -1 else group
        assert np.array_equal(tensors[f"{module}.g_idx"], np.arange(weights.shape[1]) // size)
        if sym:
            zeros = fields(np.ascontiguousarray(tensors[f"{module}.qzeros"].T), bits)
            assert (zeros == 2 ** (bits - 1) - 1).all()


def test_symmetric_zeros_are_the_words_every_reader_knows(small: Path, tmp_path: Path) -> None:
    for bits, word in ((2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)):
        llmcompress.quantize(small, tmp_path / str(bits), format="gptq", bits=bits)
        tensors = tensors_of(tmp_path / str(bits))
        for module in modules_of(tensors):
            assert (tensors[f"{module}.qzeros"].view(np.uint32) == word).all()


def test_all_else_is_copied_byte_for_byte_into_as_many_files_as_asked(small: Path, tmp_path: Path) -> None:
    llmcompress.quantize(small, tmp_path / "one", format="gptq")
    llmcompress.quantize(small, tmp_path / "many", format="gptq", split_max_size=200_000)
    one, many, source = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many"), tensors_of(small)
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)
    kept = [name for name in source if name in one]
    assert len(kept) == 7 and all(source[name].tobytes() == one[name].tobytes() for name in kept)
    listed = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(shards) > 3 and {path.name for path in shards} == set(listed["weight_map"].values())
    assert listed["metadata"]["total_size"] == sum(value.nbytes for value in many.values())
    for path in shards:
        assert all(listed["weight_map"][name] == path.name for name in load_names(path))
    for file in small.glob("tokenizer*"):
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "one/config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((small / "config.json").read_text())


def load_names(path: Path) -> list[str]:
    with safe_open(path, "np") as tensors:
        return list(tensors.keys())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"desc_act": True}, {"bits": 3, "group_size": -1}, {"bits": 2, "sym": False}]
)
def test_error_feedback_is_never_worse_than_nearest_with_the_same_search(
    options: dict, root: Path, hessian: Path, tmp_path: Path
) -> None:
    bits, sym = options.get("bits", 4), options.get("sym", True)
    result = llmcompress.quantize(
        root / SAMPLE, tmp_path / "fed", format="gptq", hessian=str(hessian), **options
    )
    nearest_options = {name: value for name, value in options.items() if name != "desc_act"}
    source = hessian.parent / "sums.gguf"  # the importance matrix of the same tokens
    llmcompress.quantize(
        root / SAMPLE, tmp_path / "nearest", format="gptq", imatrix=str(source), **nearest_options
    )
    assert {tensor.method for tensor in result.outputs[0].tensors if tensor.rows_checked} == {"gptq"}
    fed, nearest = tensors_of(tmp_path / "fed"), tensors_of(tmp_path / "nearest")
    version, index = "gptq" if sym else "gptq_v2", json.loads((hessian / "index.json").read_text())["weights"]
    shares = []
    for module in modules_of(fed):
        weights = weights_of(root / SAMPLE, f"{module}.weight").astype(np.float64)
        (place,) = index[GGUF_NAMES[module.split(".", 3)[3]].format(module.split(".")[2])]
        products = load_file(hessian / place["file"])["products"][place["matrix"]].astype(np.float64)
        errors = []
        for tensors in (fed, nearest):
            error = decoded(tensors, module, bits, version) - weights
            errors.append(((error @ products) * error).sum(1))
        assert (errors[0] <= errors[1] * 1.0001).all()
        shares.append(errors[0].sum() / errors[1].sum())
    assert np.exp(np.mean(np.log(shares))) < 0.6


GGUF_NAMES = {
    "self_attn.q_proj": "blk.{}.attn_q.weight", "self_attn.k_proj": "blk.{}.attn_k.weight",
    "self_attn.v_proj": "blk.{}.attn_v.weight", "self_attn.o_proj": "blk.{}.attn_output.weight",
    "mlp.gate_proj": "blk.{}.ffn_gate.weight", "mlp.up_proj": "blk.{}.ffn_up.weight",
    "mlp.down_proj": "blk.{}.ffn_down.weight",
}  # fmt: skip


@pytest.mark.slow
def test_calibrating_on_the_way_gives_what_a_saved_calibration_gives(
    root: Path, hessian: Path, tmp_path: Path
) -> None:
    llmcompress.quantize(root / SAMPLE, tmp_path / "saved", format="gptq", hessian=str(hessian))
    result = llmcompress.quantize(
        root / SAMPLE, tmp_path / "live", format="gptq", calibrate=True, tokens=8192
    )
    saved, live = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "live")
    assert saved.keys() == live.keys()
    assert {tensor.method for tensor in result.outputs[0].tensors if tensor.rows_checked} == {"gptq"}
    assert all(np.array_equal(saved[name], live[name]) for name in saved)


def test_every_expert_has_its_own_name_however_the_checkpoint_has_them(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, pattern in (
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2"),
        ("qwen3moe", "model.layers.1.mlp.experts.7.down_proj"),
    ):
        found = []
        for layout in (name, f"{name}-fused"):
            llmcompress.quantize(tiny(layout), tmp_path / layout, format="gptq", group_size=32)
            found.append(tensors_of(tmp_path / layout))
        single, fused = found
        assert pattern in modules_of(single) and modules_of(single) == modules_of(fused)
        assert all(np.array_equal(single[key], fused[key]) for key in single if ".experts." in key)
        assert not any("gate.qweight" in key for key in single)
        assert single.keys() == fused.keys()
        settings = json.loads((tmp_path / name / "quantize_config.json").read_text())
        assert any("gate" in rule for rule in settings["dynamic"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek3", "glm4moe"])
def test_whole_linears_where_the_gguf_cuts_them_and_patterns_of_what_is_no_code(
    name: str, root: Path, tmp_path: Path
) -> None:
    """llama.cpp has kv_b_proj in two parts; a part that predicts further tokens has layers called like the model's."""
    make, kind = MORE[name]
    make = replace(make, values=make.values | {"qk_rope_head_dim": 32}) if name == "deepseek3" else make
    folder = build(name, tmp_path / "tiny", {kind: root / SAMPLE}, models={name: (make, kind)})
    if name == "glm4moe":
        tensors = load_torch(folder / "model.safetensors")
        last = {key: value.clone() for key, value in tensors.items() if key.startswith("model.layers.1.")}
        further = {key.replace("layers.1.", "layers.2."): value for key, value in last.items()}
        save_torch(tensors | further, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
        (folder / "config.json").write_text(json.dumps(config))
    llmcompress.quantize(folder, tmp_path / "out", format="gptq", bits=8, group_size=32)
    found = tensors_of(tmp_path / "out")
    modules = modules_of(found)
    assert any("kv_b_proj" in module for module in modules) == (name == "deepseek3")
    for module in modules:
        weights, values = weights_of(folder, f"{module}.weight"), decoded(found, module, 8, "gptq")
        assert values.shape == weights.shape and np.abs(values - weights).max() < 0.01 * np.abs(weights).max()
    rules = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    left_out = re.compile("|".join(rule.removeprefix("-:") for rule in rules))
    assert not any(left_out.match(module) for module in modules)
    matrices = {
        key.removesuffix(".weight")
        for key, value in found.items()
        if key.endswith(".weight") and value.ndim == 2
    }
    for module in matrices - {"model.embed_tokens"}:
        assert left_out.match(module), module


def test_gpt2s_transposed_linears_become_rows_of_outputs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    llmcompress.quantize(tiny("gpt2"), tmp_path / "out", format="gptq", bits=8)
    tensors = tensors_of(tmp_path / "out")
    weights = weights_of(tiny("gpt2"), "transformer.h.0.attn.c_attn.weight").T
    values = decoded(tensors, "transformer.h.0.attn.c_attn", 8, "gptq")
    assert values.shape == weights.shape and np.abs(values - weights).max() < 0.01 * np.abs(weights).max()
    assert "transformer.h.0.attn.c_attn.bias" in tensors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 5}, "bits: 5 is none of 2, 3, 4, 8"),
        ({"group_size": 100}, "group_size: 100 is none of 32, 64, 128, -1"),
        ({"format": "awq"}, "'awq' is none of gguf, gptq, nf4, fp4, int8"),
        ({"type": "Q8_0"}, "types: means nothing to the format gptq"),
        ({"pure": True}, "pure: means nothing to the format gptq"),
        ({"format": "gguf", "bits": 3}, "bits: means nothing to the format gguf"),
        ({"desc_act": True}, "desc_act: the order is that of the inputs: add --calibrate"),
        ({"sym": "yes"}, "sym: cannot be 'yes'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict, message: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        llmcompress.quantize(small, tmp_path / "out", **{"format": "gptq"} | options)
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_divide_are_refused_by_name_and_numbers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", Llama(hidden=192, feed_forward=416, heads=4, kv_heads=1))
    with pytest.raises(PlanError, match=r"self_attn.k_proj: 48 outputs are not a multiple of 32"):
        plan_checkpoint(model, tmp_path / "out", Recipe(format="gptq", group_size=64))
    model = write_checkpoint(tmp_path / "other", Llama(hidden=192, feed_forward=416, heads=2, kv_heads=1))
    with pytest.raises(
        PlanError, match=r"(proj: 192 inputs are|proj: 416 inputs are) not a multiple of 128; choose"
    ):
        plan_checkpoint(model, tmp_path / "out", Recipe(format="gptq"))
    plan_checkpoint(model, tmp_path / "out", Recipe(format="gptq", group_size=32))


def test_a_folder_appears_whole_or_not_at_all(small: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(small, model)
    poke(model, "model.layers.1.mlp.down_proj.weight", 5, float("nan"))
    with pytest.raises(RunError, match=r"down_proj.weight' holds a NaN or infinity \(row 0, column 5\)"):
        llmcompress.quantize(model, tmp_path / "out", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(LlmcompressError, match="is there already"):
        llmcompress.quantize(small, tmp_path / "out", format="gptq")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_a_killed_run_left_is_replaced(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/model.safetensors").write_bytes(b"torn")
    llmcompress.quantize(small, tmp_path / "out", format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_line(small: Path, tmp_path: Path) -> None:
    run = CliRunner()
    command = [
        "quantize",
        str(small),
        "-o",
        str(tmp_path / "{name}-{type}"),
        "--format",
        "gptq",
        "--bits",
        "3",
    ]
    planned = run.invoke(app, [*command, "--no-sym", "--group-size", "64", "--dry-run"])
    assert planned.exit_code == 0 and "q_proj" in planned.stdout and not list(tmp_path.glob("model-*"))
    done = run.invoke(app, [*command, "--no-sym", "--group-size", "64", "--json"])
    assert done.exit_code == 0, done.output
    (output,) = json.loads(done.stdout)["outputs"]
    assert (
        output["type"] == "GPTQ-3bit-64g-asym"
        and (tmp_path / "model-GPTQ-3bit-64g-asym/config.json").is_file()
    )
    assert run.invoke(app, ["convert", str(small), "--format", "gptq"]).exit_code == 2


READ_BY_AUTO_GPTQ = (
    {}, {"group_size": 32, "split_max_size": 10**6}, {"bits": 3, "group_size": 64}, {"bits": 8},
    {"bits": 2, "group_size": -1}, {"sym": False},
)  # fmt: skip


@pytest.mark.skipif(bool(auto_gptq_peer.missing()), reason=auto_gptq_peer.missing())
@pytest.mark.slow
def test_auto_gptq_computes_the_logits_of_the_dequantized_model(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source, tokens = tiny("llama"), [1, 5, 300, 17, 250, 99, 4, 77]
    folders = [tmp_path / str(number) for number in range(len(READ_BY_AUTO_GPTQ))]
    for folder, options in zip(folders, READ_BY_AUTO_GPTQ):
        llmcompress.quantize(source, folder, format="gptq", **options)
        write_dequantized(folder, source, folder.with_suffix(".plain"))
        if not options.get("sym", True):
            store_as_first_version(folder, modules_of(tensors_of(folder)), 4)
    auto_gptq_peer.run("logits", tmp_path / "logits.npy", ",".join(map(str, tokens)), *folders)
    for dtype, by_folder in zip(auto_gptq_peer.DTYPES, np.load(tmp_path / "logits.npy"), strict=True):
        for folder, options, found in zip(folders, READ_BY_AUTO_GPTQ, by_folder, strict=True):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder.with_suffix(".plain"), dtype=getattr(torch, dtype)
            )
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
            if dtype == "float32":
                assert np.array_equal(found, expected), options
            else:  # the same weights, but products of float16 are summed in another order
                assert np.abs(found - expected).max() < 0.004 * np.abs(expected).max(), options


BY_GPTQMODEL = """
import sys, numpy, torch, transformers
config = transformers.GPTQConfig(bits=4, backend="gptq_torch")
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.float32, device_map="cpu")
assert any("Linear" in type(m).__name__ and hasattr(m, "qweight") for m in model.modules())
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[int(word) for word in sys.argv[3:]]])).logits
numpy.save(sys.argv[2], logits[0].float().numpy())
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gptqmodel", "optimum")),
    reason="needs gptqmodel 7 and optimum, 1.5 GB together",
)
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"sym": False}], ids=str)
def test_transformers_reads_checkpoints_with_gptqmodel(
    options: dict, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source, tokens = tiny("llama"), [1, 5, 300, 17, 250, 99, 4, 77]
    llmcompress.quantize(source, tmp_path / "gptq", format="gptq", **options)
    write_dequantized(tmp_path / "gptq", source, tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    arguments = [tmp_path / "gptq", tmp_path / "logits.npy", *map(str, tokens)]
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", BY_GPTQMODEL, *arguments], env=environment, check=True)
    found = np.load(tmp_path / "logits.npy")
    assert np.abs(found - expected).max() < 0.002 * np.abs(expected).max()  # it sums in another order


def store_as_first_version(folder: Path, modules: list[str], bits: int) -> None:
    """auto-gptq 0.7.1 knows no second version: take one from every zero, each within its own bits."""
    tensors = load_torch(folder / "model.safetensors")
    top = np.uint32(2**bits - 1)
    for module in modules:
        zeros = tensors[f"{module}.qzeros"].numpy().view(np.uint32)
        less = np.zeros_like(zeros)
        for place in range(0, 32, bits):
            less |= (((zeros >> np.uint32(place)) - np.uint32(1)) & top) << np.uint32(place)
        tensors[f"{module}.qzeros"] = torch.from_numpy(less.view(np.int32))
    save_torch(tensors, folder / "model.safetensors", {"format": "pt"})
