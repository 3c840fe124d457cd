"""What is learned of teachers: the losses against slow plain ones, layer pairs, widths, and whole trainings."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llmcompress.converters.finetuning import finetune_model
from safetensors.torch import load_file
from test_finetuning import CPU, QUICK, Killed, examples, measured, run
from tiny_models import SENTENCEPIECE, SIZE, build, model

from llmcompress.distillation import PROJECTIONS, attention_loss, hidden_loss, pairs_of, soft_loss
from llmcompress.errors import LlmcompressError
from llmcompress.frozen_model import load_frozen
from llmcompress.tuning_options import TuningOptions

TAUGHT = {"method": "full", "learning_rate": 0.002, "loss": "all"}


def gradient_by_differences(function: Callable[[torch.Tensor], float], at: torch.Tensor) -> torch.Tensor:
    """Of a plain function of floats, step by step."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        moved = [at.clone().flatten() for _ in range(2)]
        for each, step in zip(moved, (1e-3, -1e-3)):
            each[place] += step
        found.view(-1)[place] = (function(moved[0].view_as(at)) - function(moved[1].view_as(at))) / 2e-3
    return found


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(each / temperature) for each in row]
    return [each / sum(powers) for each in powers]


def test_the_soft_loss_and_its_gradient_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 11, dtype=torch.float64)

    def plain(logits: torch.Tensor, temperature: float) -> float:
        total = 0.0
        for own, theirs in zip(logits.tolist(), teacher[:, :9].tolist()):
            q, p = softmax(own, temperature), softmax(theirs, temperature)
            total += sum(each * math.log(each / other) for each, other in zip(p, q))
        return temperature**2 * total

    for temperature in (1.0, 3.0):
        logits = student.clone().requires_grad_()
        loss = soft_loss(logits, teacher, temperature)
        assert loss.item() == pytest.approx(plain(student, temperature), rel=1e-5)
        loss.backward()
        expected = gradient_by_differences(lambda each: plain(each, temperature), student)
        torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-5)
    assert soft_loss(teacher, teacher, 2.0) == 0


def test_the_losses_of_states_and_maps_and_their_gradients_are_the_plain_ones() -> None:
    torch.manual_seed(0)
    states, wanted = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def plain(own: torch.Tensor) -> float:
        return sum(
            sum((a - b) ** 2 for a, b in zip(mine, theirs)) / sum(b * b for b in theirs)
            for mine, theirs in zip(own.tolist(), wanted.tolist())
        )

    own = states.clone().requires_grad_()
    loss = hidden_loss(own, wanted)
    loss.backward()
    assert loss.item() == pytest.approx(plain(states), rel=1e-5)
    torch.testing.assert_close(own.grad, gradient_by_differences(plain, states), rtol=1e-4, atol=1e-5)

    scores = torch.randn(3, 2, 6, dtype=torch.float64)
    target = torch.randn(3, 2, 6, dtype=torch.float64).softmax(-1)
    target[0, 0, 3:] = 0  # what a mask hides
    target[0, 0] /= target[0, 0].sum()

    def divergence(each: torch.Tensor, heads: int = 2) -> float:
        total = 0.0
        for position in range(3):
            for head in range(heads):
                p = target[position, head].tolist() if heads == 2 else target[position].mean(0).tolist()
                q = softmax(each[position, head].tolist(), 1.0)
                total += sum(a * math.log(a / b) for a, b in zip(p, q) if a) / heads
        return total

    own = scores.clone().requires_grad_()
    loss = attention_loss(own.softmax(-1), target)
    loss.backward()
    assert loss.item() == pytest.approx(divergence(scores), rel=1e-5)
    torch.testing.assert_close(own.grad, gradient_by_differences(divergence, scores), rtol=1e-3, atol=1e-5)
    one = scores[:, :1]
    assert attention_loss(one.softmax(-1), target).item() == pytest.approx(divergence(one, 1), rel=1e-5)


