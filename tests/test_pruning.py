"""`prune` as a whole: masks against a plain dense reference, experts, files that load and run, kills, bad inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from llmcompress.converters.calibration import CalibrationOptions, rows_of
from llmcompress.converters.pruning import plan_pruning, run_pruning
from safetensors.torch import load_file, save_file

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import LlmcompressError
from llmcompress.progress import Progress
from llmcompress.pruning_options import PruningOptions, read_shares

Tiny = Callable[[str], Path]
SLOW = pytest.mark.slow
TOKENS = 3000
GIVEN = {"data": "prose", "tokens": TOKENS, "dtype": "f32"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def manifest(folder: Path) -> dict:
    return json.loads((folder / "prune.json").read_text())


def prune(model: Path, out: Path, **options) -> Path:
    given = {} if options.get("method") == "magnitude" else GIVEN
    llmcompress.prune(model, out, **given, **options)
    return out


def plain_wanda(
    model: Path, sparsity: float, pruned: dict[str, torch.Tensor] | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Wanda with the whole model in memory: by linear, its scores, which of them go, and XᵀX.

    A block runs on what those before it became: by the formula, or as they are in `pruned`."""
    with Checkpoint.open(model) as checkpoint:
        rows = rows_of(checkpoint, CalibrationOptions(data=("prose",), tokens=TOKENS)).rows
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {}
    for number, block in enumerate(whole.model.layers):
        linears = {
            name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
        }
        products = dict.fromkeys(linears, 0)

        def adding(name: str, products=products) -> Callable:
            def add(module, inputs) -> None:
                rows = inputs[0].double().flatten(0, -2)
                products[name] = products[name] + rows.T @ rows

            return add

        hooks = [module.register_forward_pre_hook(adding(name)) for name, module in linears.items()]
        with torch.no_grad():
            for row in rows:
                whole(torch.from_numpy(row.astype(np.int64))[None])
            for hook in hooks:
                hook.remove()
            for name, linear in linears.items():
                scores = linear.weight.abs().double() * products[name].diagonal().sqrt()
                order = scores.sort(dim=1, stable=True)[1][:, : int(linear.in_features * sparsity)]
                gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
                full = f"model.layers.{number}.{name}.weight"
                linear.weight.copy_(pruned[full] if pruned else linear.weight.masked_fill(gone, 0))
                found[full] = scores, gone, products[name]
    return found


