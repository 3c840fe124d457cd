"""Fewer experts: against the whole model whose router never chooses those that went, figures by hand, llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Model
from llmcompress.converters.thinning import drop_experts
from test_architectures import assert_same_logits, ids_of
from test_dropping import load

import llmcompress
from llmcompress.errors import PlanError
from llmcompress.structure_options import StructureOptions

Tiny = Callable[[str], Path]


def given(root: Path, **values) -> StructureOptions:
    text = str(root / "tests" / "data" / "richard-iii.txt")
    return StructureOptions("experts", data=(text,), tokens=1024, chunk=128, dtype="f32", **values)


@torch.no_grad()
def never_chosen(folder: Path, ids: list[int], dropped: dict[int, list[int]], monkeypatch) -> np.ndarray:
    """Logits of a model whose routers give these experts, by layer, nothing."""
    model = load(folder)
    experts = max(model.config.to_dict().get(name) or 0 for name in ("num_experts", "num_local_experts"))
    routers = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and len(parameter) == experts and "experts" not in name:
            routers[parameter.data_ptr()] = dropped[int(name.split(".")[2])]
    assert len(routers) == len(dropped)
    linear = torch.nn.functional.linear

    def without(inputs, weight, bias=None):
        scores = linear(inputs, weight, bias)
        if weight.data_ptr() in routers:
            scores[..., routers[weight.data_ptr()]] = -1e9
        return scores

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", without)
        return model(torch.tensor([ids])).logits[0].numpy()


def check(folder: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = drop_experts(folder, tmp_path / "thin", given(root, drop=1))
    ids = ids_of(folder)
    wanted = never_chosen(folder, ids, report.went["experts_dropped"], monkeypatch)
    with torch.no_grad():
        found = load(tmp_path / "thin")(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)
    (path,) = llmcompress.quantize(tmp_path / "thin", tmp_path / "thin.gguf", type="F32").paths
    with Model(path) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)


SLOW = ("mixtral-fused", "qwen3moe", "qwen2moe", "olmoe", "gpt-oss")


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3moe-fused", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_fewer_experts_are_the_whole_model_that_never_chooses_the_others(
    name: str, tiny: Tiny, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tiny(name), root, tmp_path, monkeypatch)


@pytest.mark.slow
@torch.no_grad()
def test_figures_are_those_of_plain_hooks(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    """Of what goes into the experts of the first layer, and of each expert's own output."""
    from llmcompress.converters.calibration import rows_of
    from llmcompress.converters.smaller_folder import calibration_options

    from llmcompress.checkpoint import Checkpoint

    figures = {
        by: drop_experts(tiny("mixtral"), tmp_path / by, given(root, drop=1, by=by)).went["figures"][0]
        for by in ("use", "output", "reap")
    }
    model = load(tiny("mixtral"))
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda _, inputs, output: seen.append(inputs))
    for row in rows_of(Checkpoint.open(tiny("mixtral")), calibration_options(given(root, drop=1), 0)).rows:
        model(torch.from_numpy(row.astype(np.int64))[None])
    use, output = np.zeros(4), np.zeros(4)
    for hidden, chosen, weights in seen:
        for token, which, share in zip(hidden, chosen, weights):
            for expert, weight in zip(which.tolist(), share):
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                use[expert] += 1
                output[expert] += (
                    (weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)))
                    .norm()
                    .item()
                )
    assert figures["use"] == use.tolist()
    assert figures["output"] == pytest.approx(output.tolist(), rel=1e-4)
    assert figures["reap"] == pytest.approx((output / use).tolist(), rel=1e-4)


def test_experts_of_a_token_are_no_more_than_there_are(tiny: Tiny, root: Path, tmp_path: Path) -> None:
    report = drop_experts(tiny("mixtral"), tmp_path / "thin", given(root, ratio=0.75, by="use"))
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)
    assert "a token used 2 experts, it uses all 1 that are left" in report.notes


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"drop": 1}, "the model has no experts"),
        ("mixtral", {"drop": 4}, "4 experts of 4 would go"),
        ("mixtral", {"ratio": 0.05}, "0 experts of 4 would go"),
    ],
)
def test_experts_that_cannot_go(
    name: str, values: dict, message: str, tiny: Tiny, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        drop_experts(tiny(name), tmp_path / "thin", given(root, **values))
    assert not list(tmp_path.iterdir())
