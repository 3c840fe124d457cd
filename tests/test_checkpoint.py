"""Model directories as save_pretrained leaves them, and as downloads and hand work spoil them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYOUTS = [
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
]  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    result = {}
    for name, dtype in DTYPES.items():
        result |= {f"{name}.matrix": torch.randn(37, 8).to(dtype), f"{name}.vector": torch.randn(8).to(dtype)}
    result |= {"experts": torch.randn(3, 5, 4), "scalar": torch.randn(())}
    return result | {"position_ids": torch.arange(9)}


def write(directory: Path, layout: str) -> Path:
    """A model of `tensors()` in `directory`; a sharded layout has two shards."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save = save_file if "safetensors" in layout else torch.save
    stem, suffix = layout.removesuffix(".index.json").split(".")
    if not layout.endswith(".index.json"):
        save(tensors(), directory / layout)
        return directory
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        shard = f"{stem}-{number:05}-of-00002.{suffix}"
        part = dict(list(tensors().items())[number - 1 :: 2])
        save(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / layout).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def bits(tensor: torch.Tensor) -> np.ndarray:
    """What `read` should return for `tensor`."""
    tensor = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype(tmp_path, layout):
    with Checkpoint.open(write(tmp_path / "tiny", layout)) as checkpoint:
        assert checkpoint.name == "tiny" and checkpoint.revision is None
        assert checkpoint.config == {"model_type": "llama"}
        assert len(checkpoint.files) == (2 if layout.endswith(".index.json") else 1)
        assert checkpoint.index.keys() == tensors().keys()
        for name, tensor in tensors().items():
            info = checkpoint.index[name]
            assert (info.name, info.shape) == (name, tuple(tensor.shape))
            if name != "position_ids":
                expected, got = bits(tensor), checkpoint.read(name)
                assert got.dtype == expected.dtype and got.shape == (info.rows, info.columns)
                assert np.array_equal(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_slices_of_the_whole(tmp_path, layout):
    with Checkpoint.open(write(tmp_path, layout)) as checkpoint:
        for name in ("F32.matrix", "BF16.matrix", "experts"):
            whole = checkpoint.read(name)
            for first, rows in ((0, 1), (3, 7), (len(whole) - 1, 1), (2, 0), (len(whole), 0)):
                assert np.array_equal(checkpoint.read(name, first, rows), whole[first : first + rows])
            assert np.array_equal(checkpoint.read(name, 4), whole[4:])
            buffer = np.empty((5, whole.shape[1]), whole.dtype)
            checkpoint.read_into(name, 2, buffer)
            assert np.array_equal(buffer, whole[2:7])


def test_rows_and_buffers_that_do_not_fit(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, LAYOUTS[0]))
    for first, rows in ((-1, 2), (30, 8), (38, 0), (0, -1)):
        with pytest.raises(ValueError, match="F32.matrix"):
            checkpoint.read("F32.matrix", first, rows)
    whole = np.empty((37, 8), np.float32)
    for first, buffer in ((1, whole), (0, whole[:, :7].copy()), (0, whole.view(np.int32)), (0, whole[::2])):
        with pytest.raises(ValueError, match="F32.matrix"):
            checkpoint.read_into("F32.matrix", first, buffer)


def test_what_cannot_be_read_is_named(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, LAYOUTS[0]))
    with pytest.raises(CheckpointError, match="'position_ids' is I64, not one of F32, F16, BF16"):
        checkpoint.read("position_ids")
    with pytest.raises(CheckpointError, match="no tensor 'F32.matrx'; did you mean 'F32.matrix'"):
        checkpoint.read("F32.matrx")


def test_many_threads_read_the_same_bytes(tmp_path):
    expected = {name: bits(tensor) for name, tensor in tensors().items() if name != "position_ids"}
    wrong: list[str] = []
    with Checkpoint.open(write(tmp_path, LAYOUTS[1])) as checkpoint:

        def work() -> None:
            for _ in range(20):
                for name, array in expected.items():
                    if not np.array_equal(checkpoint.read(name), array):
                        wrong.append(name)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(checkpoint._descriptors) == 2  # one a file, however many threads ask at once


def test_a_file_cut_or_replaced_under_our_feet(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, LAYOUTS[0]))
    checkpoint.read("F32.vector")
    os.truncate(checkpoint.files[0], checkpoint.index["F32.matrix"].offset + 100)
    with pytest.raises(CheckpointError, match="'F32.matrix': 1084 of 1184 bytes missing"):
        checkpoint.read("F32.matrix")
    checkpoint.close()
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        checkpoint.read("F32.matrix")


def test_close_lets_go_and_a_later_read_opens_again(tmp_path):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    checkpoint = Checkpoint.open(write(tmp_path, LAYOUTS[1]))
    before = open_files()
    checkpoint.read("F32.matrix"), checkpoint.read("F32.vector")
    assert open_files() == before + 2
    checkpoint.close()
    assert open_files() == before
    assert checkpoint.read("F32.matrix").shape == (37, 8)
    checkpoint.close()


def test_the_fingerprint_changes_with_the_files_and_only_then(tmp_path):
    directory = write(tmp_path / "a", LAYOUTS[1])

    def fingerprint() -> str:
        return Checkpoint.open(directory).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    (directory / "README.md").write_text("words")
    assert fingerprint() == first
    shard = sorted(directory.glob("*.safetensors"))[1]
    os.utime(shard, ns=(1, shard.stat().st_mtime_ns + 1))
    second = fingerprint()
    assert second != first
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    assert fingerprint() not in (first, second)


