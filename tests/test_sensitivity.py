"""Sensitivity files and target sizes: what is measured, what is refused, and whole jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.to_gguf import measure_gguf, plan_gguf
from typer.testing import CliRunner

import llmcompress
from llmcompress.cli import app
from llmcompress.errors import PlanError, RecipeError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.grids import GRIDS
from llmcompress.hessians import HessianFolder
from llmcompress.mix import IMATRIX_REQUIRED
from llmcompress.plan import Plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe, parse_recipe
from llmcompress.run import run
from llmcompress.sensitivity import CANDIDATES, Sensitivity
from llmcompress.slab import read_slab
from llmcompress.step import slabs_of
from llmcompress.target import fused

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "IQ3_XXS")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


@pytest.fixture(scope="module")
def hessian(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums") / "hessian"
    options = CalibrationOptions(data=("prose",), tokens=4096)
    calibrate_model(sample, folder.with_suffix(".gguf"), options, Progress(), folder)
    return folder


@pytest.fixture(scope="module")
def file(sample: Path, hessian: Path) -> Path:
    path = hessian.with_suffix(".json")
    measure_gguf(sample, Recipe(hessian=str(hessian)), TYPES).save(path)
    return path


@pytest.fixture(scope="module")
def full(sample: Path, hessian: Path) -> Path:
    """Of all types."""
    path = hessian.with_name("full.json")
    measure_gguf(sample, Recipe(hessian=str(hessian))).save(path)
    return path


def planned(model: Path, out: Path, **options) -> Plan:
    return plan_gguf(model, out, parse_recipe(options))


def targeted(model: Path, file: Path, hessian: Path, **target) -> Plan:
    return planned(model, file.parent / "x.gguf", hessian=str(hessian), sensitivity=str(file), **target)


def types_of(plan: Plan) -> dict[str, str]:
    return {step.name: place.grid.name for step, place in zip(plan.steps, plan.outputs[0].placements)}


def test_errors_are_those_of_the_output(sample: Path, hessian: Path, file: Path) -> None:
    """All rows of a small tensor are sampled: its error follows from its weights and XᵀX by definition."""
    plan = planned(sample, file.parent / "x.gguf", hessian=str(hessian))
    name = "blk.2.attn_k.weight"
    (number, step) = next((i, step) for i, step in enumerate(plan.steps) if step.name == name)
    (slab,) = slabs_of(number, step, 2**30)
    weights = read_slab(plan.checkpoint, step, slab).float32.astype(np.float64)
    products = HessianFolder(hessian).products(name, 0).astype(np.float64)
    found = Sensitivity.load(file).errors[name]
    for type in ("Q3_K", "IQ3_XXS"):
        grid = GRIDS[type]
        rounded = grid.dequantize(grid.quantize(weights.astype(np.float32), plan.importance[name][0]))
        errors = rounded - weights
        wanted = np.trace(errors @ products @ errors.T) / np.trace(weights @ products @ weights.T)
        assert found[type] == pytest.approx(wanted, rel=1e-3)


def test_more_bits_have_less_error_and_gptq_less_than_nearest(
    sample: Path, hessian: Path, file: Path
) -> None:
    nearest = Sensitivity.load(file).errors
    gptq = measure_gguf(sample, Recipe(hessian=str(hessian), method="gptq"), ("Q3_K", "IQ3_XXS")).errors
    for name, errors in nearest.items():
        assert errors["Q2_K"] > errors["Q3_K"] > errors["Q4_K"] > errors["Q6_K"] > errors["Q8_0"] > 0
        assert gptq[name]["Q3_K"] < errors["Q3_K"]
        assert gptq[name]["IQ3_XXS"] <= errors["IQ3_XXS"] * 1.001


def test_types_that_need_importance_are_left_out_without(sample: Path) -> None:
    plain = measure_gguf(sample, Recipe(), ("Q3_K", *IMATRIX_REQUIRED[2:]))
    assert {frozenset(errors) for errors in plain.errors.values()} == {frozenset({"Q3_K"})}


def test_files_come_back_as_they_were_written(sample: Path, hessian: Path, file: Path) -> None:
    held = Sensitivity.load(file)
    held.save(file.with_name("again.json"))
    assert Sensitivity.load(file.with_name("again.json")) == held
    assert held == measure_gguf(sample, Recipe(hessian=str(hessian)), TYPES)


def edited(file: Path, **values) -> Path:
    path = file.with_name("edited.json")
    path.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


@pytest.mark.parametrize("field", ["checkpoint", "importance", "method", "effort"])
def test_a_file_of_something_else_is_refused(field: str, sample, hessian, file) -> None:
    with pytest.raises(RecipeError, match=f"another {field} .*measure again"):
        targeted(sample, edited(file, **{field: "0" * 64}), hessian, target_bpw=4.0)


@pytest.mark.parametrize(
    "values",
    [
        {"llmcompress": "plan"},
        {"method": None},
        {"errors": []},
        {"errors": {"a": {"Q9_K": 1}}},
        {"errors": {"a": {"Q4_K": "1"}}},
        {"errors": {"a": {"Q4_K": float("nan")}}},
        {"errors": {"a": {"Q4_K": -1}}},
        {"errors": {}},
    ],
)
def test_damaged_files_are_refused(values: dict, sample, hessian, file) -> None:
    with pytest.raises(RecipeError, match="sensitivity"):
        targeted(sample, edited(file, **values), hessian, target_bpw=4.0)


def test_sizes_are_met_from_below_and_errors_fall(sample: Path, hessian: Path, file: Path) -> None:
    held = Sensitivity.load(file).errors
    smallest, largest = 2_300_000, 5_500_000
    errors = []
    for size in range(smallest, largest, 150_000):
        plan = targeted(sample, file, hessian, target_size=size)
        assert 0.985 * size <= plan.outputs[0].size <= size
        types = types_of(plan)
        errors.append(sum(held[name][types[name]] for name in held))
    assert errors[-1] < 0.05 * errors[0]


def test_sizes_are_met_within_half_a_percent(sample: Path, hessian: Path, full: Path) -> None:
    for size in range(2_000_000, 6_000_000, 230_000):
        assert 0.995 * size <= targeted(sample, full, hessian, target_size=size).outputs[0].size <= size


def test_swaps_are_kept_where_the_measured_divergence_falls(
    sample: Path, hessian: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.converters import confirmation

    monkeypatch.setattr(confirmation, "TOKENS", 1024)
    options = {"target_size": 2_900_000, "hessian": str(hessian), "sensitivity": str(full), "data": ["prose"]}
    before = planned(sample, tmp_path / "before.gguf", **options)
    one, two = (planned(sample, tmp_path / "after.gguf", **options, confirm=5) for _ in range(2))
    assert one.fingerprint() == two.fingerprint() and one.notes == two.notes
    assert 0.995 * 2_900_000 <= one.outputs[0].size <= 2_900_000
    (note,) = (note for note in one.notes if note.startswith("confirm: 5 swaps tried"))
    kept, start, end = re.search(r"(\d) kept; measured KL ([\d.]+) before, ([\d.]+) after", note).groups()
    changed = {name for name, kind in types_of(one).items() if kind != types_of(before)[name]}
    reasons = {step.name: place.reason for step, place in zip(one.steps, one.outputs[0].placements)}
    assert changed == {name for name, reason in reasons.items() if "; confirmed: KL 0.0" in reason}
    assert int(kept) > 0 and changed and float(end) < float(start)
    evaluated = EvaluationOptions(data=("prose",), tokens=1024, windows="llama.cpp")
    for plan, told in ((before, start), (one, end)):
        run(plan)
        report = evaluate_model(str(plan.files[0].path), str(sample), evaluated, Progress())
        found = report.evaluation.figures["mean_kl"].value
        assert found == pytest.approx(float(told), abs=0.00002)  # of log-probabilities of 16 bits


def test_bits_per_weight_are_those_of_the_plan(sample: Path, hessian: Path, file: Path) -> None:
    plan = targeted(sample, file, hessian, target_bpw=4.25)
    bits = 8 * sum(place.nbytes for place in plan.outputs[0].placements) / plan.weights
    assert 4.2 < bits <= 4.25


def test_plans_are_the_same_each_time_and_say_why(sample: Path, hessian: Path, file: Path) -> None:
    one, two = (targeted(sample, file, hessian, target_bpw=4.0) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    for step, place in zip(one.steps, one.outputs[0].placements):
        if place.grid.block > 1:
            assert place.reason.startswith("target: ") and "% of all error" in place.reason
    assert one.outputs[0].file_type.name == "4bpw"


def test_fused_tensors_are_kept_alike(sample: Path, hessian: Path, file: Path, tiny: Callable) -> None:
    types = types_of(targeted(sample, file, hessian, target_bpw=3.6))
    assert len(set(types.values())) > 3
    for block in range(6):
        for group in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
            assert len({types[f"blk.{block}.{part}.weight"] for part in group}) == 1
    experts = plan_gguf(tiny("qwen3moe"), file.parent / "x.gguf", Recipe()).steps
    groups = [{step.name for step in group} for group in fused(experts)]
    assert {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"} in groups
    assert {f"blk.1.attn_{part}.weight" for part in "qkv"} in groups
    assert {"blk.0.ffn_gate_inp.weight"} in groups and {"blk.0.attn_q_norm.weight"} in groups


def test_tensors_with_a_type_of_their_own_keep_it(sample: Path, hessian: Path, file: Path) -> None:
    plan = targeted(sample, file, hessian, target_bpw=4.5, tensor_types=[("attn_v", "Q8_0")])
    types = types_of(plan)
    assert {kind for name, kind in types.items() if "attn_v" in name} == {"Q8_0"}


def test_shards_are_counted(sample: Path, hessian: Path, file: Path) -> None:
    plan = targeted(sample, file, hessian, target_size=3_000_000, split_max_size="500kB")
    assert len(plan.files) > 3
    assert 0.985 * 3_000_000 <= sum(file.size for file in plan.files) <= 3_000_000


@pytest.mark.parametrize("size", ["1MB", "100MB"])
def test_sizes_out_of_reach_are_refused_with_both_ends(size: str, sample, hessian, file) -> None:
    with pytest.raises(PlanError, match=r"takes from [\d,]+ to [\d,]+ bytes .* choose a size between"):
        targeted(sample, file, hessian, target_size=size)


def test_a_whole_job_is_nearer_than_one_type(sample: Path, hessian: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.gguf"
    llmcompress.quantize(
        sample, out, target_size=2_800_000, hessian=str(hessian), sensitivity=str(file), verify="full"
    )
    assert 0.985 * 2_800_000 <= out.stat().st_size <= 2_800_000
    with GGUFFile.open(out) as made:
        stored = json.loads(made.metadata["llmcompress.recipe"].value)
        assert stored["target_size"] == 2_800_000 and stored["sensitivity"] == file.name
        types = {tensor.type.name for tensor in made.tensors.values()}
        assert len(types & set(CANDIDATES)) > 2
    parse_recipe(stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": "4G", "target_bpw": 4}, "each gives the size"),
        ({"sensitivity": "x.json"}, "is for a target"),
        ({"confirm": 2}, "is for a target"),
        ({"confirm": -1, "target_bpw": 4}, "-1 is less than 0"),
        ({"target_bpw": 4, "types": "Q4_0"}, "chooses the type"),
        ({"target_bpw": 4, "pure": True}, "chooses the type"),
        ({"target_bpw": 4, "calibrate": True}, "calibrate first"),
        ({"target_bpw": "four"}, "no number of bits"),
        ({"target_bpw": 0}, "no number of bits"),
        ({"target_size": "-1"}, "is not a size"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(options)


def test_the_commands(sample: Path, hessian: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "sens.json", tmp_path / "best.gguf"
    given = [str(sample), "--hessian", str(hessian)]
    call = CliRunner().invoke
    done = call(app, ["sensitivity", *given, "-o", str(file), "--types", "Q3_K,Q4_K,Q5_K"])
    assert done.exit_code == 0 and "blk.5.ffn_down.weight" in done.output
    more = ["--target-bpw", "4.25", "--sensitivity", str(file)]
    done = call(app, ["quantize", *given, "-o", str(out), *more])
    assert done.exit_code == 0 and "4.25bpw" in done.output and out.exists()
    done = call(app, ["plan", *given, *more])
    assert done.exit_code == 0 and "of all error" in done.output
    done = call(app, ["sensitivity", *given, "-o", str(file), "--types", "Q9_K"])
    assert done.exit_code == 2 and "--types: 'Q9_K' is none of" in done.output
    done = call(app, ["quantize", str(sample), "-o", str(out), *more])
    assert done.exit_code == 2 and "another importance" in done.output
    done = call(app, ["quantize", *given, "-o", str(out), "--target-bpw", "4", "--sensitivity", "none.json"])
    assert done.exit_code == 2 and "none.json: is no file" in done.output
    done = call(app, ["convert", str(sample), "--target-bpw", "9"])
    assert done.exit_code == 2 and "chooses the type" in done.output