def test_blocks_are_paired_evenly_or_as_asked() -> None:
    assert pairs_of(None, 4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert pairs_of(None, 3, 12) == ((0, 3), (1, 7), (2, 11))
    assert pairs_of(None, 5, 6)[-1] == (4, 5) and pairs_of(None, 4, 2)[0] == (0, 0)
    assert pairs_of("0:0, 1:5", 2, 6) == ((0, 0), (1, 5))
    for text, message in (
        ("0-1", "write it as STUDENT:TEACHER"),
        ("2:0", "the student has blocks 0 to 1"),
        ("0:6", "the teacher has blocks 0 to 5"),
    ):
        with pytest.raises(LlmcompressError, match=message):
            pairs_of(text, 2, 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return examples(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="module")
def small(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student half as wide as the tiny models, with one block."""
    values = SIZE | {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tokenizers = {SENTENCEPIECE: root / "tests" / "data" / "stories260K"}
    models = {
        "small": (
            model("LlamaForCausalLM", "LlamaConfig", **values, tie_word_embeddings=False),
            SENTENCEPIECE,
        )
    }
    return build("small", tmp_path_factory.mktemp("small") / "tiny", tokenizers, models=models)


@pytest.fixture(scope="module")
def teacher(tiny: Callable[[str], Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the examples."""
    out = tmp_path_factory.mktemp("teacher") / "model"
    run(tiny("llama"), out, data, **TAUGHT)
    return out


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_knows_and_nothing_else_is_saved(
    teacher: Path, small: Path, tmp_path: Path, data: str
) -> None:
    """`--soft 1`: the tokens' own loss has no part in it."""
    given = TAUGHT | {
        "teachers": (str(teacher),),
        "hidden": 0.5,
        "attention": 0.5,
        "learning_rate": 0.005,
        "steps": 24,
    }
    report = run(small, tmp_path / "student", data, **given)
    assert report.held_out < 0.6 * report.untuned
    was, now = (load_file(folder / "model.safetensors") for folder in (small, tmp_path / "student"))
    assert was.keys() == now.keys() and not any(PROJECTIONS in name for name in now)
    student = load_frozen(tmp_path / "student", "16bit", CPU, torch.float32).eval()
    assert measured(student, report) < 0.7 * measured(
        load_frozen(small, "16bit", CPU, torch.float32).eval(), report
    )


@pytest.mark.slow
def test_the_held_out_loss_is_the_distance_to_the_teacher(
    tiny: Callable[[str], Path], teacher: Path, tmp_path: Path, data: str
) -> None:
    """And the best step is chosen by it: over all held-out tokens, however the rows are cut."""
    given = TAUGHT | {
        "teachers": (str(teacher),),
        "steps": 4,
        "evaluations": 2,
        "soft": 0.75,
        "temperature": 2.0,
    }
    report = run(tiny("llama"), tmp_path / "student", data, **given)
    student, wanted = (
        load_frozen(folder, "16bit", CPU, torch.float32).eval() for folder in (tmp_path / "student", teacher)
    )
    total = count = 0.0
    for example in report.data.validation:
        ids = torch.from_numpy(example.ids.astype("int64"))[None]
        with torch.no_grad():
            logits, theirs = (each(input_ids=ids).logits[0, :-1] for each in (student, wanted))
        q, p = (torch.log_softmax(each.double() / 2, -1) for each in (logits, theirs))
        own = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum")
        total += (0.25 * own + 0.75 * 4 * (p.exp() * (p - q)).sum()).item()
        count += len(ids[0]) - 1
    assert report.held_out == pytest.approx(total / count, rel=2e-3)


@pytest.mark.slow
def test_a_distillation_that_was_stopped_goes_on_with_the_matrices_it_had(
    teacher: Path, small: Path, tmp_path: Path, data: str
) -> None:
    given = TAUGHT | {"teachers": (str(teacher),), "hidden": 1.0, "soft": 0.5, "temperature": 2.0}
    whole = run(small, tmp_path / "whole", data, **given)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "again", data, Killed(9), **given)
    again = run(small, tmp_path / "again", data, **given)
    assert dict(again.curve.held_out) == pytest.approx(dict(whole.curve.held_out))
    kept, same = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(kept[name], same[name]) for name in kept)


@pytest.mark.slow
def test_several_teachers_are_a_weighted_mean(
    tiny: Callable[[str], Path], teacher: Path, small: Path, tmp_path: Path, data: str
) -> None:
    other = str(tiny("llama"))
    one_step = TAUGHT | {"steps": 1, "evaluations": 1, "attention": 1.0}
    found = {}
    for name, teachers in (
        ("one", (str(teacher),)),
        ("twice", (f"{teacher}=2",)),
        ("both", (f"{teacher}=3", f"{other}=1")),
    ):
        found[name] = run(small, tmp_path / name, data, **one_step, teachers=teachers).curve.train[0][1]
    found["other"] = run(small, tmp_path / "other", data, **one_step, teachers=(other,)).curve.train[0][1]
    assert found["twice"] == pytest.approx(found["one"], rel=1e-6)
    assert found["one"] != pytest.approx(found["other"], rel=1e-2)
    assert found["both"] == pytest.approx(0.75 * found["one"] + 0.25 * found["other"], rel=1e-5)


@pytest.mark.slow
def test_how_a_step_is_cut_changes_nothing(teacher: Path, small: Path, tmp_path: Path, data: str) -> None:
    """Losses are divided by the learned tokens of the whole step, of examples of different lengths."""
    given = TAUGHT | {"teachers": (str(teacher),), "steps": 2, "evaluations": 1, "hidden": 0.5, "soft": 0.5}
    tensors = []
    for micro, pack in ((8, True), (2, True), (2, False)):
        out = tmp_path / f"{micro}-{pack}"
        run(small, out, data, **given, micro_batch=micro, pack=pack)
        tensors.append(load_file(out / "model.safetensors"))
    for other in tensors[1:]:
        for name, tensor in tensors[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-4)


def test_what_cannot_be_taught_is_one_line(
    tiny: Callable[[str], Path], small: Path, tmp_path: Path, data: str
) -> None:
    llama = str(tiny("llama"))
    for options, message in (
        ({"teachers": (str(tiny("llama-tied")),)}, "--teacher .*both must be of one tokenizer"),
        ({"teachers": (llama,), "hidden": 1.0, "method": "lora"}, "the student is 128 wide and a teacher is not"),
        ({"teachers": (llama,), "hidden": 1.0, "layer_map": "1:0"}, "the student has blocks 0 to 0"),
        ({"teachers": (llama,), "soft": 1.5}, "--soft 1.5"),
        ({"teachers": (llama,), "soft": 0.0}, "--soft 0: nothing of the teacher is learned"),
        ({"teachers": (llama,), "hidden": -1.0}, "--hidden -1.0"),
        ({"teachers": (llama,), "temperature": 0.0}, "--temperature 0.0"),
        ({"attention": 1.0}, "name one"),
    ):  # fmt: skip
        with pytest.raises(LlmcompressError, match=message):
            options = TuningOptions(**(QUICK | TAUGHT | options))
            finetune_model(small, tmp_path / "out", [data], options, Killed(99))
