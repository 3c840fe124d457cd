"""Sums of inputs against slow references: hooks, and experts recomputed one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llmcompress.blocks import Lockstep
from llmcompress.checkpoint import Checkpoint
from llmcompress.linear_inputs import InputSums, LinearInputs

CPU = torch.device("cpu")
Tiny = Callable[[str], Path]
Rows = dict[str, list[torch.Tensor]]  # inputs by parameter name; by `name[expert]` for those of an expert


def batches(vocabulary: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, shape, generator=chance) for shape in ((2, 33), (1, 7))]


def seen_by_lockstep(folder: Path) -> dict[str, InputSums]:
    lockstep = Lockstep.of(Checkpoint.open(folder), torch.float32, CPU)
    found: dict[str, InputSums] = {}
    with torch.no_grad():
        lockstep.start(batches(lockstep.model.config.vocab_size))
        for block in range(len(lockstep.blocks)):
            total = LinearInputs({}, products=True)
            with lockstep.loaded(block) as parameters:
                watches = [LinearInputs(parameters, products=True, batch=batch) for batch in range(2)]
                lockstep.through(block, watch=watches.__getitem__)
            for watch in watches:
                total.merge(watch)
            found |= total.sums
    return found


def seen_by_hooks(folder: Path) -> Rows:
    """Every input of the plain model, as rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows: Rows = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: rows.setdefault(name, []).append(inputs[0].flatten(0, -2))

    def keep_experts(name: str) -> Callable:
        def hook(experts, inputs, output) -> None:
            hidden, chosen, _ = inputs
            for token, picks in zip(hidden, chosen):
                for expert in picks.tolist():
                    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                    rows.setdefault(f"{name}.gate_up_proj[{expert}]", []).append(token[None])
                    rows.setdefault(f"{name}.down_proj[{expert}]", []).append(
                        (experts.act_fn(gate) * up)[None]
                    )

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head":
            module.register_forward_hook(keep(f"{name}.weight"))
        elif name.endswith("mlp.gate"):  # the router
            module.register_forward_hook(keep(f"{name}.weight"))
        elif name.endswith("experts"):
            module.register_forward_hook(keep_experts(name))
    with torch.no_grad():
        for tokens in batches(model.config.vocab_size):
            model(tokens)
    return rows


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "gpt2", "mixtral", "qwen3moe-fused"])
def test_sums_are_those_of_a_slow_reference(name: str, tiny: Tiny) -> None:
    wanted = seen_by_hooks(tiny(name))
    found = seen_by_lockstep(tiny(name))
    checked = set()
    for parameter, sums in found.items():
        stacked = len(sums.tokens) > 1
        for matrix, tokens in enumerate(sums.tokens.tolist()):
            key = f"{parameter}[{matrix}]" if stacked else parameter
            rows = torch.cat(wanted.get(key, [torch.empty(0, sums.squares.shape[1])])).double()
            checked |= {key} & set(wanted)
            assert tokens == len(rows)
            torch.testing.assert_close(sums.squares[matrix], rows.square().sum(0), rtol=1e-4, atol=1e-6)
            scale = float(sums.squares[matrix].max())
            wide = sums.products[matrix].double()
            torch.testing.assert_close(wide, rows.T @ rows, rtol=1e-4, atol=1e-5 * scale)
            torch.testing.assert_close(wide.diagonal(), sums.squares[matrix], rtol=1e-4, atol=1e-5 * scale)
    assert checked == set(wanted)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_both_layouts_of_experts_have_the_same_sums(name: str, tiny: Tiny) -> None:
    apart, fused = seen_by_lockstep(tiny(name)), seen_by_lockstep(tiny(f"{name}-fused"))
    assert apart.keys() == fused.keys()
    for key, sums in apart.items():
        assert torch.equal(sums.tokens, fused[key].tokens) and torch.equal(sums.squares, fused[key].squares)


