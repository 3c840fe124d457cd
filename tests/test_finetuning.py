"""Whole fine-tunings of tiny models: every method learns, the best adapter is kept, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT
from llama_cpp import Model
from llmcompress.converters.finetuning import AS_TRAINED, TuningReport, finetune_model
from llmcompress.converters.lora_to_gguf import plan_lora, run_lora
from peft_adapters import tuned_logits
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "tools"))
import bench_finetune

import llmcompress
from llmcompress.adapter import Adapter
from llmcompress.errors import LlmcompressError, RunError
from llmcompress.frozen_model import load_frozen
from llmcompress.progress import Progress
from llmcompress.row_packing import batch_of
from llmcompress.tuning_options import TuningOptions

CPU = torch.device("cpu")
QUICK = {
    "rank": 8,
    "steps": 12,
    "evaluations": 3,
    "batch": 8,
    "validation": "0.2",
    "dtype": "f32",
    "learning_rate": 0.01,
}


def examples(
    path: Path, count: int = 60, answer: Callable[[int], str] = lambda at: "yes" if at % 3 else "no"
) -> str:
    records = [
        {"prompt": f"Is {at % 3} above 0, in case {at}?", "completion": answer(at)} for at in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return examples(tmp_path_factory.mktemp("data") / "train.jsonl")


def run(
    model: Path, out: Path, data: str, progress: Progress | None = None, **options: object
) -> TuningReport:
    return finetune_model(model, out, [data], TuningOptions(**(QUICK | options)), progress or Progress())


def measured(model: torch.nn.Module, report: TuningReport) -> float:
    """The held-out loss, an example at a time."""
    total, count = 0.0, 0
    for example in report.data.validation:
        batch = batch_of([[example]], pack=False)
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(input_ids=batch["input_ids"]).logits[0, :-1].float(),
                batch["labels"][0, 1:],
                reduction="sum",
            )
        total, count = total + losses.item(), count + int(example.learned.sum())
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"load": "4bit"}, {"load": "8bit"}, {"method": "rslora"}, {"load": "4bit", "method": "dora"},
        {"load": "4bit", "method": "adalora"}, {"init": "pissa"}, {"load": "4bit", "init": "pissa"},
        {"load": "4bit", "init": "loftq"}, {"gradient_checkpointing": True, "micro_batch": 2, "train_also": ("lm_head",)},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)  # fmt: skip
def test_what_is_saved_is_what_was_measured(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, options: dict
) -> None:
    folder, out = tiny("llama"), tmp_path / "adapter"
    report = run(folder, out, data, **options)
    assert report.held_out < 0.5 * report.untuned
    load, adapter = options.get("load", "16bit"), out
    if options.get("init") == "loftq":
        adapter = out / AS_TRAINED
        assert Adapter.open(adapter).trained_in_nf4 and not Adapter.open(out).trained_in_nf4
    elif options.get("init") == "pissa":
        load = "16bit"  # it fits the model as it is, less what quantizing the rest changed
    frozen = load_frozen(folder, load, CPU, torch.float32).eval()
    assert measured(frozen, report) == pytest.approx(report.untuned, rel=0.1 if "init" in options else 1e-3)
    tuned = peft.PeftModel.from_pretrained(frozen, adapter).eval()
    assert measured(tuned, report) == pytest.approx(
        report.held_out, rel=0.15 if report.load != load else 2e-3
    )
    assert not (tmp_path / "adapter.part").exists()
    if "init" in options:  # the change alone fits the unquantized model
        plain = load_frozen(folder, "16bit", CPU, torch.float32).eval()
        assert measured(peft.PeftModel.from_pretrained(plain, out).eval(), report) < 0.6 * report.untuned
        assert json.loads((out / "adapter_config.json").read_text())["r"] == 16


@pytest.mark.slow
def test_the_best_adapter_is_kept_and_the_run_stops_early(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Answers that nothing tells, so that learning the training's makes the held-out loss rise."""
    words = "red blue green black white grey pink brown".split()
    source = examples(tmp_path / "a.jsonl", 40, lambda at: words[at * at * 7 % 8])
    options = {"learning_rate": 0.02, "steps": 80, "evaluations": 20, "patience": 2}
    report = run(tiny("llama"), tmp_path / "adapter", source, **options)
    last = report.curve.held_out[-1]
    assert report.steps < 80 and last[1] > report.held_out and report.best_step < last[0]
    assert any("stopped early" in note for note in report.notes)
    frozen = load_frozen(tiny("llama"), "16bit", CPU, torch.float32)
    tuned = peft.PeftModel.from_pretrained(frozen, tmp_path / "adapter").eval()
    assert measured(tuned, report) == pytest.approx(report.held_out, rel=1e-3)


