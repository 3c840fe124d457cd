"""What is chosen where nothing is asked, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmcompress.errors import LlmcompressError
from llmcompress.tuning_options import Chosen, TuningOptions, chosen, parse_options


def figures(options: TuningOptions = TuningOptions(), **of_model: object) -> Chosen:
    given = {"examples": 1000, "longest": 512, "hidden": 2000, "weights": 10**9, "devices": 1, "cuda": False}
    return chosen(options, **(given | of_model))


def test_small_data_is_shown_more_often() -> None:
    assert figures(examples=10).epochs == 10
    assert figures(examples=1600).epochs == 3 and figures(examples=1600).steps == 300
    assert figures(examples=320).epochs == 10  # 20 steps an epoch, not 15 times over
    assert figures(examples=800).epochs == 6
    assert figures(examples=100_000).epochs == 1
    assert figures(TuningOptions(epochs=0.5), examples=1600).steps == 50
    assert figures(TuningOptions(steps=7)).steps == 7


def test_a_step_has_the_examples_asked_for_on_any_number_of_devices() -> None:
    for devices in (1, 2, 4):
        for longest in (100, 2048, 10_000):
            found = figures(devices=devices, longest=longest)
            assert found.micro_batch * found.accumulation * devices == 16
            assert found.micro_batch == 1 or found.micro_batch * longest <= 4096
    assert figures(TuningOptions(micro_batch=3)).accumulation == 5


def test_the_learning_rate_falls_with_the_width() -> None:
    assert figures(hidden=2000).learning_rate == pytest.approx(5e-4)
    assert figures(hidden=8000).learning_rate == pytest.approx(5e-4 / 4**0.78)
    assert figures(TuningOptions(learning_rate=1e-5)).learning_rate == 1e-5


def test_what_depends_on_the_device_and_the_size() -> None:
    assert figures(cuda=True).optimizer == "paged_adamw_8bit" and figures().optimizer == "adamw_torch"
    assert figures().gradient_checkpointing and not figures(weights=10**7).gradient_checkpointing
    assert not figures(TuningOptions(gradient_checkpointing=False)).gradient_checkpointing
    lora, rslora = figures(), figures(TuningOptions(method="rslora"))
    assert lora.alpha / 64 == rslora.alpha / 64**0.5  # the same start at the default rank


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "lara"}, "--method lara: is none of .*did you mean 'lora'"),
        ({"init": "svd"}, "--init svd"),
        ({"dtype": "f8"}, "--dtype f8"),
        ({"rank": 0}, "--rank 0: give a number above 0"),
        ({"alpha": float("nan")}, "--alpha nan"),
        ({"learning_rate": float("inf")}, "--lr inf"),
        ({"dropout": 1.0}, "--dropout 1.0"),
        ({"epochs": 2, "steps": 3}, "--epochs 2 and --steps 3"),
        ({"init": "pissa", "method": "dora"}, "--init pissa: with --method lora or rslora, not dora"),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    with pytest.raises(LlmcompressError, match=message):
        replace(TuningOptions(), **change).check()
    TuningOptions().check()


def test_a_name_that_is_no_option_is_refused() -> None:
    assert parse_options({"rank": 4}) == TuningOptions(rank=4)
    with pytest.raises(LlmcompressError, match="finetune\\(\\): rnk is none of .*did you mean 'rank'"):
        parse_options({"rnk": 4})