def error(apart: torch.Tensor, products: torch.Tensor) -> float:
    """Squared, of a linear's outputs."""
    return float(((apart.double() @ products) * apart).sum())


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("name", ["llama-tied", pytest.param("qwen3", marks=SLOW)])
def test_wandas_masks_are_those_of_a_dense_plain_reference(
    name: str, effort: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(name)
    pruned, before = weights_of(prune(model, tmp_path / "out", effort=effort)), weights_of(model)
    reference = plain_wanda(model, 0.5, None if effort == "fast" else pruned)
    assert len(reference) == 14
    for name, (scores, gone, products) in reference.items():
        found, dense = pruned.pop(name), before.pop(name)
        apart = (found == 0) != gone
        bound = torch.where(gone, scores, 0).amax(1, keepdim=True)
        assert not (apart & ((scores / bound - 1).abs() > 1e-5)).any()  # other sums round otherwise
        assert apart.sum() <= 4
        by_formula = dense.masked_fill(found == 0, 0)
        if effort == "fast":
            assert torch.equal(found, by_formula)
        else:
            assert error(found - dense, products) < 0.9 * error(by_formula - dense, products)
    for name, rest in pruned.items():  # embeddings, norms
        assert torch.equal(rest, before[name])


@pytest.mark.parametrize("method", ["magnitude", "wanda", pytest.param("sparsegpt", marks=SLOW)])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_groups_are_exact_in_the_file(method: str, pattern: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = prune(tiny("llama"), tmp_path / "out", method=method, pattern=pattern)
    kept, group = map(int, pattern.split(":"))
    weights, said = weights_of(folder), manifest(folder)
    assert len(said["tensors"]) == 14 and said["sparsity_reached"] == 1 - kept / group
    for name in said["tensors"]:
        assert ((weights[name].reshape(-1, group) != 0).sum(1) == kept).all()


@pytest.mark.parametrize(
    "name, inputs_first", [("qwen3moe", False), pytest.param("qwen3moe-fused", False, marks=SLOW), pytest.param("gpt2", True, marks=SLOW)]
)  # fmt: skip
@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=SLOW)])
def test_experts_and_transposed_weights(
    name: str, inputs_first: bool, method: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = prune(tiny(name), tmp_path / "out", method=method, sparsity=0.5)
    weights, said = weights_of(folder), manifest(folder)
    assert not {key for key in weights if weights[key].ndim > 1} - {*said["tensors"], *said["left"]}
    assert all(
        "embed" in key or "wte" in key or "wpe" in key or "lm_head" in key or key.endswith("mlp.gate.weight")
        for key in said["left"]
    )
    for key, told in said["tensors"].items():
        along = weights[key].transpose(-1, -2) if inputs_first else weights[key]
        zeros = (along == 0).sum(-1)
        if method == "wanda" or told["fallbacks"]:
            assert (zeros == along.shape[-1] // 2).all()
        assert told["zeros"] == int(zeros.sum()) and told["density"] == pytest.approx(0.5, abs=0.001)
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_stacked_experts_go_as_single_ones_do(tiny: Tiny, tmp_path: Path) -> None:
    """And those that too few tokens reached go by magnitude, which is said."""
    given = GIVEN | {"tokens": 120}
    llmcompress.prune(tiny("qwen3moe"), tmp_path / "single", **given)
    llmcompress.prune(tiny("qwen3moe-fused"), tmp_path / "fused", **given)
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("single", "fused"))  # fmt: skip
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    cold = [told for told in manifest(tmp_path / "fused")["tensors"].values() if told["fallbacks"]]
    assert cold and any("too few tokens" in note for note in manifest(tmp_path / "fused")["notes"])


class Stop(Progress):
    """Ctrl-C when so many bytes are written."""

    def __init__(self, left: int) -> None:
        self.left, self.writing = left, False

    def start(self, phase: str, total: int, unit: str = "bytes") -> None:
        self.writing = phase == "writing"

    def advance(self, count: int) -> None:
        self.left -= count * self.writing
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method", [pytest.param("wanda", marks=SLOW), pytest.param("sparsegpt", marks=SLOW), "magnitude"]
)
@pytest.mark.parametrize("share", [0.45, 0.9])
def test_a_killed_run_goes_on_with_the_same_bytes(
    method: str, share: float, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny("llama")
    options = {"method": method, "split_max_size": 2**20} | ({"allocate": "owl"} if method == "wanda" else {})
    whole = prune(model, tmp_path / "whole", **options)
    total = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    given = PruningOptions(**options, **({} if method == "magnitude" else GIVEN | {"data": ("prose",)}))
    with pytest.raises(KeyboardInterrupt):
        run_pruning(plan_pruning(model, tmp_path / "out", given), Stop(int(share * total)))
    assert not (tmp_path / "out").exists()
    assert run_pruning(plan_pruning(model, tmp_path / "out", given)).resumed > 0
    files = sorted(file.name for file in whole.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir()) and len(files) > 5
    for name in files:
        assert (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.slow
def test_it_loads_in_transformers_and_runs_in_llama_cpp(tiny: Tiny, tmp_path: Path) -> None:
    folder = prune(tiny("llama-tied"), tmp_path / "out", method="sparsegpt", sparsity=0.5)
    ids = [1, 5, 300, 17, 250, 99, 4, 77]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = loaded(torch.tensor([ids])).logits[0].numpy()
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("one two")
    path = llmcompress.quantize(folder, tmp_path / "out.gguf", type="F32").outputs[0].paths[0]
    with llama_cpp.Model(path) as model:
        assert np.abs(model.logits(ids) - wanted).max() < 1e-3 * np.ptp(wanted)


def test_each_layer_gets_what_the_file_says(tiny: Tiny, tmp_path: Path) -> None:
    shares = tmp_path / "shares.toml"
    shares.write_text('"layers\\\\.0\\\\." = 0.25\ndown_proj = 0.75\n')
    folder = prune(
        tiny("llama"), tmp_path / "out", shares=read_shares(shares), keep="[qk]_proj", sparsity=0.5
    )
    told = manifest(folder)["tensors"]
    assert len(told) == 10
    for name, found in told.items():
        share = 0.25 if "layers.0." in name else 0.75 if "down_proj" in name else 0.5
        assert 1 - found["density"] == found["asked"] == share


def test_of_the_whole_model_the_smallest_go(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    folder = prune(model, tmp_path / "out", method="magnitude", whole_model=True, sparsity=0.3)
    before, told = weights_of(model), manifest(folder)["tensors"]
    every = torch.cat([before[name].abs().flatten() for name in told])
    bound = every.sort()[0][int(0.3 * len(every)) - 1]
    for name, weights in weights_of(folder).items():
        gone = before[name].abs() <= bound if name in told else torch.zeros(1, dtype=torch.bool)
        assert torch.equal(weights, before[name].masked_fill(gone, 0)), name


def test_owl_keeps_the_whole_and_differs_by_block(tiny: Tiny, tmp_path: Path) -> None:
    told = manifest(prune(tiny("llama"), tmp_path / "out", allocate="owl", sparsity=0.5))
    shares = {name.split(".")[2]: found["asked"] for name, found in told["tensors"].items()}
    assert len(set(shares.values())) == 2 and told["sparsity_reached"] == pytest.approx(0.5, abs=0.004)


@SLOW
def test_the_manifest_and_the_words_say_what_was_done(root: Path, tmp_path: Path) -> None:
    model, out = root / "examples" / "sample-llama-6m", tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "llmcompress",
        "prune",
        model,
        "-o",
        out,
        "--pattern",
        "4:8",
        "--tokens",
        "2k",
        "--data",
        "prose",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "50.00%" in done.stdout and "no runtime" in done.stdout and "model.embed_tokens.weight" in done.stdout
    )
    said = manifest(out)
    assert said["method"] == "wanda" and said["pattern"] == "4:8" and said["tokens_seen"]["count"] >= 2048
    assert len(said["statistics"]) == 64 and said["left"] == ["model.embed_tokens.weight"]
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr


BAD = [
    ({"method": "wand"}, "did you mean 'wanda'"),
    ({"sparsity": 1.0}, "below 1"),
    ({"sparsity": float("nan")}, "no share"),
    ({"sparsity": -0.1}, "no share"),
    ({"sparsity": True}, "no share"),
    ({"pattern": "2:4", "sparsity": 0.6}, "a sparsity of 0.5"),
    ({"pattern": "1:4", "sparsity": 0.25}, "of every 4 weights 1 stay"),
    ({"pattern": "2:4", "allocate": "owl"}, "leave one out"),
    ({"pattern": "2:4", "shares": {"down": 0.5}}, "leave one out"),
    ({"pattern": "3:7"}, "no multiple of 7"),
    ({"keep": "no_such"}, "is found in none"),
    ({"shares": {"no_such": 0.5}}, "is found in none"),
    ({"keep": "("}, "no regular expression"),
    ({"keep": "."}, "nothing is left to prune"),
    ({"whole_model": True}, "is for --method magnitude"),
    ({"method": "magnitude", "by_score": True}, "is for --method wanda"),
    ({"method": "magnitude", "allocate": "owl"}, "looks at inputs"),
    ({"spars": 0.5}, "did you mean 'sparsity'"),
    ({"max_ram": 2**20, "method": "magnitude"}, "is too little"),
    ({"threads": 0}, "at least 1"),
]


@pytest.mark.parametrize("options, words", BAD, ids=[str(list(options.items())[0]) for options, _ in BAD])
def test_what_makes_no_sense_is_refused(options: dict, words: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match=words.replace("(", r"\(")):
        prune(tiny("llama"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "1 = 2 = 3", '{"a": 2}', '{"a": "0.5"}', '{"a": NaN}', "[" * 10**5]
)
@pytest.mark.parametrize("ending", [".json", ".toml"])
def test_files_of_shares_are_not_trusted(text: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"shares{ending}"
    file.write_text(text)
    with pytest.raises(LlmcompressError, match="shares"):
        read_shares(file)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_nan_is_named(method: str, tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny("llama").iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmcompressError, match=r"layers\.1\.mlp\.up_proj.*row 3, column 4"):
        prune(tmp_path / "model", tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_an_option_of_another_method_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llmcompress",
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--method",
        "magnitude",
    ]
    done = subprocess.run([*command, "--tokens", "4k"], capture_output=True, text=True)
    assert done.returncode == 2 and "--tokens: means nothing to --method magnitude" in done.stderr
