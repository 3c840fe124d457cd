"""How a table becomes steps: what a checkpoint must have, and the shapes it must have it in."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from llmcompress.converters.to_gguf import plan_gguf
from llmcompress.errors import CheckpointError, PlanError
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe
from synthetic_checkpoint import Llama, write_checkpoint, write_safetensors

LAYER = "model.layers.0."
Shapes = dict[str, tuple[int, ...]]


def plan_of(folder: Path, more: Shapes, less: tuple[str, ...] = ()) -> Plan:
    """The plan for a Llama of two layers with some tensors added, reshaped or left out."""
    write_checkpoint(folder)
    shapes = {name: shape for name, shape in (Llama().shapes | more).items() if name not in less}
    write_safetensors(folder / "model.safetensors", shapes, "BF16", seed=0)
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
    with pytest.raises(PlanError, match="no rule for a tensor of this name.*did you mean 'layers.0.input_layernorm"):
        plan_of(tmp_path, {f"model.layers.{layer}.input_layernorm.weight": (256,)})


def test_a_type_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path):
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "I16"
    packed = json.dumps(header).encode().ljust(length)
    file.write_bytes(data[:8] + packed + data[8 + length :])
    with pytest.raises(CheckpointError, match="tensor 'model.norm.weight' is I16, not one of F32, F16, BF16"):
        plan_gguf(tmp_path / "model", tmp_path / "out.gguf", Recipe())
