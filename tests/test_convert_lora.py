"""Adapters as GGUF: llama.cpp with ours on our GGUF of the base, against peft on the same two folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from llama_cpp import Model
from llmcompress.converters.adapter_places import Places
from llmcompress.converters.families import ARCHITECTURES
from llmcompress.converters.lora_to_gguf import plan_lora, run_lora
from llmcompress.converters.merge import plan_merge, run_merge
from peft_adapters import save_adapter, tuned_logits
from relabelled import relabelled
from safetensors.torch import load_file, save_file
from test_architectures import NAMES, assert_same_logits, expected, ids_of
from test_rwkv7 import reference, write_model
from tiny_families import MORE
from tiny_models import MODELS

import llmcompress
from llmcompress.adapter import Adapter, LowRank
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError, PlanError
from llmcompress.recipe import Recipe

QUICK = ("llama", "gpt2", "qwen3moe-fused")
SPREAD = 0.05
# Of an architecture that another one proves.
SAME = (
    "olmo3", "stablelm-12b", "gptneox-serial", "falcon-7b", "falcon-11b", "granitemoe-shared", "hunyuan-alpha", "deepseek3-yarn",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_logits_with_an_adapter_are_pefts(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny(name)
    ids = ids_of(folder)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    with Model(base) as model:
        plain = model.logits(ids)
        for kind in ("lora", "rslora", "patterns"):
            adapter = save_adapter(folder, tmp_path / kind, kind)
            wanted = tuned_logits(folder, adapter, ids)
            assert abs(plain - wanted).max() > 0.05 * abs(wanted).max(), (
                "an adapter this weak would prove nothing"
            )
            model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / f"{kind}.gguf")))
            assert_same_logits(model.logits(ids), wanted, 1e-3)


# Matrices that llama.cpp does not multiply with through an adapter, or that the GGUF has in another form.
MLA = {"lm_head", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
REFUSED = {
    **dict.fromkeys(("deepseek2", "deepseek3", "glm4-lite"), MLA),
    **dict.fromkeys(("deepseek32", "glm-dsa"), MLA | {"wq_b", "wk", "weights_proj"}),
    "gemma4": {"embed_tokens_per_layer", "per_layer_model_projection"},
    "gemma3n": {"embed_tokens_per_layer", "per_layer_model_projection", "altup_projections", "altup_unembed_projections",
                "modality_router"},
    "nemotron-h-latent": {"fc1_latent_proj", "fc2_latent_proj"}, "rwkv7": {"lora"},
}  # fmt: skip
TIED = ("embed_tokens", "word_embeddings", "wte", "embeddings")


def test_every_architecture_is_tried() -> None:
    tried = {tiny.kind for tiny, _ in (*MODELS.values(), *MORE.values())} | {"RWKV7ForCausalLM"}
    tried |= {name for tiny, _ in MORE.values() for name in tiny.also}
    known = {family.name for family in ARCHITECTURES if tried & {*family.classes}}
    assert known == {family.name for family in ARCHITECTURES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MORE if name not in SAME])
def test_every_matrix_of_every_family_is_adapted_or_refused(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """One adapter on every matrix that is not refused, held against transformers on the merged weights."""
    folder, made = tiny(name), MORE[name][0]
    ids = ids_of(folder)
    if made.relabel:
        folder = relabelled(made, folder, tmp_path / "tiny-relabelled")
        assert_adapted_or_refused(name, folder, tmp_path, ids, lambda merged: logits_of_gguf(merged, ids))
    else:
        assert_every_parameter_has_its_place(folder)
        assert_adapted_or_refused(name, folder, tmp_path, ids, lambda merged: expected(merged, ids))


@pytest.mark.slow
def test_every_matrix_of_rwkv_is_adapted_or_refused(root: Path, tmp_path: Path) -> None:
    """Against the recurrence by itself, which transformers does not have."""
    folder, example = tmp_path / "tiny", root / "examples" / "sample-llama-6m"
    write_model(folder, example)
    ids = ids_of(example)
    assert_adapted_or_refused("rwkv7", folder, tmp_path, ids, lambda merged: reference(
        {key: value.numpy() for key, value in load_file(merged / "model.safetensors").items()}, ids
    ))  # fmt: skip


def logits_of_gguf(folder: Path, ids: list[int]) -> np.ndarray:
    with Model(
        llmcompress.quantize(folder, folder.with_suffix(".gguf"), type="F32", verify="off").paths[0]
    ) as model:
        return model.logits(ids)


def assert_adapted_or_refused(
    name: str, folder: Path, tmp_path: Path, ids: list[int], expected: Callable[[Path], np.ndarray]
) -> None:
    """`expected`: what a merged checkpoint computes."""
    matrices = {
        tensor.name.removesuffix(".weight"): tensor.shape for tensor in Checkpoint.open(folder).index.values()
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
    }  # fmt: skip
    kinds = {kind_of(module): module for module in matrices}
    refused = {
        kind for kind, module in kinds.items() if not is_planned(folder, tmp_path / kind, [module], matrices)
    }
    assert {kind.rpartition(".")[2] for kind in refused} - set(TIED) == REFUSED.get(name, set())
    kept = [module for module in matrices if kind_of(module) not in refused]
    adapter = save_matrices(tmp_path / "adapter", kept, matrices)
    run_merge(plan_merge(folder, adapter, tmp_path / "tiny-merged", Recipe()))
    wanted = expected(tmp_path / "tiny-merged")
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    with Model(base) as model:
        plain = model.logits(ids)
        assert abs(plain - wanted).max() > 0.05 * np.ptp(wanted)
        model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / "adapter.gguf")))
        assert abs(model.logits(ids) - wanted).max() < 1e-3 * np.ptp(wanted)


def kind_of(module: str) -> str:
    """Its name without the numbers of layers and experts."""
    return re.sub(r"\.\d+", "", module)


def assert_every_parameter_has_its_place(folder: Path) -> None:
    """Under the names that transformers' model has, which are an adapter's, and need not be the checkpoint's."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    updates = {
        name: LowRank(name, *tensor.shape[-2:], 1, len(tensor) if tensor.ndim > 2 else 1, 1.0, {}, None)
        for name, tensor in model.named_parameters()
        if tensor.ndim > 1 and not re.search("conv|correction_bias|A_log", name)
    }
    adapter = Adapter(folder, {}, None, tuple(updates.values()), {}, (), {})
    rows = dict.fromkeys(updates, 0)
    for patches in Places(adapter, Checkpoint.open(folder)).patches().values():
        for patch in patches:
            rows[patch.update.name] += patch.rows
    assert rows == {name: update.matrices * update.outputs for name, update in updates.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granitemoe", "jamba", "lfm2moe", "nemotron-h-moe"])
def test_experts_that_the_checkpoint_has_by_other_names(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Merged and as an adapter, against peft."""
    folder = tiny(name)
    ids = ids_of(folder)
    first = "up_proj" if name == "nemotron-h-moe" else "gate_up_proj"
    adapter = save_adapter(
        folder, tmp_path / "adapter", "patterns", target_modules=["q_proj", "v_proj"],
        target_parameters=[f"experts.{first}", "experts.down_proj"],
    )  # fmt: skip
    wanted = tuned_logits(folder, adapter, ids)
    base, merged = (
        llmcompress.quantize(folder, tmp_path / f"{number}.gguf", type="F32", verify="off", **given).paths[0]
        for number, given in enumerate(({}, {"adapter": str(adapter)}))
    )
    with Model(merged) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
    with Model(base) as model:
        assert abs(model.logits(ids) - wanted).max() > 0.05 * np.ptp(wanted)
        model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / "adapter.gguf")))
        assert_same_logits(model.logits(ids), wanted, 1e-3)


def is_planned(folder: Path, adapter: Path, modules: list[str], shapes: dict[str, tuple[int, ...]]) -> bool:
    try:
        return bool(plan_lora(save_matrices(adapter, modules, shapes), folder, adapter.with_suffix(".gguf")))
    except PlanError as error:
        assert "merge it instead: llmcompress merge MODEL ADAPTER" in str(error)
        return False


def save_matrices(folder: Path, modules: list[str], shapes: dict[str, tuple[int, ...]]) -> Path:
    """An adapter folder as peft saves it, rsLoRA of ranks that differ, written by hand: peft itself adapts no single matrix
    of fused experts."""
    torch.manual_seed(3)
    tensors = {}
    for number, module in enumerate(modules):
        outputs, inputs = shapes[module]
        rank, start = 2 + number % 3, f"base_model.model.{module}."
        if module.endswith(TIED):
            tensors[f"{start}lora_embedding_A"] = SPREAD * torch.randn(rank, outputs)
            tensors[f"{start}lora_embedding_B"] = SPREAD * torch.randn(inputs, rank)
        else:
            tensors[f"{start}lora_A.weight"] = SPREAD * torch.randn(rank, inputs)
            tensors[f"{start}lora_B.weight"] = SPREAD * torch.randn(outputs, rank)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {module: 2 + number % 3 for number, module in enumerate(modules)}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": ranks,
        "target_modules": modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_embedding_and_head_of_their_own_are_adapted(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Also AdaLoRA, whose matrices may have lost all ranks, and ranks that no pattern of llama.cpp's would give."""
    folder = tiny("llama")
    ids = ids_of(folder)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32", verify="off").paths[0]
    with Model(base) as model:
        targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
        for kind, values in (("lora", {"target_modules": targets}), ("adalora", {})):
            adapter = save_adapter(folder, tmp_path / kind, kind, **values)
            model.use_adapter(run_lora(plan_lora(adapter, folder, tmp_path / f"{kind}.gguf")))
            assert_same_logits(model.logits(ids), tuned_logits(folder, adapter, ids), 1e-3)


def test_plain_matrices_are_the_adapters_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Nothing is folded in where llama.cpp scales as peft does."""
    folder = tiny("qwen3")
    adapter = save_adapter(folder, tmp_path / "adapter")
    path = run_lora(plan_lora(adapter, folder, tmp_path / "adapter.gguf"))
    found = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    opened = Adapter.open(adapter)
    for update in opened.low_rank:
        if update.name == "model.layers.1.mlp.up_proj.weight":
            assert np.array_equal(found["blk.1.ffn_up.weight.lora_a"], update.a())
            assert np.array_equal(found["blk.1.ffn_up.weight.lora_b"], update.b())
    assert len(found) == 2 * len(opened.low_rank) == 28


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("dora", {}, "a DoRA; .* merge it instead: llmcompress merge"),
        (
            "lora",
            {"modules_to_save": ["lm_head"]},
            "holds whole tensors, such as 'lm_head.weight', .* merge it",
        ),
        (
            "lora",
            {"trainable_token_indices": [3, 4]},
            "holds rows of 'model.embed_tokens.weight', .* merge it",
        ),
        ("lora", {"target_modules": ["embed_tokens"]}, "which llama.cpp takes for the head, too; merge it"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(kind, values, message, tiny, tmp_path: Path) -> None:
    folder = tiny("llama-tied")
    adapter = save_adapter(folder, tmp_path / "adapter", kind, **values)
    with pytest.raises(PlanError, match=message):
        plan_lora(adapter, folder, tmp_path / "adapter.gguf")


def test_an_adapter_of_another_model_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(PlanError, match="k_proj.weight' is changed by matrices of 128x256, .* is 256x256"):
        plan_lora(adapter, tiny("qwen3"), tmp_path / "adapter.gguf")
    with pytest.raises(PlanError, match="no tensor of this name.*give the model it was trained on"):
        plan_lora(adapter, tiny("gpt2"), tmp_path / "adapter.gguf")
    with pytest.raises(CheckpointError, match="no adapter_config.json; give the folder of a peft adapter"):
        plan_lora(tiny("llama"), tiny("llama"), tmp_path / "adapter.gguf")
