"""`quantize --method gptq` as a whole: from saved sums or calibrating meanwhile, dense models and experts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from llmcompress.converters.to_gguf import plan_gguf

import llmcompress
from llmcompress.errors import RecipeError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.hessians import HessianFolder
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.run import run

Tiny = Callable[[str], Path]
TOKENS = 6000
GPTQ = {"method": "gptq", "data": ["prose"], "tokens": TOKENS}
MODELS = ["llama-tied", "phi3", "gpt2", "qwen3moe", "qwen3moe-fused"]


def tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile.open(path) as file:
        return {name: file.read(name).copy() for name in file.tensors}


def hessian_of(model: Path, folder: Path, tokens: int = TOKENS) -> Path:
    options = CalibrationOptions(data=("prose",), tokens=tokens)
    calibrate_model(model, folder.with_suffix(".gguf"), options, Progress(), folder)
    return folder


def different(one: Path, two: Path) -> list[str]:
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    return [name for name in one if not np.array_equal(one[name], two[name])]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_the_same_from_saved_sums_and_while_calibrating(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(name)
    folder = hessian_of(model, tmp_path / "sums")
    saved, live, plain = (tmp_path / f"{name}.gguf" for name in ("saved", "live", "plain"))
    result = llmcompress.quantize(model, saved, type="Q3_K_M", method="gptq", hessian=str(folder))
    fused = llmcompress.quantize(model, live, type="Q3_K_M", calibrate=True, **GPTQ)
    assert different(saved, live) == []
    llmcompress.quantize(model, plain, type="Q3_K_M", hessian=str(folder))
    changed = different(saved, plain)
    reported = {tensor.name: tensor for tensor in result.outputs[0].tensors}
    assert changed and all(reported[name].method == "gptq" for name in changed)
    by_gptq = {name for name, tensor in reported.items() if tensor.method == "gptq"}
    assert set(changed) == {name for name in by_gptq if reached(reported[name].rungs)}
    assert by_gptq >= {"blk.0.attn_output.weight", "blk.1.attn_output.weight"}
    assert {name: tensor.rungs for name, tensor in reported.items()} == {
        tensor.name: tensor.rungs for tensor in fused.outputs[0].tensors
    }


def reached(rungs: dict[str, int]) -> bool:
    return any(not rung.startswith("rounded to nearest") for rung in rungs)


@pytest.mark.slow
def test_slabs_and_threads_do_not_change_a_byte(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    folder = hessian_of(model, tmp_path / "sums")
    common = {"type": "Q4_K_M", "method": "gptq", "hessian": str(folder)}
    llmcompress.quantize(model, tmp_path / "one.gguf", threads=1, **common)
    llmcompress.quantize(model, tmp_path / "two.gguf", threads=4, max_ram="245MiB", **common)
    assert different(tmp_path / "one.gguf", tmp_path / "two.gguf") == []


@pytest.mark.slow
def test_experts_of_a_layer_that_saw_nothing_are_rounded_to_nearest_and_the_report_says_so(
    tiny: Tiny, tmp_path: Path
) -> None:
    """One that saw a few tokens leans on the others."""
    model, name = tiny("qwen3moe"), "blk.0.ffn_down_exps.weight"
    folder = hessian_of(model, tmp_path / "sums", tokens=512)
    index = json.loads((folder / "index.json").read_text())
    index["weights"][name][3]["tokens"] = 5
    for place in index["weights"]["blk.1.ffn_down_exps.weight"]:
        place["tokens"] = 0
    (folder / "index.json").write_text(json.dumps(index))
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    result = llmcompress.quantize(model, out, type="Q4_K_S", method="gptq", hessian=str(folder))
    llmcompress.quantize(model, plain, type="Q4_K_S", hessian=str(folder))
    reports = {tensor.name: tensor for tensor in result.outputs[0].tensors}
    assert sum(reports[name].rungs.values()) == 8 and reached(reports[name].rungs)
    assert reports["blk.1.ffn_down_exps.weight"].rungs == {"rounded to nearest: no tokens": 8}
    assert any("no tokens" in note for note in result.notes)
    assert "blk.1.ffn_down_exps.weight" not in different(out, plain)
    gptq, nearest = (tensors(path)[name].reshape(8, -1) for path in (out, plain))
    assert not any(np.array_equal(gptq[expert], nearest[expert]) for expert in range(8))


def test_the_report_names_methods_and_rungs(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    folder = hessian_of(model, tmp_path / "sums")
    index = HessianFolder(folder)
    bad = index.entries["blk.0.ffn_down.weight"][0]["file"]
    products = (100 - 99 * np.eye(512, dtype=np.float32))[None]  # ones on the diagonal, and not positive
    safetensors.numpy.save_file({"products": products}, folder / bad)
    result = llmcompress.quantize(
        model, tmp_path / "out.gguf", type="Q4_K_S", tensor_types=[("ffn_up", "Q8_0"), ("ffn_gate", "MXFP4")],
        method="gptq", hessian=str(folder),
    )  # fmt: skip
    found = {tensor.name: tensor for tensor in result.outputs[0].tensors}
    assert found["blk.0.attn_q.weight"].method == "gptq"
    assert found["blk.0.attn_q.weight"].rungs == {"damping 0.01": 1}
    assert found["blk.0.ffn_down.weight"].rungs == {"rounded to nearest: H has no Cholesky factor": 1}
    for name in (
        "blk.0.ffn_up.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.attn_norm.weight",
    ):
        assert found[name].method == "nearest" and found[name].rungs == {}
    assert any("blk.0.ffn_down.weight" in note and "no Cholesky factor" in note for note in result.notes)
    assert any("Q8_0" in note and "MXFP4" in note and "nearest" in note for note in result.notes)
    written = result.as_dict()["outputs"][0]["tensors"]
    assert {"method": "gptq", "rungs": {"damping 0.01": 1}}.items() <= next(
        tensor for tensor in written if tensor["name"] == "blk.0.attn_q.weight"
    ).items()
    json.dumps(result.as_dict())


def test_types_without_a_layout_have_the_bytes_of_nearest(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    folder = hessian_of(model, tmp_path / "sums", 1024)
    for type in ("Q8_0", "TQ2_0"):
        one, two = tmp_path / f"{type}-gptq.gguf", tmp_path / f"{type}.gguf"
        llmcompress.quantize(model, one, type=type, method="gptq", hessian=str(folder), pure=True)
        llmcompress.quantize(model, two, type=type, hessian=str(folder), pure=True)
        assert different(one, two) == []


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    recipe = Recipe(types=("Q4_K_M",), method="gptq", calibrate=True, data=("prose",), tokens=2048)

    class Kill(Progress):
        """Ctrl-C somewhere in the middle."""

        done = 0

        def advance(self, count: int) -> None:
            self.done += count
            if self.done > 3_000_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan_gguf(tiny("llama"), tmp_path / "killed.gguf", recipe), Kill())
    result = run(plan_gguf(tiny("llama"), tmp_path / "killed.gguf", recipe))
    assert result.slabs_kept > 0
    run(plan_gguf(tiny("llama"), tmp_path / "whole.gguf", recipe))
    assert different(tmp_path / "killed.gguf", tmp_path / "whole.gguf") == []


def test_contradictions_are_refused() -> None:
    with pytest.raises(RecipeError, match="gptq needs to see inputs: add --calibrate, or --hessian"):
        Recipe(method="gptq")
    with pytest.raises(RecipeError, match="gptq needs to see inputs"):
        Recipe(method="gptq", imatrix="some.gguf")
    with pytest.raises(RecipeError, match="'gtpq' is none of nearest, gptq"):
        Recipe(method="gtpq", calibrate=True)
    for pair in (
        {"imatrix": "a", "hessian": "b"},
        {"hessian": "b", "calibrate": True},
        {"imatrix": "a", "calibrate": True},
    ):
        with pytest.raises(RecipeError, match="leave one out"):
            Recipe(method="gptq", **pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "gptq needs to see inputs: add --calibrate, or --hessian"),
        (["--method", "gtpq", "--calibrate"], "is none of nearest, gptq; did you mean 'gptq'"),
        (["--method", "gptq", "--hessian", "x", "--calibrate"], "leave one out"),
        (["--method", "gptq", "--hessian", "nowhere"], "nowhere: has no index.json"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    options: list[str], message: str, root: Path, tmp_path: Path
) -> None:
    model = root / "examples" / "sample-llama-6m"
    command = [sys.executable, "-m", "llmcompress", "quantize", model, "-o", tmp_path / "out.gguf", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_a_q3_k_file_is_far_closer_to_its_model(root: Path, tmp_path: Path) -> None:
    model = root / "examples" / "sample-llama-6m"
    calibrated = {"data": ["prose"], "tokens": 2**15, "calibrate": True, "type": "Q3_K_M"}
    options = EvaluationOptions(data=("dialogue",), tokens=4096)

    def kl(method: str) -> float:
        out = tmp_path / f"{method}.gguf"
        llmcompress.quantize(model, out, method=method, **calibrated)
        return evaluate_model(str(out), str(model), options, Progress()).as_dict()["figures"]["mean_kl"][
            "value"
        ]

    assert kl("gptq") < 0.7 * kl("nearest")