class Killed(Progress):
    """Stops a run at a step."""

    def __init__(self, at: int) -> None:
        self.left, self.lines = at, []

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"load": "4bit", "init": "pissa"}, {"method": "adalora", "steps": 24}],
    ids=["lora", "pissa", "adalora"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, options: dict
) -> None:
    folder = tiny("llama")
    whole = run(folder, tmp_path / "whole", data, **options)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "adapter", data, Killed(9), **options)
    part = tmp_path / "adapter.part"
    assert not (tmp_path / "adapter").exists() and (part / "checkpoint-8").is_dir()
    (part / "checkpoint-99").mkdir()  # killed while it was written
    with pytest.raises(LlmcompressError, match="unfinished run with other options"):
        run(folder, tmp_path / "adapter", data, **options | {"rank": 4})
    report = run(folder, tmp_path / "adapter", data, **options)
    assert any("went on from step 8" in note for note in report.notes)
    assert dict(report.curve.held_out) == pytest.approx(dict(whole.curve.held_out))
    assert len(report.curve.held_out) == 4 and report.untuned == whole.untuned
    kept, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "adapter"))
    assert kept and all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.slow
def test_adalora_keeps_the_ranks_of_its_best_step(
    tiny: Callable[[str], Path], tmp_path: Path, data: str
) -> None:
    """The best step lies before the last one, in which other ranks are left."""
    report = run(
        tiny("llama"),
        tmp_path / "a",
        data,
        method="adalora",
        steps=24,
        evaluations=12,
        patience=2,
        learning_rate=0.2,
    )
    last = report.curve.held_out[-1]
    assert report.best_step < last[0] and report.held_out < last[1]
    frozen = load_frozen(tiny("llama"), "16bit", CPU, torch.float32)
    tuned = peft.PeftModel.from_pretrained(frozen, tmp_path / "a").eval()
    assert measured(tuned, report) == pytest.approx(report.held_out, rel=1e-3)


@pytest.mark.slow
def test_the_report_and_what_lies_beside_the_adapter(
    tiny: Callable[[str], Path], tmp_path: Path, data: str
) -> None:
    progress = Killed(10**6)
    report = llmcompress.finetune(
        tiny("llama-tied"), tmp_path / "out" / "adapter", data, progress=progress, qlora=True, **QUICK
    )
    told = json.loads((tmp_path / "out" / "adapter" / "finetune.json").read_text())
    assert told == json.loads(json.dumps(report.as_dict()))
    assert (
        told["load"] == "4bit" and told["data"]["train_examples"] == 48 and len(told["data"]["sha256"]) == 64
    )
    assert told["held_out_losses"][0] == [0, told["untuned_loss"]] and told["steps"] == 12
    assert (tmp_path / "out" / "adapter" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith("step 12: held-out loss") for line in progress.lines)
    assert 10**6 - progress.left == 12
    with pytest.raises(LlmcompressError, match="is there already"):
        run(tiny("llama-tied"), tmp_path / "out" / "adapter", data)


