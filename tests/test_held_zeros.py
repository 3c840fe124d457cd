"""Zeros that are held in training: exactly, seen by every forward, and merged as they were trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from llmcompress.converters.finetuning import finetune_model
from pruned_models import pruned, zeros_are_held
from test_finetuning import CPU, QUICK, Killed, examples, measured, run
from torch import nn
from torch.nn import functional

from llmcompress.errors import LlmcompressError
from llmcompress.frozen_model import load_frozen
from llmcompress.held_zeros import HeldZeros, Restore, matrices
from llmcompress.tuning_options import TuningOptions


class Two(nn.Module):
    """A linear and an embedding, the linear half zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 5)
        with torch.no_grad():
            self.linear.weight[torch.rand(5, 6) < 0.5] = 0
            self.linear.weight[0, 0] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rows(ids))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_masked_product_is_the_masked_sum_of_plain_torch(rslora: bool) -> None:
    torch.manual_seed(0)
    model, ids = Two(), torch.tensor([[0, 3, 2], [5, 1, 6]])
    weight, bias, rows = (
        each.detach().clone() for each in (model.linear.weight, model.linear.bias, model.rows(ids))
    )
    weights = matrices(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["linear"], use_rslora=rslora)
    )
    zeros = HeldZeros(adapted, weights)
    assert (zeros.zeros, zeros.weights) == (int((weight == 0).sum()), 30)
    layer = adapted.get_base_model().linear
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        factors[1].copy_(torch.randn(5, 2))
    a, b = (each.detach().clone().requires_grad_() for each in factors)
    scale = 3 / 2**0.5 if rslora else 3 / 2
    merged = torch.where(weight == 0, 0.0, weight + scale * b @ a)
    expected = rows @ merged.T + bias
    found = adapted(ids)
    torch.testing.assert_close(found, expected)
    target = torch.randn_like(expected)
    for each in (found, expected):
        (each * target).sum().backward()
    torch.testing.assert_close(factors[0].grad, a.grad)
    torch.testing.assert_close(factors[1].grad, b.grad)
    together = adapted.merge_and_unload()
    torch.testing.assert_close(together.linear.weight, merged)
    assert torch.equal(together.linear.weight == 0, weight == 0)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_whole_weights_move_as_in_plain_torch_and_zeros_do_not(optimizer: str) -> None:
    torch.manual_seed(0)
    model, plain = Two(), Two()
    plain.load_state_dict(model.state_dict())
    kept = model.linear.weight.detach() != 0
    callback = Restore(HeldZeros(model, matrices(model)))
    given = {"lr": 0.1, "weight_decay": 0.1} | ({} if optimizer == "AdamW" else {"momentum": 0.9})
    optimizers = [getattr(torch.optim, optimizer)(each.parameters(), **given) for each in (model, plain)]
    for step in range(5):
        ids = torch.randint(7, (4, 3))
        for each, of in zip((model, plain), optimizers):
            of.zero_grad()
            functional.cross_entropy(each(ids).flatten(0, 1), ids.flatten() % 5).backward()
            if each is plain:
                plain.linear.weight.grad *= kept
            else:
                assert not each.linear.weight.grad[~kept].any()
            of.step()
        callback.on_optimizer_step(None, None, None)
        assert torch.equal(model.linear.weight != 0, kept)
    torch.testing.assert_close(model.linear.weight, plain.linear.weight)
    torch.testing.assert_close(model.rows.weight, plain.rows.weight)


def test_an_optimizer_that_moves_what_has_no_gradient_is_undone() -> None:
    torch.manual_seed(0)
    model = Two()
    kept = model.linear.weight.detach() != 0
    zeros = HeldZeros(model, matrices(model))
    with torch.no_grad():
        model.linear.weight += 1
    zeros.restore()
    assert torch.equal(model.linear.weight != 0, kept)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return examples(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, options",
    [
        ("llama", {}), ("llama", {"load": "4bit"}), ("gpt2", {"method": "rslora"}),
        ("llama-tied", {"method": "full", "learning_rate": 0.002}),
        ("mixtral-fused", {"method": "full", "learning_rate": 0.002}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "lora",
)  # fmt: skip
def test_what_is_healed_is_an_ordinary_checkpoint_with_the_same_zeros(
    tiny: Callable[[str], Path], tmp_path: Path, data: str, model: str, options: dict
) -> None:
    source = pruned(tiny(model), tmp_path / "pruned")
    report = run(source, tmp_path / "healed", data, keep_zeros=True, **options)
    assert report.held_out < 0.5 * report.untuned and any("zeros held" in note for note in report.notes)
    assert zeros_are_held(source, tmp_path / "healed")
    healed = load_frozen(tmp_path / "healed", "16bit", CPU, torch.float32).eval()
    # what is saved is what was measured: the forward of the training was the masked one
    assert measured(healed, report) == pytest.approx(report.held_out, rel=2e-3)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "healed")
    )
    assert before == after
    assert (tmp_path / "healed" / "tokenizer.json").exists() and not (tmp_path / "healed.part").exists()
    assert json.loads((tmp_path / "healed" / "finetune.json").read_text())["options"]["keep_zeros"]


@pytest.mark.slow
def test_a_whole_training_that_was_stopped_goes_on_to_the_same_weights(
    tiny: Callable[[str], Path], tmp_path: Path, data: str
) -> None:
    source = pruned(tiny("llama"), tmp_path / "pruned")
    options = {
        "method": "full",
        "learning_rate": 0.002,
        "keep_zeros": True,
        "teachers": (str(tiny("llama")),),
    }
    options["soft"] = 0.5
    whole = run(source, tmp_path / "whole", data, **options)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "again", data, Killed(9), **options)
    with pytest.raises(LlmcompressError, match="unfinished run with other options and teachers"):
        run(source, tmp_path / "again", data, **options | {"teachers": (str(source),)})
    report = run(source, tmp_path / "again", data, **options)
    assert any("went on from step 8" in note for note in report.notes)
    assert dict(report.curve.held_out) == pytest.approx(dict(whole.curve.held_out))
    assert zeros_are_held(source, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_what_cannot_be_held_is_one_line(tiny: Callable[[str], Path], tmp_path: Path, data: str) -> None:
    for options, message in (
        ({"method": "dora"}, "--keep-zeros: .*not with --method dora"),
        ({"init": "pissa"}, "--keep-zeros: .*not with --init pissa"),
        ({}, "--keep-zeros: no trained matrix of the model has a zero"),
        ({"method": "full"}, "--keep-zeros: no trained matrix of the model has a zero"),
        (
            {"method": "full", "load": "4bit"},
            "--method full: trains the weights themselves, not those in 4bit",
        ),
        ({"method": "full", "targets": ("q_prj",)}, "--target q_prj: .*did you mean 'q_proj'"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            finetune_model(
                tiny("llama"), tmp_path / "out", [data], TuningOptions(**(QUICK | {"keep_zeros": True} | options)), Killed(99)
            )  # fmt: skip
