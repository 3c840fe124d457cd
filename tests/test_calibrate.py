"""Whole calibrations of tiny models: against llama-imatrix, resumed, with damage, and from the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters.calibration import (
    CalibrationOptions,
    calibrate_model,
    entries_of,
    rows_and_model,
    weight_steps,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_checkpoint import Llama, poke, write_checkpoint
from tiny_families import MORE
from tiny_models import BYTE_BPE, SENTENCEPIECE, build
from typer.testing import CliRunner, Result

import llmcompress
from llmcompress.blocks import Lockstep
from llmcompress.calibrate import Calibration, batches_of, calibrate, groups_of
from llmcompress.checkpoint import Checkpoint
from llmcompress.cli import app
from llmcompress.errors import CheckpointError, LlmcompressError
from llmcompress.progress import Progress
from llmcompress.stats import Statistics

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
# Four groups of two batches of two rows.
SMALL = CalibrationOptions(tokens=1024, chunk=64, batch_tokens=128, save_every=256, dtype="f32", device="cpu")


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


def rows(lengths: list[int], vocabulary: int = 512) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, vocabulary, length) for length in lengths]


def sums_of(folder: Path, given: list[np.ndarray], batch: int = 2048, group: int = 2**16) -> Calibration:
    lockstep = Lockstep.of(Checkpoint.open(folder), torch.float32, CPU)
    return calibrate(lockstep, batches_of(given, batch), Progress(), None, group)


def assert_same(found: Calibration, wanted: Calibration) -> None:
    assert found.sums.keys() == wanted.sums.keys()
    for name, sums in found.sums.items():
        assert sums.tokens.tolist() == wanted.sums[name].tokens.tolist()
        np.testing.assert_allclose(sums.squares, wanted.sums[name].squares, rtol=1e-4, atol=1e-6)


def products_in(folder: Path) -> dict[str, torch.Tensor]:
    """By parameter."""
    return {
        file.stem: load_file(file)["products"]
        for file in folder.glob("*.safetensors")
        if file.stem != "index"
    }


def assert_same_products(folder: Path, wanted: Path) -> None:
    found, expected = products_in(folder), products_in(wanted)
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], products) for name, products in expected.items())


# What goes together


def test_batches_hold_rows_of_one_length_and_every_row_once() -> None:
    given = rows([5, 9, 9, 2, 9, 5])
    batches = batches_of(given, 18)
    assert [tuple(batch.shape) for batch in batches] == [(2, 9), (1, 9), (2, 5), (1, 2)]
    flat = sorted(row.tolist() for batch in batches for row in batch)
    assert flat == sorted(row.tolist() for row in given)
    assert [batch.shape for batch in batches_of(given, 1)][0] == (1, 9)  # a row is never cut


def test_groups_are_of_whole_batches() -> None:
    batches = batches_of(rows([4] * 7), 8)
    assert [[len(batch) for batch in group] for group in groups_of(batches, 16)] == [[2, 2], [2, 1]]
    assert [len(group) for group in groups_of(batches, 1)] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_sums_do_not_depend_on_batches_and_groups(name: str, tiny: Tiny) -> None:
    given = rows([64, 64, 64, 64, 30, 30, 7])
    wanted = sums_of(tiny(name), given)
    assert_same(sums_of(tiny(name), given, batch=64), wanted)
    assert_same(sums_of(tiny(name), given, batch=128, group=128), wanted)
    assert wanted.expected.keys() == wanted.sums.keys()
    dense = [key for key, matrices in wanted.expected.items() if matrices == 1]
    assert all(wanted.sums[key].tokens.tolist() == [sum(map(len, given))] for key in dense)
    routed = [key for key, matrices in wanted.expected.items() if matrices > 1]
    assert all(wanted.sums[key].tokens.sum() == 2 * sum(map(len, given)) for key in routed)


# NaNs


def test_a_nan_of_one_token_costs_its_row_alone(tiny: Tiny, tmp_path: Path) -> None:
    given = rows([32, 32, 32, 32])
    token = next(token for token in given[2] if all(token not in given[other] for other in (0, 1, 3)))
    shutil.copytree(tiny("llama"), tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["model.embed_tokens.weight"][token, 3] = float("nan")
    save_file(weights, tmp_path / "tiny" / "model.safetensors")
    found = sums_of(tmp_path / "tiny", given, batch=64)
    count = given[2].tolist().count(token)
    assert found.complaints == [
        f"model.layers.0.self_attn.q_proj.weight: inputs of {count} tokens of batch 2 of group 1 held a NaN or "
        "infinity and were left out; so were tokens of 14 weights behind it"
    ]
    wanted = sums_of(tiny("llama"), [row for at, row in enumerate(given) if at != 2])
    behind = [name for name in wanted.sums if not name.startswith("model.layers.0.self_attn.")]
    for name in behind:  # attention mixes a NaN into every token of the row
        assert found.sums[name].tokens.tolist() == [96]
        np.testing.assert_allclose(found.sums[name].squares, wanted.sums[name].squares, rtol=1e-4, atol=1e-6)
    assert found.sums["model.layers.0.self_attn.q_proj.weight"].tokens.tolist() == [128 - count]


def test_a_nan_in_the_weights_ends_well(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "nan", Llama(layers=3), "F32")
    poke(folder, "model.layers.1.mlp.up_proj.weight", 300, float("nan"))
    report = calibrate_model(folder, tmp_path / "a.gguf", dataclasses.replace(SMALL, tokens=256), Progress())
    complaints = [note for note in report.notes if "NaN" in note]
    assert len(complaints) == 2 and complaints[0] == (
        "model.layers.1.mlp.down_proj.weight: inputs of 128 tokens of batch 1 of group 1 held a NaN or infinity and "
        "were left out; so were tokens of 8 weights behind it"
    )
    assert "'blk.1.ffn_down.weight': no token reached it; all its inputs count alike" in report.notes
    tokens = {
        name: int(sums.tokens[0]) for name, sums in Statistics.load(tmp_path / "a.gguf").entries.items()
    }
    bad = {name for name, count in tokens.items() if not count}
    assert bad == {"blk.1.ffn_down.weight", "output.weight"} | {
        name for name in tokens if name.startswith("blk.2.")
    }
    assert {count for name, count in tokens.items() if name not in bad} == {256}


# Files


def test_dense_statistics_are_llama_imatrix_s(sample: Path, root: Path, tmp_path: Path) -> None:
    wanted = Statistics.load(root / "tests" / "golden" / "imatrix" / "dense.gguf")
    options = CalibrationOptions((str(root / "LICENSE"),), chunk=128, windows="llama.cpp", dtype="f32")
    report = calibrate_model(sample, tmp_path / "a.gguf", options, Progress())
    found = Statistics.load(tmp_path / "a.gguf")
    assert set(found.entries) - set(wanted.entries) == {"token_embd.weight"}  # the tied head
    assert (found.chunks, found.chunk_size, report.tokens) == (wanted.chunks, wanted.chunk_size, 27 * 128)
    for name, sums in wanted.entries.items():
        assert found.entries[name].tokens.tolist() == sums.tokens.tolist() == [27 * 128]
        np.testing.assert_allclose(found.entries[name].squares, sums.squares, rtol=1e-3)
    assert found.notes["calibration.dtype"] == "f32" and found.notes["calibration.model"] == sample.name


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe-fused"])
def test_statistics_of_experts_are_llama_imatrix_s(name: str, tiny: Tiny, root: Path) -> None:
    wanted = Statistics.load(root / "tests" / "golden" / "imatrix" / "experts.gguf")
    checkpoint = Checkpoint.open(tiny(name))
    options = CalibrationOptions((str(root / "LICENSE"),), chunk=16, windows="llama.cpp", dtype="f32")
    given, lockstep = rows_and_model(checkpoint, options)
    found = calibrate(lockstep, batches_of(given.rows[:1]), Progress())
    entries = entries_of(weight_steps(checkpoint), lockstep, found)
    assert set(entries) - set(wanted.entries) == {"output.weight"}
    for key, sums in wanted.entries.items():
        assert entries[key].tokens.tolist() == sums.tokens.tolist()
        error = np.linalg.norm(entries[key].squares - sums.squares) / np.linalg.norm(sums.squares)
        before_attention = (
            key == "blk.0.attn_q.weight"
        )  # behind it: llama-imatrix keeps keys and values in F16
        assert error < (1e-6 if before_attention else 1.2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head"),
    [("llama", "output"), ("llama-tied", "token_embd"), ("gpt2", "token_embd"), ("gemma3", "token_embd"),
     ("phi3", "output"), ("mixtral-fused", "output")],
)  # fmt: skip
def test_names_are_those_of_the_gguf_that_can_use_them(
    name: str, head: str, tiny: Tiny, tmp_path: Path
) -> None:
    report = calibrate_model(tiny(name), tmp_path / "a.gguf", SMALL, Progress())
    tied = {"output.weight", "token_embd.weight"} & set(report.statistics.entries)
    assert tied == {f"{head}.weight"}
    assert report.statistics.entries[f"{head}.weight"].tokens.tolist() == [1024]
    made = llmcompress.quantize(
        tiny(name), tmp_path / "{type}.gguf", type="Q4_K_S", imatrix=str(tmp_path / "a.gguf")
    )
    rounded = {tensor.name for tensor in made.outputs[0].tensors if tensor.type not in ("F32", "F16")}
    assert rounded - set(report.statistics.entries) <= {"token_embd.weight", "position_embd.weight"}


def test_experts_that_no_token_reached_are_reported(tiny: Tiny, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, tokens=8, chunk=8)
    report = calibrate_model(tiny("qwen3moe"), tmp_path / "a.gguf", options, Progress())
    sums = report.statistics.entries["blk.0.ffn_down_exps.weight"]
    assert sums.tokens.sum() == 16 and not sums.tokens.all()
    missed = int(np.flatnonzero(sums.tokens == 0)[0])
    (note,) = [note for note in report.notes if note.startswith("'blk.0.ffn_down_exps.weight': ")]
    assert "8 of 8 experts saw fewer than 32 tokens" in note and f"{missed} (0)" in note
    assert report.as_dict()["tokens_of_weights"]["blk.0.ffn_down_exps.weight"] == sums.tokens.tolist()


def test_legacy_files_hold_the_same(tiny: Tiny, tmp_path: Path) -> None:
    calibrate_model(tiny("llama"), tmp_path / "a.gguf", SMALL, Progress())
    calibrate_model(tiny("llama"), tmp_path / "a.dat", SMALL, Progress())
    new, old = Statistics.load(tmp_path / "a.gguf"), Statistics.load(tmp_path / "a.dat", chunk_size=64)
    assert new.entries.keys() == old.entries.keys()
    for name, sums in new.entries.items():
        np.testing.assert_allclose(old.entries[name].squares, sums.squares, rtol=1e-5)


@pytest.mark.slow
def test_hessians_are_products_whose_diagonal_is_the_statistics(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "products"
    calibrate_model(tiny("mixtral"), tmp_path / "a.gguf", SMALL, Progress(), folder)
    found = sums_of(tiny("mixtral"), list(rows_and_model(Checkpoint.open(tiny("mixtral")), SMALL)[0].rows))
    held = {name: found.sums[name] for name in products_in(folder)}
    assert len(held) > 8  # weights that share their inputs may share a file
    assert {sums.squares.tobytes() for sums in held.values()} == {
        s.squares.tobytes() for s in found.sums.values()
    }
    for name, sums in held.items():
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            products, groups = file.get_tensor("products"), file.metadata()["groups"]
        assert groups == "4" and products.dtype == torch.float32
        assert products.shape == (*sums.squares.shape, sums.squares.shape[1])
        scale = float(sums.squares.max())
        np.testing.assert_allclose(
            products.diagonal(dim1=1, dim2=2), sums.squares, rtol=1e-3, atol=1e-5 * scale
        )
        torch.testing.assert_close(products, products.transpose(1, 2), rtol=1e-4, atol=1e-5 * scale)


# Going on after a stop


class Stops(Progress):
    """Raises when so many tokens x blocks are done."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def groups_held(state: Path) -> int:
    with safe_open(state, "pt") as file:
        return int(file.metadata()["groups"])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(  # tokens x blocks: a group has 512
    "after", [100, 600, *(pytest.param(after, marks=pytest.mark.slow) for after in (512, 1200))]
)
def test_a_stopped_calibration_goes_on_to_the_same_bytes(
    name: str, after: int, tiny: Tiny, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate_model(tiny(name), whole / "a.gguf", SMALL, Progress(), whole / "products")
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(tiny(name), parts / "a.gguf", SMALL, Stops(after), parts / "products")
    assert groups_held(parts / "a.gguf.state") == after // 512 and not (parts / "a.gguf").exists()
    report = calibrate_model(tiny(name), parts / "a.gguf", SMALL, Progress(), parts / "products")
    assert report.resumed == after // 512 * 256 and report.tokens == 1024
    assert sorted(file.name for file in parts.iterdir()) == ["a.gguf", "products"]  # no state left
    assert (parts / "a.gguf").read_bytes() == (whole / "a.gguf").read_bytes()
    assert_same_products(parts / "products", whole / "products")


def stopped(folder: Path, tmp_path: Path, hessian: Path | None = None) -> Path:
    """A calibration that stopped behind its second group; its state."""
    with pytest.raises(KeyboardInterrupt):
        calibrate_model(folder, tmp_path / "a.gguf", SMALL, Stops(1100), hessian)
    assert groups_held(tmp_path / "a.gguf.state") == 2
    return tmp_path / "a.gguf.state"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"tokens": 1000}, {"dtype": "bf16"}, {"data": ("code",)}, {"batch_tokens": 64}]
)
def test_a_state_of_another_calibration_is_not_gone_on_with(change: dict, tiny: Tiny, tmp_path: Path) -> None:
    stopped(tiny("llama"), tmp_path)
    options = dataclasses.replace(SMALL, **change)
    report = calibrate_model(tiny("llama"), tmp_path / "a.gguf", options, Progress())
    assert report.resumed == 0
    again = calibrate_model(tiny("llama"), tmp_path / "b.gguf", options, Progress())
    assert (tmp_path / "a.gguf").read_bytes() == again.path.read_bytes()


