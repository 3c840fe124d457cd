"""How a table becomes steps: what a checkpoint must have, and the shapes it must have it in."""

from __future__ import annotations

import json
import os
import re
import struct
from math import prod
from pathlib import Path

import pytest
from llmcompress.converters.families import CLASSES
from llmcompress.converters.to_gguf import plan_gguf
from synthetic_checkpoint import Llama, write_checkpoint

from llmcompress.errors import CheckpointError, PlanError
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe
from llmcompress.tensor_info import DTYPE_BITS

LAYER = "model.layers.0."
Shapes = dict[str, tuple[int, ...]]


def plan_of(folder: Path, more: Shapes, less: tuple[str, ...] = (), dtypes: dict[str, str] = {}) -> Plan:
    """The plan for a Llama of two layers with some tensors added, reshaped, left out or of another type than F32."""
    write_checkpoint(folder)
    header, end = {}, 0
    for name, shape in (Llama().shapes | more).items():
        if name not in less:
            dtype = dtypes.get(name, "F32")
            begin, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    packed = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(packed)) + packed)
    os.truncate(file, 8 + len(packed) + end)  # a plan reads no weights
    return plan_gguf(folder, folder / "out.gguf", Recipe())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", ()),
        ("model.norm.weight", (0,)),
        ("model.norm.weight", (1, 256)),
        ("lm_head.weight", (100, 256)),
        (LAYER + "input_layernorm.weight", (128,)),
        (LAYER + "self_attn.v_proj.weight", (256, 256)),
        (LAYER + "mlp.gate_proj.weight", (500, 256)),
        (LAYER + "mlp.gate_proj.weight", (512, 0)),
        (LAYER + "mlp.gate_proj.weight", (2, 256, 256)),
        (LAYER + "mlp.down_proj.weight", (512, 256)),
    ],
)
def test_a_shape_that_is_not_the_configs_is_refused(name, shape, tmp_path):
    wanted = "x".join(map(str, Llama().shapes[name]))
    with pytest.raises(PlanError, match=rf"^{re.escape(name)}: makes .*, by config.json it is {wanted}; "):
        plan_of(tmp_path / "model", {name: shape})


def test_a_bias_has_as_many_values_as_its_weight_has_rows(tmp_path):
    biases = {f"model.layers.{layer}.self_attn.k_proj.bias": (128,) for layer in range(2)}
    names = [step.name for step in plan_of(tmp_path / "good", biases).steps]
    assert names.count("blk.0.attn_k.bias") == names.count("blk.1.attn_k.bias") == 1
    biases[LAYER + "self_attn.k_proj.bias"] = (256,)
    with pytest.raises(PlanError, match="makes blk.0.attn_k.bias 256, by config.json it is 128"):
        plan_of(tmp_path / "bad", biases)


def test_a_bias_that_only_some_layers_have_is_refused(tmp_path):
    with pytest.raises(PlanError, match="^blk.1.attn_q.bias: the checkpoint has no tensor for it"):
        plan_of(tmp_path, {LAYER + "self_attn.q_proj.bias": (256,)})


def test_a_layer_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(PlanError, match="^blk.0.ffn_up.weight: .*model.layers.{i}.mlp.up_proj"):
        plan_of(tmp_path, {}, less=(LAYER + "mlp.up_proj.weight",))


def test_a_layer_beyond_the_configs_is_refused(tmp_path):
    with pytest.raises(PlanError, match="^blk.9.attn_norm.weight: config.json counts 2 layers"):
        plan_of(tmp_path, {"model.layers.9.input_layernorm.weight": (256,)})


@pytest.mark.parametrize("layer", ["00", "٠", "+0", "-1"])
def test_a_layer_has_one_spelling(layer, tmp_path):
    with pytest.raises(
        PlanError, match="no rule for a tensor of this name.*did you mean 'layers.0.input_layernorm"
    ):
        plan_of(tmp_path, {f"model.layers.{layer}.input_layernorm.weight": (256,)})


@pytest.mark.parametrize("dtype", ["F64", "I16", "F8_E4M3"])
def test_a_type_that_cannot_be_read_is_refused_before_anything_is_written(dtype, tmp_path):
    with pytest.raises(
        CheckpointError, match=f"tensor 'model.norm.weight' is {dtype}, not one of F32, F16, BF16"
    ):
        plan_of(tmp_path, {}, dtypes={"model.norm.weight": dtype})


def test_a_dense_model_whose_config_counts_experts_is_dense():
    config = CLASSES["LlamaForCausalLM"].config(
        Llama().config | {"num_local_experts": 8, "num_experts_per_tok": 2}
    )
    assert not any("expert" in key for key in CLASSES["LlamaForCausalLM"].keys(config))


def test_more_experts_for_a_token_than_there_are_is_refused():
    config = CLASSES["MixtralForCausalLM"].config(Llama().config | {"num_experts_per_tok": 9})
    with pytest.raises(PlanError, match="num_experts_per_tok is 9, of 8 experts in all"):
        CLASSES["MixtralForCausalLM"].keys(config)
