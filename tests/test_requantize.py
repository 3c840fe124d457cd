"""GGUF files as what others are made from: requantized, split and merged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from llama_cpp import Model
from llmcompress.converters.requantize import traits
from llmcompress.converters.to_gguf import plan_gguf

import llmcompress
from llmcompress.errors import GGUFError, PlanError
from llmcompress.gguf.layout import TensorEntry, lay_out
from llmcompress.gguf.reader import GGUFFile, open_shards
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import ValueType, array, string, u32
from llmcompress.gguf_source import GGUFSource
from llmcompress.recipe import Recipe

OWN = {"llmcompress.recipe", "general.file_type"}  # what a new type changes


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model as BF16.gguf, Q8_0.gguf and Q4_K_M.gguf."""
    folder = tmp_path_factory.mktemp("made")
    types = ("BF16", "Q8_0", "Q4_K_M")
    llmcompress.quantize(
        root / "examples" / "sample-llama-6m", folder / "{type}.gguf", type=types, verify="off"
    )
    return folder


def metadata_of(path: Path) -> dict:
    with GGUFFile.open(path) as file:
        return dict(file.metadata)


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    with GGUFFile.open(path) as file:
        return {name: (tensor.type.name, file.read(name).tobytes()) for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("type", ["Q4_K_M", "Q8_0"])
def test_from_floats_it_is_what_the_checkpoint_gives(type: str, made: Path, tmp_path: Path) -> None:
    result = llmcompress.quantize(made / "BF16.gguf", tmp_path / "out.gguf", type=type)
    assert tensors_of(tmp_path / "out.gguf") == tensors_of(made / f"{type}.gguf")
    assert metadata_of(tmp_path / "out.gguf") == metadata_of(made / f"{type}.gguf")
    assert not any("quantized already" in note for note in result.notes)


@pytest.mark.slow
def test_requantizing_keeps_metadata_and_equal_types_and_warns(made: Path, tmp_path: Path) -> None:
    result = llmcompress.quantize(made / "Q4_K_M.gguf", tmp_path / "out.gguf", type="Q3_K_M")
    assert result.notes[0] == (
        "Q4_K_M.gguf is quantized already (Q4_K, Q6_K), and its errors stay; the original model gives better files"
    )
    before, after = metadata_of(made / "Q4_K_M.gguf"), metadata_of(tmp_path / "out.gguf")
    assert {key: value for key, value in before.items() if key not in OWN} == {
        key: value for key, value in after.items() if key not in OWN
    }
    assert after["general.file_type"].value == 12
    was, now = tensors_of(made / "Q4_K_M.gguf"), tensors_of(tmp_path / "out.gguf")
    assert was.keys() == now.keys() and {kind for kind, _ in now.values()} >= {"Q3_K", "Q4_K", "Q6_K", "F32"}
    same = [name for name in was if was[name][0] == now[name][0]]
    assert len(same) > 20 and all(was[name] == now[name] for name in same)
    with Model(made / "Q8_0.gguf") as whole, Model(tmp_path / "out.gguf") as small:
        tokens = whole.tokenize("The cat sat on the mat, and the dog lay by the door.")
        assert small.tokenize("The cat sat on the mat, and the dog lay by the door.") == tokens
        logits = [model.logits(tokens) for model in (whole, small)]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.3 * np.ptp(logits[0])


def test_split_and_merged_again_it_is_the_same_file(made: Path, tmp_path: Path) -> None:
    source = made / "Q4_K_M.gguf"
    shards = llmcompress.quantize(source, tmp_path / "s.gguf", type="COPY", split_max_size="1M").paths
    assert len(shards) == 4 and len(open_shards(shards[2])) == 4
    result = llmcompress.quantize(shards[1], tmp_path / "whole.gguf", type="COPY")
    assert (tmp_path / "whole.gguf").read_bytes() == source.read_bytes()
    assert not result.notes


def test_heads_are_those_of_the_first_block() -> None:
    """By which llama-quantize chooses; hybrids begin with blocks that have no keys, and got types of other models."""
    values = {"block_count": u32(3), "attention.head_count": u32(32)}
    heads = array(ValueType.UINT32, [0, 0, 2])
    for more, expected in (
        ({"attention.head_count_kv": heads}, 0),
        ({"attention.head_count_kv": u32(8)}, 4),
        ({}, 1),
    ):
        metadata = {f"nemotron_h.{key}": value for key, value in (values | more).items()}
        source = SimpleNamespace(
            path=Path("x.gguf"), metadata=metadata | {"general.architecture": string("nemotron_h")}
        )
        assert traits(source, False).heads_per_value == expected


@pytest.mark.slow
def test_a_target_and_types_by_hand(made: Path, tmp_path: Path) -> None:
    size = (made / "Q4_K_M.gguf").stat().st_size
    llmcompress.quantize(made / "BF16.gguf", tmp_path / "fit.gguf", target_size=size)
    assert 0.98 * size < (tmp_path / "fit.gguf").stat().st_size <= size
    llmcompress.quantize(
        made / "Q8_0.gguf", tmp_path / "own.gguf", type="Q4_0", tensor_types=[("ffn_down", "Q8_0")], name="x"
    )
    now, was = tensors_of(tmp_path / "own.gguf"), tensors_of(made / "Q8_0.gguf")
    assert (
        now["blk.2.ffn_down.weight"] == was["blk.2.ffn_down.weight"]
        and now["blk.2.ffn_up.weight"][0] == "Q4_0"
    )
    assert metadata_of(tmp_path / "own.gguf")["general.name"].value == "x"


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    source = made / "Q8_0.gguf"
    with pytest.raises(PlanError, match="Q8_0.gguf: is read by this job"):
        plan_gguf(source, source, Recipe(types=("Q4_0",)))
    with pytest.raises(PlanError, match="--calibrate: needs the model that"):
        plan_gguf(source, tmp_path / "out.gguf", Recipe(calibrate=True))
    for metadata, tensors, message in (
        ({}, {"a": "F32"}, "general.architecture is None"),
        ({"general.architecture": string("llama")}, {"a": "F32"}, "llama.block_count is None"),
        ({"general.architecture": string("llama"), "llama.block_count": u32(1)}, {"a": "I32"}, "'a' is I32, which cannot"),
    ):  # fmt: skip
        entries = [TensorEntry(name, (2, 32), TYPES[kind]) for name, kind in tensors.items()]
        layout = lay_out(metadata, entries)
        (tmp_path / "odd.gguf").write_bytes(layout.header.ljust(layout.size, b"\0"))
        with pytest.raises(GGUFError, match=message):
            plan_gguf(tmp_path / "odd.gguf", tmp_path / "out.gguf", Recipe())


def test_reading_rows(made: Path) -> None:
    with GGUFSource.open(made / "Q8_0.gguf") as source:
        whole = source.read("blk.0.ffn_up.weight")
        assert whole.dtype == np.float32 and np.array_equal(
            source.read("blk.0.ffn_up.weight", 3, 5), whole[3:8]
        )
        with pytest.raises(GGUFError, match="no tensor 'blk.0.ffn_upp.weight'; did you mean"):
            source.read("blk.0.ffn_upp.weight")