def test_a_state_of_another_model_is_not_gone_on_with(tiny: Tiny, tmp_path: Path) -> None:
    stopped(tiny("llama"), tmp_path)
    assert calibrate_model(tiny("mistral"), tmp_path / "a.gguf", SMALL, Progress()).resumed == 0


def test_products_asked_for_later_are_of_all_groups(tiny: Tiny, tmp_path: Path) -> None:
    stopped(tiny("llama"), tmp_path)
    report = calibrate_model(tiny("llama"), tmp_path / "a.gguf", SMALL, Progress(), tmp_path / "products")
    assert report.resumed == 0
    with safe_open(tmp_path / "products" / "lm_head.weight.safetensors", "pt") as file:
        diagonal = file.get_tensor("products")[0].diagonal()
    np.testing.assert_allclose(diagonal, report.statistics.entries["output.weight"].squares[0], rtol=1e-3)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"gone")])
def test_products_that_are_gone_end_the_run(
    damage: Callable[[Path], None], tiny: Tiny, tmp_path: Path
) -> None:
    stopped(tiny("llama"), tmp_path, tmp_path / "products")
    damage(tmp_path / "products" / "model.layers.1.mlp.up_proj.weight.safetensors")
    with pytest.raises(
        LlmcompressError, match="up_proj.weight.safetensors: the sums of 2 groups .* remove that"
    ):
        calibrate_model(tiny("llama"), tmp_path / "a.gguf", SMALL, Progress(), tmp_path / "products")