@pytest.mark.slow
def test_a_model_that_cannot_be_packed_trains_all_the_same(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = run(tiny("llama"), tmp_path / "packed", data)
    monkeypatch.setattr("llmcompress.converters.finetuning.packs_cleanly", lambda *_: False)
    apart = run(tiny("llama"), tmp_path / "apart", data)
    assert packed.packed and not apart.packed and any("row of its own" in note for note in apart.notes)
    assert apart.curve.held_out[0] == pytest.approx(packed.curve.held_out[0])
    assert apart.held_out == pytest.approx(packed.held_out, rel=0.02)


@pytest.mark.slow
def test_the_part_that_sees_stays_as_it_is(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    folder = tmp_path / "sees"
    text = transformers.AutoConfig.from_pretrained(tiny("gemma3")).to_dict() | {
        "num_hidden_layers": 2,
        "layer_types": None,
    }
    eye = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=eye | {"patch_size": 14}, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    for file in tiny("gemma3").glob("tokenizer*"):
        shutil.copy(file, folder)
    report = run(folder, tmp_path / "adapter", data)
    assert report.held_out < 0.5 * report.untuned and not report.notes
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2 and not any("vision" in name or "projector" in name for name in names)
    ids = report.data.train[0].ids.tolist()
    wanted = tuned_logits(folder, tmp_path / "adapter", ids)
    base = llmcompress.quantize(folder, tmp_path / "base.gguf", type="F32").paths[0]
    with Model(base) as model:
        model.use_adapter(run_lora(plan_lora(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")))
        assert abs(model.logits(ids) - wanted).max() < 1e-3 * np.ptp(wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "notes"),
    [
        ("qwen3moe", {}, []),
        ("qwen3moe", {"load": "4bit"}, ["4 stacked matrices (experts) are not quantized: bitsandbytes"]),
        ("glm4moe", {}, ["6 linear layers have no adapter, such as model.layers.0.mlp.gate_proj.weight"]),
        ("granitemoe", {}, ["4 stacked matrices (experts) have no adapter, such as model.layers.0.block_sparse_moe"]),
        ("mamba", {}, ["2 linear layers have no adapter, such as backbone.layers.0.mixer.out_proj.weight"]),
    ],
)  # fmt: skip
def test_what_has_no_adapter_is_said(
    name: str, options: dict, notes: list[str], tiny: Callable[[str], Path], tmp_path: Path, data: str
) -> None:
    """Of experts, and of layers that peft keeps for names of its own."""
    report = run(tiny(name), tmp_path / "adapter", data, steps=4, evaluations=1, **options)
    assert report.held_out < report.untuned
    for note in notes:
        assert any(found.startswith(note) for found in report.notes), report.notes
    assert len([note for note in report.notes if "row of its own" not in note]) == len(notes)


@pytest.mark.slow
def test_what_cannot_be_done_is_one_line(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    for options, message in (
        (
            {"init": "loftq"},
            "--init loftq: makes up for quantizing to 4 bits, the model is in 16bit; add --qlora",
        ),
        ({"load": "8bit", "init": "pissa"}, "--init pissa: needs the unquantized model"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"max_length": 4096}, "--max-length 4096: the model has 512 positions"),
        ({"max_length": 99, "loss": "every"}, "--loss every"),
        ({"schedule": "zigzag"}, "--schedule zigzag"),
        ({"optimizer": "best"}, "--optimizer best"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            run(tiny("llama"), tmp_path / "adapter", data, **options)
    with pytest.raises(RunError, match="step .*: the loss is .*; give a smaller --lr"):
        run(tiny("llama"), tmp_path / "other", data, learning_rate=1e30, evaluations=12)


def test_a_gpu_that_the_trainer_would_not_take_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.converters.finetuning.compute_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        LlmcompressError, match="--device cuda:1: .*start the program with CUDA_VISIBLE_DEVICES=1"
    ):
        run(tiny("llama"), tmp_path / "adapter", data, device="cuda:1")


@pytest.mark.slow
def test_a_model_stored_in_four_bits_is_trained_as_it_is(
    tiny: Callable[[str], Path], tmp_path: Path, data: str
) -> None:
    llmcompress.quantize(tiny("llama"), tmp_path / "nf4", format="nf4")
    report = run(tmp_path / "nf4", tmp_path / "adapter", data)
    assert report.load == "4bit" and report.held_out < 0.5 * report.untuned
    frozen = load_frozen(tmp_path / "nf4", "4bit", CPU, torch.float32).eval()
    assert measured(frozen, report) == pytest.approx(report.untuned, rel=1e-3)
    for options, message in (
        ({"load": "8bit"}, "--load 8bit: the model's weights are stored in 4bit"),
        ({"init": "loftq"}, "--init loftq: needs the unquantized model"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            run(tmp_path / "nf4", tmp_path / "other", data, **options)


def command(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, arguments)), env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


FLAGS = (
    "--rank",
    "8",
    "--batch",
    "8",
    "--validation",
    "0.2",
    "--dtype",
    "f32",
    "--lr",
    "0.01",
    "--device",
    "cpu",
)


@pytest.mark.slow
def test_a_run_killed_with_9_goes_on(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    out = tmp_path / "adapter"
    arguments = [
        sys.executable,
        "-m",
        "llmcompress",
        "finetune",
        tiny("llama"),
        "-o",
        out,
        "--data",
        data,
        *FLAGS,
    ]
    arguments += ["--steps", "300", "--evaluations", "100", "--patience", "0"]
    first = command(*arguments)
    while (
        first.poll() is None
        and not (tmp_path / "adapter.part" / "checkpoint-3" / "trainer_state.json").exists()
    ):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not out.exists()
    steps = [int(path.name[11:]) for path in (tmp_path / "adapter.part").glob("checkpoint-*")]
    assert steps
    other = command(*arguments, "--rank", "4")
    assert "unfinished run with other options" in other.communicate()[0] and other.returncode == 2


@pytest.mark.slow
def test_two_processes_share_a_run(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one; --multi_gpu with a CPU starts two, over gloo."""
    out = tmp_path / "adapter"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--main_process_port", "0"]  # fmt: skip
    arguments = [
        "-m",
        "llmcompress",
        "finetune",
        tiny("llama"),
        "-o",
        out,
        "--data",
        data,
        *FLAGS,
        "--steps",
        "12",
    ]
    done = command(*launch, *arguments, "--evaluations", "3", "--json", ACCELERATE_USE_CPU="true")
    printed = done.communicate(timeout=300)[0]
    assert done.returncode == 0, printed
    told = json.loads((out / "finetune.json").read_text())
    assert told["devices"] == 2 and told["chosen"]["micro_batch"] * told["chosen"]["accumulation"] == 4
    alone = run(tiny("llama"), tmp_path / "alone", data)
    assert told["untuned_loss"] == pytest.approx(alone.untuned, rel=1e-5)
    assert told["held_out_loss"] == pytest.approx(alone.held_out, rel=0.05)


@pytest.mark.slow
def test_a_tuned_model_does_in_llama_cpp_what_it_could_not(tmp_path: Path) -> None:
    report, adapter, spare = bench_finetune.tuned_task(tmp_path)
    assert report.held_out < 0.05 * report.untuned
    base = bench_finetune.quantized(bench_finetune.SAMPLE, tmp_path / "base.gguf")
    assert bench_finetune.right_answers(base, spare) == 0
    tuned = bench_finetune.quantized(bench_finetune.SAMPLE, tmp_path / "tuned.gguf", adapter)
    assert bench_finetune.right_answers(tuned, spare) >= 0.9 * len(spare)
