"""bitsandbytes checkpoints: tensors held against bitsandbytes' own, and loaded by transformers as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from synthetic_checkpoint import Llama, poke, write_checkpoint
from typer.testing import CliRunner

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.cli import app
from llmcompress.errors import PlanError, RecipeError, RunError

functional = pytest.importorskip("bitsandbytes.functional")
SAMPLE = "examples/sample-llama-6m"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOKENS = [[1, 5, 300, 17, 250, 99, 4, 77, 12, 8, 301, 44]]
# Rows of 40 and 104: blocks of 64 run on from row to row, and the last one may be short.
ODD = Llama(layers=2, hidden=40, feed_forward=105, heads=4, kv_heads=1)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return found


def modules_of(source: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in source if "_proj.weight" in name]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


@pytest.fixture(scope="module", params=["F32", "BF16", "F16"])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a row of zeros, a constant block, an outlier, weights below float16, in each dtype."""
    folder = write_checkpoint(tmp_path_factory.mktemp("odd") / request.param, ODD, request.param)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[request.param]
    (folder / "config.json").write_text(json.dumps(config))
    for index in range(105):
        poke(folder, "model.layers.0.mlp.down_proj.weight", 105 * 3 + index, 0.0)
        poke(folder, "model.layers.0.mlp.down_proj.weight", 105 * 5 + index, 0.25)
        poke(folder, "model.layers.0.mlp.down_proj.weight", 105 * 7 + index, 1e-7 * index)
    poke(folder, "model.layers.0.mlp.down_proj.weight", 105 * 9, 60.0)
    for index in range(40):  # the short last block
        poke(folder, "model.layers.1.mlp.down_proj.weight", 105 * 40 - 1 - index, 0.0)
    return folder


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_own_to_the_last_bit(
    format: str, double: bool, odd: Path, tmp_path: Path
) -> None:
    result = llmcompress.quantize(odd, tmp_path / "out", format=format, double_quant=double)
    source, found = tensors_of(odd), tensors_of(tmp_path / "out")
    for module in modules_of(source):
        name = f"{module}.weight"
        codes, state = functional.quantize_4bit(
            source.pop(name), quant_type=format, compress_statistics=double
        )
        assert same(found.pop(name), codes)
        for key, value in state.as_dict(packed=True).items():
            assert same(found.pop(f"{name}.{key}"), value), (module, key)
    assert found.keys() == source.keys() and all(same(found[name], source[name]) for name in found)
    assert {tensor.type for tensor in result.outputs[0].tensors if tensor.rows_checked} == {format.upper()}
    assert any("14 linears have outputs that are no multiple of 32" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_codes_stored_as_other_types_are_bitsandbytes_own(storage: str, odd: Path, tmp_path: Path) -> None:
    """Compared as bytes: as numbers, some are NaN."""
    llmcompress.quantize(odd, tmp_path / "out", format="nf4", storage=storage)
    source, found = tensors_of(odd), tensors_of(tmp_path / "out")
    for module in modules_of(source):
        dtype = getattr(torch, storage)
        codes, state = functional.quantize_4bit(
            source[f"{module}.weight"], quant_type="nf4", quant_storage=dtype
        )
        own = found[f"{module}.weight"]
        assert own.dtype == codes.dtype == dtype and own.shape == codes.shape
        assert torch.equal(own.view(torch.uint8), codes.view(torch.uint8))
        with Checkpoint.open(tmp_path / "out") as decoded:
            values = torch.from_numpy(np.ascontiguousarray(decoded.read(f"{module}.weight")).view(np.uint8))
        assert torch.equal(values, functional.dequantize_4bit(codes, state).view(torch.uint8))


def test_eight_bits_are_bitsandbytes_own_to_the_last_bit(odd: Path, tmp_path: Path) -> None:
    llmcompress.quantize(odd, tmp_path / "out", format="int8")
    source, found = tensors_of(odd), tensors_of(tmp_path / "out")
    for module in modules_of(source):
        codes, scales, _ = functional.int8_vectorwise_quant(source.pop(f"{module}.weight").half())
        assert same(found.pop(f"{module}.weight"), codes) and same(found.pop(f"{module}.SCB"), scales)
        assert same(found.pop(f"{module}.weight_format"), torch.tensor(0, dtype=torch.uint8))
    assert found.keys() == source.keys() and all(same(found[name], source[name]) for name in found)


def test_shards_slabs_and_threads_change_no_tensor(odd: Path, tmp_path: Path, monkeypatch) -> None:
    for options in ({"format": "nf4", "double_quant": True}, {"format": "int8"}):
        folder = tmp_path / options["format"]
        llmcompress.quantize(odd, folder / "one", **options)
        monkeypatch.setattr("llmcompress.plan.SLAB_WEIGHTS", 300)
        llmcompress.quantize(odd, folder / "many", split_max_size=6000, threads=3, **options)
        monkeypatch.undo()
        one, many = tensors_of(folder / "one"), tensors_of(folder / "many")
        assert one.keys() == many.keys() and all(same(one[name], many[name]) for name in one)
        assert len(list(folder.glob("many/*.safetensors"))) > 3


def loaded(folder: Path, **options) -> transformers.PreTrainedModel:
    """A model whose NF4 layers keep their weights: bitsandbytes repacks them on some CPUs, and rounds scales to bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def logits_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.float()


def quantized_classes(model: transformers.PreTrainedModel) -> set[str]:
    return {type(module).__name__ for module in model.modules() if hasattr(module, "in_features")}


NF4, FP4, INT8 = {"format": "nf4"}, {"format": "fp4"}, {"format": "int8"}
LOADED = [(name, options) for name in ("sample", "qwen3", "gemma3", "gpt2") for options in (NF4, INT8)]
LOADED += [
    ("sample", FP4),
    ("phi3", NF4),
    *((name, NF4 | {"double_quant": True}) for name in ("sample", "gemma3")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", LOADED, ids=str)
def test_transformers_loads_it_and_computes_what_quantizing_on_load_gives(
    name: str, options: dict, tiny: Callable[[str], Path], root: Path, tmp_path: Path
) -> None:
    source = root / SAMPLE if name == "sample" else tiny(name)
    llmcompress.quantize(source, tmp_path / "out", **options)
    dtype = getattr(torch, json.loads((source / "config.json").read_text())["dtype"])
    if options["format"] == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options["format"], bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=options.get("double_quant", False), llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if name != "gpt2":  # whose embeddings are named, too
        assert written == config.to_dict()
    ours, theirs = loaded(tmp_path / "out"), loaded(source, quantization_config=config)
    assert quantized_classes(ours) == quantized_classes(theirs)
    expected, found = logits_of(theirs), logits_of(ours)
    plain = logits_of(transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval())
    assert (found - expected).abs().max() <= 1e-3
    assert (found - plain).abs().max() > 1e-3  # it is quantized


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_other_storage_and_kept_modules_load(storage: str, root: Path, tmp_path: Path) -> None:
    keep = [r"model.layers.\d*[02].mlp", "layers.1.self_attn.q_proj"]
    result = llmcompress.quantize(root / SAMPLE, tmp_path / "out", format="nf4", storage=storage, keep=keep)
    llmcompress.quantize(root / SAMPLE, tmp_path / "bytes", format="nf4", keep=keep)
    model = loaded(tmp_path / "out")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "_proj" in name}
    for name, kind in kinds.items():
        kept = ".0.mlp" in name or ".2.mlp" in name or "layers.1.self_attn.q_proj" in name
        assert kind == ("Linear" if kept else "Linear4bit"), name
    assert model.model.layers[1].mlp.up_proj.weight.dtype == getattr(torch, storage)
    assert torch.equal(logits_of(model), logits_of(loaded(tmp_path / "bytes")))
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == [*keep, "lm_head"]
    assert sum(tensor.type == "NF4" for tensor in result.outputs[0].tensors) == list(kinds.values()).count(
        "Linear4bit"
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe-fused"])
def test_experts_are_refused_or_named(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"experts\..*bitsandbytes has no layer for experts.*--keep '\.\*experts'"
    ):
        llmcompress.quantize(tiny(name), tmp_path / "out", format="nf4")
    llmcompress.quantize(tiny(name), tmp_path / "out", format="nf4", keep=[".*experts"])
    source, found = tensors_of(tiny(name)), tensors_of(tmp_path / "out")
    assert all(same(found[key], source[key]) for key in source if "experts" in key)
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    model = loaded(tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any(module.endswith("gate") for module in settings["llm_int8_skip_modules"])
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    assert (logits_of(model) - logits_of(loaded(tiny(name), quantization_config=config))).abs().max() <= 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "nf4", "bits": 3}, "bits: means nothing to the format nf4"),
        ({"format": "int8", "double_quant": True}, "double_quant: means nothing to the format int8"),
        ({"format": "gptq", "keep": ["q_proj"]}, "keep: means nothing to the format gptq"),
        ({"format": "nf4", "storage": "float64"}, "storage: 'float64' is none of uint8, bfloat16"),
        ({"format": "nf4", "method": "gptq"}, "gptq needs to see inputs"),
        ({"format": "nf4", "type": "Q8_0"}, "types: means nothing to the format nf4"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict, message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        llmcompress.quantize(root / SAMPLE, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "keep, message",
    [
        (["q_prj"], "no linear is called 'q_prj'"),
        (["("], "is no regular expression"),
        ([".*"], "all linears are kept"),
    ],
)
def test_names_to_keep_are_checked(keep: list[str], message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        llmcompress.quantize(root / SAMPLE, tmp_path / "out", format="nf4", keep=keep)
    assert not list(tmp_path.iterdir())


def test_weights_that_the_format_cannot_hold_are_named(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", Llama(layers=1), "F32")
    poke(model, "model.layers.0.mlp.up_proj.weight", 3, -70000.0)
    with pytest.raises(
        RunError, match="up_proj: 1 weights, up to 70000, are beyond float16, through which int8 goes"
    ):
        llmcompress.quantize(model, tmp_path / "out", format="int8")
    llmcompress.quantize(model, tmp_path / "nf4", format="nf4")
    poke(model, "lm_head.weight", 5, float("inf"))
    with pytest.raises(RunError, match=r"'lm_head.weight' holds a NaN or infinity \(row 0, column 5\)"):
        llmcompress.quantize(model, tmp_path / "out", format="nf4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "nf4"]


def test_the_command_line(root: Path, tmp_path: Path) -> None:
    run = CliRunner()
    command = [
        "quantize",
        str(root / SAMPLE),
        "-o",
        str(tmp_path / "{name}-{type}"),
        "--format",
        "nf4",
        "--double-quant",
    ]
    planned = run.invoke(app, [*command, "--keep", "o_proj", "--dry-run"])
    assert planned.exit_code == 0 and "q_proj" in planned.stdout and not list(tmp_path.iterdir())
    done = run.invoke(app, [*command, "--keep", "o_proj", "--json"])
    assert done.exit_code == 0, done.output
    (output,) = json.loads(done.stdout)["outputs"]
    assert any("6 linears are kept" in note for note in json.loads(done.stdout)["notes"])
    assert output["type_counts"] == {"NF4": 36, "BF16": 20} and (tmp_path / "sample-llama-6m-NF4-DQ").is_dir()