def test_safetensors_win_over_pickles_and_over_other_copies(tmp_path):
    write(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a zip")
    (tmp_path / "consolidated.safetensors").write_bytes(b"nor this")
    assert [file.name for file in Checkpoint.open(tmp_path).files] == ["model.safetensors"]


def test_a_snapshot_of_the_hub_knows_its_name_and_commit(tmp_path):
    directory = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    directory.parent.mkdir(parents=True)
    checkpoint = Checkpoint.open(write(directory, LAYOUTS[0]))
    assert (checkpoint.name, checkpoint.repository, checkpoint.revision) == ("tiny", "org/tiny", "0123abcd")


def test_a_relative_directory_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "tiny", LAYOUTS[0]))
    assert Checkpoint.open(".").name == "tiny"


def edit_map(directory: Path, **changes: object) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    file.write_text(json.dumps(index))


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
# What is done to a good sharded directory, and what the message says.
SPOILED = {
    "a shard missing": (lambda d: (d / SECOND).unlink(), f"1 of 2 shards are missing, .* '{SECOND}'"),
    "a shard cut": (lambda d: os.truncate(d / SECOND, 500), SECOND),
    "a tensor in no shard": (lambda d: edit_map(d, ghost=FIRST), f"'ghost' is not in {FIRST}"),
    "a tensor elsewhere": (lambda d: edit_map(d, **{"F32.matrix": SECOND}), f"the index says {SECOND}"),
    "a tensor not listed": (lambda d: edit_map(d, scalar=None), "'scalar' lies in .*the index says None"),
    "a path upwards": (lambda d: edit_map(d, scalar="../x.bin"), "'../x.bin' is no file name"),
    "a path from the root": (lambda d: edit_map(d, scalar="/etc/passwd"), "'/etc/passwd' is no file name"),
    "a shard that is a number": (lambda d: edit_map(d, scalar=7), "7 is no file name"),
    "a shard that is the directory": (lambda d: edit_map(d, scalar="."), "'.' is no file name"),
    "no weight_map": (lambda d: (d / LAYOUTS[1]).write_text("{}"), "no weight_map"),
    "an index that is a list": (lambda d: (d / LAYOUTS[1]).write_text("[]"), "a JSON list, not an object"),
    "an index that is empty": (lambda d: (d / LAYOUTS[1]).write_text(""), "not valid JSON"),
    "no index": (lambda d: (d / LAYOUTS[1]).unlink(), "without their index; fetch"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "a config cut short": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "Git LFS pointers": (
        lambda d: (d / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "a Git LFS pointer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_directories(tmp_path, spoil, message):
    directory = write(tmp_path / "tiny", LAYOUTS[1])
    spoil(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, method",
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm"),
        ({"text_config": {"quantization_config": "vptq"}}, "vptq"),
    ],
)
def test_quantized_weights_are_listed_but_not_plain(tmp_path, config, method):
    directory = write(tmp_path / "tiny", LAYOUTS[1])
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.index
    with pytest.raises(CheckpointError, match=f"quantized \\('{method}'\\)"):
        checkpoint.require_plain()


OTHERS = {
    "adapter_model.safetensors adapter_config.json": "a LoRA adapter, not a model; give its base model",
    "model-Q4_K_M.gguf config.json": "holds GGUF \\(model-Q4_K_M.gguf\\)",
    "consolidated.safetensors params.json": "holds consolidated.safetensors, but none of",
    "consolidated.00.pth params.json": "holds consolidated.00.pth, but none of",
    "pytorch_model-00001-of-00002.bin config.json": "without their index",
    "README.md": "no weights",
    "": "no weights",
}


@pytest.mark.parametrize("names, message", OTHERS.items())
def test_directories_of_something_else(tmp_path, names, message):
    for name in names.split():
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(tmp_path):
    directory = write(tmp_path, LAYOUTS[0])
    (directory / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read: Permission denied"):
        Checkpoint.open(directory)


@pytest.mark.slow
def test_the_index_of_a_very_large_model(tmp_path):
    """90,000 tensors in 160 shards, as DeepSeek-V3 has: sparse files, so that only headers take room."""
    weight_map: dict[str, str] = {}
    for number in range(160):
        shard, entries, end = f"model-{number:05}.safetensors", {}, 0
        for tensor in range(563):
            begin, end = end, end + 2048 * 7168 * 2
            entry = {"dtype": "BF16", "shape": [2048, 7168], "data_offsets": [begin, end]}
            entries[f"{number}.{tensor}"] = entry
        header = json.dumps(entries).encode()
        with open(tmp_path / shard, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + end)
        weight_map |= dict.fromkeys(entries, shard)
    (tmp_path / LAYOUTS[1]).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert len(checkpoint.index) == 90_080 and len(checkpoint.files) == 160
        assert not checkpoint.read("159.562", 2047).any()


@pytest.mark.parametrize("model", ["sample-llama-6m", "sample-qwen3-7m", "stories260K", "babyllama_tok361"])
def test_real_models(shared, model):
    with Checkpoint.open(shared / "models" / model) as checkpoint:
        expected = load_file(shared / "models" / model / "model.safetensors")
        assert checkpoint.index.keys() == expected.keys()
        assert all(np.array_equal(checkpoint.read(name), bits(tensor)) for name, tensor in expected.items())
