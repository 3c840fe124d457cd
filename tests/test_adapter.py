"""Reading adapter folders: what each kind says, and folders that are broken, foreign or hostile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from llmcompress.converters.adapter_places import with_adapter
from peft_adapters import load, save_adapter
from safetensors.torch import load_file, save_file

from llmcompress.adapter import Adapter
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError, LlmcompressError, PlanError

Q = "base_model.model.model.layers.0.self_attn.q_proj."
TENSORS = {f"{Q}lora_A.weight": torch.ones(4, 8), f"{Q}lora_B.weight": torch.ones(16, 4)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}


def written(folder: Path, config: dict[str, Any] = {}, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3.5}, 0.875),
        ({"use_rslora": True}, 4.0),
        ({"r": 9, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"r": 9, "rank_pattern": {"v_proj": 7, r"layers\.0\..*": 4}, "use_rslora": True}, 4.0),
        ({"alpha_pattern": {"proj": 1, "k_proj|q_proj": 2, "q_proj": 3}}, 0.5),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 0.5),
    ],
)
def test_the_scale_is_that_of_the_first_pattern_that_fits(config, scale: float, tmp_path: Path) -> None:
    (found,) = Adapter.open(written(tmp_path, config)).low_rank
    assert found.scale == pytest.approx(scale, rel=1e-15)
    assert (found.name, found.outputs, found.inputs, found.rank, found.matrices) == (
        "model.layers.0.self_attn.q_proj.weight", 16, 8, 4, 1,
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("name", ["", ".default"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_and_files_of_any_release_are_read(prefix: str, name: str, suffix: str, tmp_path: Path) -> None:
    folder = written(tmp_path)
    state = {f"{prefix}model.layers.0.self_attn.q_proj.lora_{part}{name}.weight":
             torch.randn(4, 8) if part == "A" else torch.randn(16, 4) for part in "AB"}  # fmt: skip
    (folder / "adapter_model.safetensors").unlink()
    (torch.save if suffix == ".bin" else save_file)(state, folder / f"adapter_model{suffix}")
    (found,) = Adapter.open(folder).low_rank
    assert np.array_equal(found.a(), next(iter(state.values())).numpy())
    assert np.array_equal(found.b(3, 5), list(state.values())[1][3:8].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_of_an_embedding_lie_transposed(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    a, b = torch.randn(4, 30).to(dtype), torch.randn(8, 4).to(dtype)
    (found,) = Adapter.open(written(tmp_path, {}, {f"{name}A": a, f"{name}B": b})).low_rank
    assert (found.outputs, found.inputs) == (30, 8)
    assert np.array_equal(found.a(), b.float().numpy().T)
    assert np.array_equal(found.b(11, 9), a.float().numpy().T[11:20])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', not one of LORA, ADALORA; merge it with peft"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "began by changing the base.*path_initial_model_for_weight_conv"),
        ({"init_lora_weights": "loftq"}, "began by changing the base"),
        ({"use_qalora": True}, "makes it QALoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "makes it layer replication"),
        ({"alora_invocation_tokens": [1]}, "makes it activated LoRA"),
        ({"use_dora": True}, "lacks the lora_magnitude_vector, use_dora is True"),
        ({"r": 8}, "has 4 ranks, adapter_config.json says 8"),
        ({"r": 3}, "has 4 ranks, adapter_config.json says 3"),
        ({"r": 0}, "r is 0, it must be a whole number above zero"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": -1}, "lora_alpha is -1, it must be a number above zero"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern of 'q_proj' is 2.0"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], it must be a dict"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no pattern"),
        ({"target_parameters": ["self_attn.q_proj.gate_up_proj", "q_proj.down_proj"]}, "the adapter has tensors for 1 par"),
        ({"r": 2}, None),
        ({"target_parameters": ["gate_up_proj", "experts.down_proj"]}, None),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_tensors_is_refused(config, message: str | None, tmp_path: Path) -> None:
    folder = written(tmp_path, config)
    if message is None:  # of stacked matrices, which a model then has or not
        assert Adapter.open(folder).low_rank
        return
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}lora_B.weight": None}, "no lora_B for 'model.layers.0.self_attn.q_proj.weight'"),
        ({f"{Q}lora_A.weight": torch.ones(8)}, "no matrices"),
        ({f"{Q}lora_B.weight": torch.ones(16, 5)}, "A has 4 ranks and B 5"),
        ({f"{Q}lora_magnitude_vector": torch.ones(16)}, "has a lora_magnitude_vector, use_dora is None"),
        ({f"{Q}lora_A.default.weight": torch.ones(4, 8)}, "comes twice"),
        ({f"{Q}base_layer.lora_A.weight": torch.ones(4, 8)}, "the adapter has tensors for 2 parameters"),
        ({f"{Q}lora_A.weight": torch.ones(4, 8, dtype=torch.int8)}, "is I8, not one of F32, F16, BF16"),
        ({"base_model.model.lm_head.original_module.weight": torch.ones(2, 2)}, "only what it was before"),
        ({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 2)},
         "trainable_token_indices are None"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_adapter_are_refused(tensors, message: str, tmp_path: Path) -> None:
    kept = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(written(tmp_path, {}, kept))


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter_config.json; give the folder of a peft adapter"):
        Adapter.open(tmp_path)
    folder = written(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of adapter_model.safetensors, adapter_model.bin"):
        Adapter.open(folder)
    (folder / "adapter_config.json").write_text('{"r": 1, "r": 2}')
    with pytest.raises(CheckpointError, match="key 'r' comes twice"):
        Adapter.open(folder)


def test_a_value_that_is_not_finite_is_an_error_with_its_tensor(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    state[name][300, 2] = math.nan
    save_file(state, file)
    with with_adapter(Checkpoint.open(tiny("llama")), adapter) as merged:
        merged.read("model.layers.0.mlp.up_proj.weight")
        merged.read("model.layers.1.mlp.up_proj.weight", 0, 300)
        with pytest.raises(
            CheckpointError, match=f"'{name}' holds a NaN or infinity; train the adapter again"
        ):
            merged.read("model.layers.1.mlp.up_proj.weight", 290, 20)


def single_experts(folder: Path, ranks: int = 4) -> Path:
    """An adapter as transformers 4 had it: each expert of Mixtral a linear."""
    torch.manual_seed(0)
    state = {}
    for layer in range(2):
        for expert in range(4):
            for module, outputs, inputs in (("w1", 512, 256), ("w3", 512, 256), ("w2", 256, 512)):
                name = (
                    f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{module}.lora_"
                )
                state[f"{name}A.weight"] = 0.1 * torch.randn(ranks, inputs)
                state[f"{name}B.weight"] = 0.1 * torch.randn(outputs, ranks)
    return written(folder, {"task_type": "CAUSAL_LM", "target_modules": ["w1", "w2", "w3"]}, state)


@pytest.mark.parametrize("name", ["mixtral", "mixtral-fused"])
def test_single_and_stacked_experts_are_the_same_experts(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """An adapter of single experts, on single ones and on stacked ones: peft converts it, too."""
    adapter = single_experts(tmp_path / "adapter")
    wanted = peft.PeftModel.from_pretrained(load(tiny(name)), adapter).merge_and_unload().state_dict()
    with with_adapter(Checkpoint.open(tiny(name)), adapter) as merged:
        for layer in range(2):
            fused = wanted[f"model.layers.{layer}.mlp.experts.gate_up_proj"].numpy()
            down = wanted[f"model.layers.{layer}.mlp.experts.down_proj"].numpy()
            if name == "mixtral-fused":
                found = merged.read(f"model.layers.{layer}.mlp.experts.gate_up_proj")
                assert np.allclose(found.reshape(fused.shape), fused, rtol=1e-5, atol=1e-5)
                continue
            for expert in range(4):
                start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                assert np.allclose(
                    merged.read(f"{start}.w3.weight"), fused[expert, 512:], rtol=1e-5, atol=1e-5
                )
                assert np.allclose(merged.read(f"{start}.w2.weight"), down[expert], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name.replace("layers.1", "layers.7"): value for name, value in state.items()},
         "no tensor of this name; did you mean"),
        (lambda state: {name: value[:, :128].contiguous() if "q_proj.lora_A" in name else value
                        for name, value in state.items()}, "matrices of 256x128, .*q_proj.weight is 256x256"),
        (lambda state: state | {"base_model.model.lm_head.weight": torch.ones(512, 128)}, "tensor of 512x128, lm_head"),
        (lambda state: state | {"base_model.model.model.norm.weight": torch.ones(255)}, "tensor of 255, model.norm"),
        (lambda state: state | {"base_model.model.lm_head.weight": torch.ones(520, 256)}, "embed_tokens.weight.*520"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused(change, message, tiny, tmp_path: Path) -> None:
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(PlanError, match=message):
        with_adapter(Checkpoint.open(tiny("llama")), adapter)


def test_random_bytes_end_in_an_error_of_ours(tmp_path: Path) -> None:
    """Cut and flipped files: an adapter, or an error that says so."""
    folder = written(tmp_path)
    random = np.random.default_rng(0)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        data = (folder / file).read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            for at in random.integers(0, len(data), 3):
                broken[at] = random.integers(0, 256)
            (folder / file).write_bytes(broken[: random.integers(1, len(data) + 1)])
            try:
                for update in Adapter.open(folder).low_rank:
                    update.a(), update.b()
            except LlmcompressError:
                pass
        (folder / file).write_bytes(data)