def test_a_damaged_state_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    state = stopped(tiny("llama"), tmp_path)
    for content in (b"", b"no state", state.read_bytes()[:-100]):
        state.write_bytes(content)
        with pytest.raises(LlmcompressError, match="a.gguf.state: cannot be read .* remove it"):
            calibrate_model(tiny("llama"), tmp_path / "a.gguf", SMALL, Progress())


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "llmcompress", "calibrate", str(sample), "-o", out, "--tokens", "16k",
                "--save-every", "4k", "--hessian", f"{out}-products"]  # fmt: skip

    subprocess.run(command("whole.gguf"), cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen(command("parts.gguf"), cwd=tmp_path, stderr=subprocess.DEVNULL)
    state = tmp_path / "parts.gguf.state"
    while process.poll() is None and not (state.exists() and groups_held(state)):
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and state.exists() and not (tmp_path / "parts.gguf").exists()
    done = subprocess.run(command("parts.gguf"), cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "of them from an earlier run" in done.stdout and not state.exists()
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert_same_products(tmp_path / "parts.gguf-products", tmp_path / "whole.gguf-products")


# What is refused


def test_rows_longer_than_the_model_s_positions_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, chunk=513)
    for name in ("llama", "gpt2"):
        with pytest.raises(
            LlmcompressError, match="rows of 513 tokens: the model has 512 positions; give --chunk 512"
        ):
            calibrate_model(tiny(name), tmp_path / "a.gguf", options, Progress())


def test_tokens_beyond_the_vocabulary_are_refused(tiny: Tiny, sample: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny("llama"), folder)  # 512 tokens
    for file in sample.glob("tokenizer*"):  # 4096
        shutil.copy(file, folder)
    with pytest.raises(CheckpointError, match=r"the tokenizer gives token \d{3,4}, the model has 512 tokens"):
        calibrate_model(folder, tmp_path / "a.gguf", SMALL, Progress())


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out, hessian, message in (
        ("a.bin", None, "ends in .gguf or .dat"),
        ("file/a.gguf", None, "file: cannot be made"),
        ("a.gguf", tmp_path / "file", "file: cannot be made"),
        ("/proc/a.gguf", None, "/proc/a.gguf.state: cannot be written"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            calibrate_model(tiny("llama"), tmp_path / out, SMALL, Stops(0), hessian)
    assert calibrate_model(
        tiny("llama"), tmp_path / "new" / "folder" / "a.gguf", SMALL, Progress()
    ).path.exists()


# The command


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_says_what_it_wrote(tiny: Tiny, tmp_path: Path) -> None:
    few = ("--tokens", "256", "--chunk", "64", "--dtype", "f32")
    result = command(tiny("llama"), "-o", tmp_path / "{name}.gguf", *few)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"{tmp_path / 'tiny.gguf'}: 15 weights, 256 tokens, in f32"
    result = command(tiny("llama"), "-o", tmp_path / "b.gguf", *few, "--json")
    found = json.loads(result.stdout)
    assert (found["path"], found["tokens"], found["resumed"], found["dtype"]) == (
        str(tmp_path / "b.gguf"), 256, 0, "f32",
    )  # fmt: skip
    assert found["tokens_of_weights"]["output.weight"] == [256]
    shown = CliRunner().invoke(app, ["stats", "show", str(tmp_path / "b.gguf")])
    assert shown.exit_code == 0 and "calibration.model: tiny" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bf17"], "--dtype bf17: is none of auto, f32, mixed, bf16, f16; did you mean 'bf16'?"),
        (["--device", "tpu9"], "--device tpu9: "),
        (["--device", "meta"], "--device meta: "),
        (["--windows", "sliding"], "--windows sliding: is none of packed, llama.cpp"),
        (["--tokens", "0"], "--tokens: '0' is not a "),
        (["--tokens", "many"], "--tokens: 'many"),
        (["--data", "no-such-text"], "'no-such-text': no such file"),
        (["--hidden-ram", "no"], "--hidden-ram: 'no' is not a size"),
        (["--save-every", "0"], "--save-every: '0' is not a "),
        (["-o", "a.json"], "a.json: statistics go into a file that ends in .gguf or .dat"),
        (["--chunk", "10000"], "give --chunk 512 or less"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(tiny("llama"), "-o", tmp_path / "a.gguf", *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "transformers", "greenlet"])
def test_without_the_extra_one_line_names_it(module: str, sample: Path, tmp_path: Path) -> None:
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from llmcompress.cli import main
sys.argv = ["llmcompress", "calibrate", {str(sample)!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    # torchao, where transformers finds it, tells first of CUDA libraries that it cannot load.
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"error: {module} is not installed; running a model needs pip install 'llmcompress[calibrate]', "
        "fine-tuning one 'llmcompress[finetune]'"
    )


# Memory and use

PEAK = """
import resource, sys
import torch
from pathlib import Path
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.progress import Progress

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(model, tokens):
    options = CalibrationOptions(tokens=tokens, chunk=128, batch_tokens=512, dtype="f32", device="cpu")
    calibrate_model(model, Path(sys.argv[3]), options, Progress())

run(sys.argv[1], 512)  # what libraries take
before = peak()
run(sys.argv[2], 512)
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_a_block_and_not_the_model(tmp_path: Path) -> None:
    large = Llama(layers=24, hidden=768, feed_forward=2048, heads=12, kv_heads=4)
    folder = write_checkpoint(tmp_path / "large", large)
    whole = 2 * (folder / "model.safetensors").stat().st_size  # run in float32
    small = write_checkpoint(tmp_path / "small", Llama(layers=1))
    arguments = [sys.executable, "-c", PEAK, str(small), str(folder), str(tmp_path / "a.gguf")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert whole > 500e6 and int(done.stdout) < whole / 3


WEIGHTED = {
    "IQ1_S": 0.8, "IQ1_M": 0.8, "IQ2_XXS": 0.5, "IQ2_XS": 0.4, "IQ2_S": 0.4, "IQ3_XXS": 0.3, "IQ3_S": 0.2,
    "IQ4_NL": 0.1, "IQ4_XS": 0.1,
}  # fmt: skip
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York"


@pytest.fixture(scope="module")
def weighted(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("weighted")
    calibrate_model(sample, out / "imatrix.gguf", CalibrationOptions(tokens=2**14), Progress())
    made = llmcompress.quantize(
        sample, out / "{type}.gguf", type=["F32", *WEIGHTED], imatrix=str(out / "imatrix.gguf")
    )
    return {output.type: output.paths[0] for output in made.outputs}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTED)
def test_every_iq_type_takes_our_statistics_and_runs(name: str, weighted: dict[str, Path]) -> None:
    """Logits relative to those of F32."""
    found = {}
    for kind in ("F32", name):
        with Model(weighted[kind]) as engine:
            found[kind] = engine.logits(engine.tokenize(TEXT))
            meta = engine.meta("quantize.imatrix.file")
    assert meta == "imatrix.gguf"
    distance = np.linalg.norm(found[name] - found["F32"]) / np.linalg.norm(found["F32"])
    assert distance < WEIGHTED[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "without"),
    [("qwen35", "ssm_out"), ("deepseek2", "attn_k_b attn_v_b"), ("mamba2", ""), ("granitehybrid", ""), ("gpt-oss", "")],
)  # fmt: skip
def test_inputs_in_another_order_are_not_taken_for_a_tensors_own(
    name: str, without: str, root: Path, tmp_path: Path
) -> None:
    tokenizers = {BYTE_BPE: root / "examples/sample-llama-6m", SENTENCEPIECE: root / "tests/data/stories260K"}
    model = build(name, tmp_path / "tiny", tokenizers, models=MORE)
    found = set(calibrate_model(model, tmp_path / "a.gguf", SMALL, Progress()).statistics.entries)
    made = llmcompress.quantize(
        model, tmp_path / "a-q.gguf", type="Q4_K_S", imatrix=str(tmp_path / "a.gguf")
    ).outputs[0]
    rounded = {tensor.name for tensor in made.tensors if tensor.type not in ("F32", "F16")}
    missing = {place.split(".")[2] for place in rounded - found - {"token_embd.weight", "output.weight"}}
    assert missing == set(without.split())
