"""Layers dropped straight from a GGUF: what converting the model without those layers gives."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Model
from llmcompress.converters.gguf_layers import drop_layers
from llmcompress.converters.layer_numbers import kept_layers, renumbered
from safetensors.torch import load_file, save_file
from test_architectures import assert_same_logits, expected, ids_of
from tiny_families import MORE
from tiny_models import BYTE_BPE, MODELS, SENTENCEPIECE, build

import llmcompress
from llmcompress.errors import GGUFError, PlanError
from llmcompress.gguf.reader import GGUFFile, open_shards
from llmcompress.gguf.value import ValueType, array, string, u32
from llmcompress.recipe import Recipe
from llmcompress.stats import Statistics, TensorStats

KINDS = ["conv", "full_attention", "conv", "full_attention"]
HYBRID = ["linear_attention", "full_attention"] * 2
SHARING = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "per_layer_config": {str(layer): {"head_dim": 128} for layer in (1, 3, 5)},
}  # fmt: skip
# Values of the tiny model's config, and the layers that go; the first three have arrays of a value for each layer.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lfm2": ({"num_hidden_layers": 4, "layer_types": KINDS}, (0,)),
    "granitehybrid": ({"num_hidden_layers": 4, "layer_types": HYBRID}, (1, 2)),
    "gemma4": (SHARING, (0, 1)),  # one tensor for all layers' inputs, keys and values that later layers take
    "cohere2": ({}, (1,)),  # a pattern of every fourth layer, and no more
    "lfm2moe": ({"num_hidden_layers": 4, "layer_types": KINDS, "num_dense_layers": 2}, (1,)),
    "deepseek3": ({"num_hidden_layers": 3}, (0,)),
    "qwen3next": ({}, (0, 1)),
    "gemma3": ({}, (2, 5)),
    "apertus": ({"num_hidden_layers": 3}, (1,)),  # arrays that lack the architecture's name
    "gpt2": ({}, (0,)),
}
QUICK = ("lfm2",)
DEPTHS = ("num_hidden_layers", "n_layer")


def made(name: str, folder: Path, tokenizers: dict[str, Path]) -> Path:
    tiny, tokenizer = (MODELS | MORE)[name]
    changed = replace(tiny, values=tiny.values | CASES[name][0])
    return build(name, folder / "tiny", tokenizers, models={name: (changed, tokenizer)})


def without_layers(model: Path, folder: Path, dropped: tuple[int, ...]) -> Path:
    """The Hugging Face model without some layers, by the names of its tensors and the lists of its config."""
    config = json.loads((model / "config.json").read_text())
    depth = next(config[key] for key in DEPTHS if key in config)
    kept = [layer for layer in range(depth) if layer not in dropped]
    for key, value in config.items():
        if isinstance(value, list) and len(value) == depth and key != "architectures":
            config[key] = [value[layer] for layer in kept]
    config |= {key: len(kept) for key in DEPTHS if key in config}
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if key in config:
            config[key] = sum(layer < config[key] for layer in kept)
    if "num_kv_shared_layers" in config:
        config["num_kv_shared_layers"] = sum(
            layer >= depth - config["num_kv_shared_layers"] for layer in kept
        )
    if "per_layer_config" in config:
        config["per_layer_config"] = {
            str(kept.index(int(layer))): value for layer, value in config["per_layer_config"].items() if int(layer) in kept
        }  # fmt: skip
    state = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        match = re.match(r"(.*\.(?:layers|h)\.)(\d+)(\..*)", name)
        if match and int(match[2]) in kept:
            state[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = tensor
        elif (
            not match
            and "per_layer" in name
            and tensor.shape[-1 if "embed_tokens" in name else 0] % depth == 0
        ):
            axis = 1 if "embed_tokens" in name else 0
            if tensor.ndim == 2:
                size = tensor.shape[axis] // depth
                tensor = tensor.index_select(
                    axis, tensor.new_tensor([layer * size + i for layer in kept for i in range(size)]).long()
                ).contiguous()
            state[name] = tensor
        elif not match:
            state[name] = tensor
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def held(path: Path) -> tuple[dict, dict[str, tuple]]:
    files = open_shards(path)
    tensors = {
        name: (file.tensors[name].shape, file.tensors[name].type.name, file.read(name).tobytes())
        for file in files
        for name in file.tensors
    }
    metadata = {key: value for key, value in files[0].metadata.items() if not key.startswith("split.")}
    for file in files:
        file.close()
    return metadata, tensors


@pytest.fixture(scope="module")
def tokenizers(root: Path) -> dict[str, Path]:
    return {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_it_is_the_gguf_of_the_model_without_them(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    model, dropped = made(name, tmp_path, tokenizers), CASES[name][1]
    smaller = without_layers(model, tmp_path / "smaller" / "tiny", dropped)
    whole = llmcompress.quantize(model, tmp_path / "whole.gguf", type="F32", verify="off").paths[0]
    wanted = llmcompress.quantize(smaller, tmp_path / "wanted.gguf", type="F32", verify="off").paths[0]
    drop_layers(whole, tmp_path / "found.gguf", dropped)
    metadata, tensors = held(tmp_path / "found.gguf")
    other, others = held(wanted)
    assert tensors == others
    own = metadata["general.architecture"].value
    assert {key: value for key, value in metadata.items() if key.startswith(own)} == {
        key: value for key, value in other.items() if key.startswith(own)
    } | {
        key: value for key, value in metadata.items() if key.endswith(("_window_pattern", "recurrent_layers"))
    }
    ids = ids_of(model)
    with Model(tmp_path / "found.gguf") as ours, Model(wanted) as theirs:
        logits = ours.logits(ids)
        assert np.array_equal(logits, theirs.logits(ids))
    # llama.cpp looks GELU up in a table of halves: 2.2e-3 in these layers, 0.7e-3 where transformers rounds alike
    assert_same_logits(logits, expected(smaller, ids), 3e-3 if name == "gemma4" else 1e-3)


@pytest.fixture(scope="module")
def sample(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    made = llmcompress.quantize(
        root / "examples" / "sample-llama-6m", folder / "q.gguf", type="Q4_K_M", verify="off"
    )
    return made.paths[0]


def test_quantized_tensors_are_copied_bit_for_bit_from_shards_to_shards(sample: Path, tmp_path: Path) -> None:
    shards = llmcompress.quantize(sample, tmp_path / "s.gguf", type="COPY", split_max_size="1M").paths
    recipe = Recipe(types=("COPY",), split_max_size=2**20)
    result, beside = drop_layers(shards[1], tmp_path / "out.gguf", [3], recipe=recipe)
    assert len(result.paths) == 4 and beside is None
    before, after = held(sample)[1], held(result.paths[1])[1]
    moved = {4: 3, 5: 4}
    for name, tensor in after.items():
        match = re.match(r"blk\.(\d)(.*)", name)
        old = {new: was for was, new in moved.items()}
        source = f"blk.{old.get(int(match[1]), int(match[1]))}{match[2]}" if match else name
        assert tensor == before[source]
    assert len(after) == len(before) - 9
    drop_layers(sample, tmp_path / "whole.gguf", [3])
    assert held(tmp_path / "whole.gguf")[1] == after
    drop_layers(tmp_path / "whole.gguf", tmp_path / "again.gguf", [0, 4])
    metadata = held(tmp_path / "again.gguf")[0]
    assert (
        metadata["llmcompress.layers_dropped"].value == "3; 0,4" and metadata["llama.block_count"].value == 3
    )


def test_the_importance_matrix_follows(sample: Path, tmp_path: Path) -> None:
    entries = {
        f"blk.{layer}.ffn_up.weight": TensorStats(np.array([7]), np.full((1, 256), float(layer)))
        for layer in range(6)
    }
    entries["token_embd.weight"] = TensorStats(np.array([7]), np.full((1, 256), 9.0))
    Statistics(entries, ("some",), 1, 7).save(tmp_path / "im.gguf")
    _, beside = drop_layers(sample, tmp_path / "out.gguf", [1, 4], tmp_path / "im.gguf")
    assert beside == tmp_path / "out-imatrix.gguf"
    found = Statistics.load(beside).entries
    assert {name: stats.squares[0, 0] for name, stats in found.items()} == {
        "blk.0.ffn_up.weight": 0, "blk.1.ffn_up.weight": 2, "blk.2.ffn_up.weight": 3, "blk.3.ffn_up.weight": 5,
        "token_embd.weight": 9,
    }  # fmt: skip
    Statistics({"other": entries["token_embd.weight"]}, ("some",), 1, 7).save(tmp_path / "other.gguf")
    with pytest.raises(PlanError, match="none of its 1 entries names a tensor"):
        drop_layers(sample, tmp_path / "more.gguf", [1], tmp_path / "other.gguf")


def test_what_is_refused(sample: Path, tmp_path: Path) -> None:
    for layers, message in (
        ([6], "there is no layer 6; the model has layers 0 to 5"),
        ([-1], "there is no layer -1"),
        ([], "name a layer to drop"),
        ([2, 2], "names a layer twice"),
        (range(6), "drops all 6 layers"),
    ):
        with pytest.raises(PlanError, match=message):
            drop_layers(sample, tmp_path / "out.gguf", layers)
    with pytest.raises(PlanError, match="is read by this job"):
        drop_layers(sample, sample, [1])


def changed(name: str, count: int, dropped: list[int], **values: Any) -> dict:
    metadata = {"general.architecture": string(name), f"{name}.block_count": u32(count)}
    own = {f"{name}.{key.replace('__', '.')}": value for key, value in values.items()}
    return renumbered(metadata | own, kept_layers(name, count, dropped))


@pytest.mark.parametrize(
    ("name", "count", "dropped", "values", "message"),
    [
        ("smollm3", 8, [0], {}, "for whether it turns its queries .rope., and layer 3 would become another kind as number 2"),
        ("llama4", 8, [0, 1, 2, 3, 4], {}, "turns its queries"),
        ("ernie4_5-moe", 4, [0], {"interleave_moe_layer_step": u32(2)}, "has experts, and layer 1"),
        ("gemma3n", 30, [3], {}, "has sparse activations, and layer 10 would become another kind as number 9"),
        ("gemma3n", 30, [12], {}, "has keys of its own, and layer 20"),
        ("deepseek2", 28, [5], {}, "for one with queries without a low rank"),
        ("command-r", 64, [5], {}, "for one without norms of queries and keys"),
        ("gemma4", 6, [3], {"attention__shared_kv_layers": u32(2)}, "layers from 4 on take .* of layers 2 and 3"),
        ("llama", 4, [0], {"something": array(ValueType.UINT32, [1, 2, 3, 4])}, "it is not known whether they are the layers'"),
    ],
)  # fmt: skip
def test_layers_that_would_be_computed_otherwise_are_refused(
    name: str, count: int, dropped: list[int], values: dict, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        changed(name, count, dropped, **values)


def test_numbers_that_follow_from_the_layers() -> None:
    found = changed("llama4", 8, [0, 1, 2, 3], attention__sliding_window=u32(0))
    assert "llama4.attention.sliding_window_pattern" not in found and found["llama4.block_count"].value == 4
    found = changed(
        "qwen35",
        9,
        [1, 8],
        nextn_predict_layers=u32(1),
        rope__dimension_sections=array(ValueType.INT32, [1] * 9),
    )
    flags = found["qwen35.attention.recurrent_layers"].value
    assert (
        flags == [True, True, False, True, True, True, False]
        and found["qwen35.nextn_predict_layers"].value == 0
    )
    assert len(found["qwen35.rope.dimension_sections"].value) == 9
    types = array(ValueType.BOOL, [True, False, True])
    found = changed("glm-dsa", 4, [1], nextn_predict_layers=u32(1), attention__indexer__types=types)
    assert found["glm-dsa.attention.indexer.types"].value == [True, True]
    with pytest.raises(PlanError, match="layer 1 takes the tokens that layer 0 chooses, which must stay"):
        changed("glm-dsa", 4, [0], nextn_predict_layers=u32(1), attention__indexer__types=types)
    with pytest.raises(GGUFError, match="has 3 values, there are 4 layers"):
        changed("llama", 4, [0], feed_forward_length=array(ValueType.UINT32, [1, 2, 3]))
    with pytest.raises(GGUFError, match="leading_dense_block_count is -1"):
        changed("deepseek2", 4, [0], leading_dense_block_count=replace(u32(1), value=-1))


def test_a_file_whose_tensors_are_of_other_layers(sample: Path, tmp_path: Path) -> None:
    from llmcompress.gguf.layout import TensorEntry, lay_out
    from llmcompress.gguf.types import TYPES

    with GGUFFile.open(sample) as file:
        metadata = dict(file.metadata) | {"llama.block_count": u32(3)}
    for names, message in (
        (["blk.0.a", "blk.2.a"], "not of layer 1"),
        (["blk.0.a", "blk.1.a", "blk.2.a", "blk.3.a"], "not of layer 3"),
    ):
        layout = lay_out(metadata, [TensorEntry(name, (2, 32), TYPES["F32"]) for name in names])
        (tmp_path / "odd.gguf").write_bytes(layout.header.ljust(layout.size, b"\0"))
        with pytest.raises(GGUFError, match=message):
            drop_layers(tmp_path / "odd.gguf", tmp_path / "out.gguf", [0])
    odd = {**metadata, "general.architecture": string("unheard-of")}
    layout = lay_out(odd, [TensorEntry("blk.0.a", (2, 32), TYPES["F32"])])
    (tmp_path / "odd.gguf").write_bytes(layout.header.ljust(layout.size, b"\0"))
    with pytest.raises(PlanError, match="'unheard-of' takes from the numbers"):
        drop_layers(tmp_path / "odd.gguf", tmp_path / "out.gguf", [0])