def test_q_k_and_v_share_their_sums(tiny: Tiny) -> None:
    found = seen_by_lockstep(tiny("llama"))
    q, k, v = (found[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv")
    assert torch.equal(q.squares, k.squares) and torch.equal(k.products, v.products)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = {"flat": (6, 4), "other": (5, 4), "turned": (4, 6), "stacked": (3, 6, 4)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


X = torch.arange(24.0).reshape(2, 3, 4) - 7


@pytest.mark.parametrize(
    ("multiply", "name", "matrix"),
    [
        (lambda x, w: functional.linear(x, w["flat"]), "flat", 0),
        (lambda x, w: functional.linear(input=x, weight=w["flat"], bias=None), "flat", 0),
        (lambda x, w: torch.addmm(torch.zeros(6), x.flatten(0, 1), w["turned"]), "turned", 0),
        (lambda x, w: x @ w["turned"], "turned", 0),
        (lambda x, w: torch.matmul(x, w["flat"].T), "flat", 0),
        (lambda x, w: x.matmul(w["turned"]), "turned", 0),
        (lambda x, w: torch.mm(x.flatten(0, 1), w["turned"]), "turned", 0),
        (lambda x, w: x.flatten(0, 1).mm(w["turned"]), "turned", 0),
        (lambda x, w: functional.linear(x, w["stacked"][2]), "stacked", 2),
        (lambda x, w: x @ w["stacked"][1].T, "stacked", 1),
    ],
)
def test_every_way_to_multiply_by_a_weight_is_seen(
    multiply: Callable, name: str, matrix: int, weights: dict
) -> None:
    with LinearInputs(weights, products=True) as inputs:
        multiply(X, weights)
        X @ X.transpose(1, 2)  # no weight in it
    (found,) = inputs.sums.items()
    assert found[0] == name
    assert found[1].tokens.tolist() == [6 * (place == matrix) for place in range(len(found[1].tokens))]
    rows = X.reshape(-1, 4)
    assert torch.equal(found[1].squares[matrix], rows.double().square().sum(0))
    assert torch.equal(found[1].products[matrix], rows.T @ rows)


def test_what_is_not_watched_or_empty_adds_nothing(weights: dict[str, torch.Tensor]) -> None:
    with LinearInputs({"flat": weights["flat"]}) as inputs:
        functional.linear(X, weights["other"])
        functional.linear(torch.empty(0, 4), weights["flat"])
    functional.linear(X, weights["flat"])  # outside
    assert inputs.sums == {}


def test_an_input_that_was_changed_in_place_is_looked_at_anew(weights: dict[str, torch.Tensor]) -> None:
    with LinearInputs(weights) as inputs:
        x = X.clone()
        functional.linear(x, weights["flat"])
        x += 1
        functional.linear(x, weights["other"])
    assert torch.equal(inputs.sums["flat"].squares[0], X.reshape(-1, 4).double().square().sum(0))
    assert torch.equal(inputs.sums["other"].squares[0], (X + 1).reshape(-1, 4).double().square().sum(0))


def test_bfloat16_inputs_are_summed_wider(weights: dict[str, torch.Tensor]) -> None:
    x = torch.full((4096, 4), 1.0078125, dtype=torch.bfloat16)  # 1 + 2^-7: its square has 15 bits
    with LinearInputs({"flat": (weight := weights["flat"].bfloat16())}) as inputs:
        functional.linear(x, weight)
    assert inputs.sums["flat"].squares.tolist() == [[4096 * 1.0078125**2] * 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e19])  # whose square is infinite
def test_tokens_that_are_not_finite_are_left_out_and_counted(
    bad: float, weights: dict[str, torch.Tensor]
) -> None:
    x = X.clone()
    x[1, 0, 2] = bad
    with LinearInputs(weights, products=True) as inputs:
        functional.linear(X, weights["flat"])
        inputs.batch = 5
        functional.linear(x, weights["flat"])
        functional.linear(x[1:, :1], weights["other"])
    rows = torch.cat([X.reshape(-1, 4), x.reshape(-1, 4)[[0, 1, 2, 4, 5]]])
    assert inputs.sums["flat"].tokens.tolist() == [11]
    assert torch.equal(inputs.sums["flat"].squares[0], rows.double().square().sum(0))
    torch.testing.assert_close(inputs.sums["flat"].products[0], rows.T @ rows)
    assert inputs.sums["other"].tokens.tolist() == [0] and not inputs.sums["other"].squares.any()
    assert inputs.nonfinite == [("flat", 5, 1), ("other", 5, 1)]
