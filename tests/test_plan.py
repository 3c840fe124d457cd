"""Plans: what is refused before a weight is read, and what the overrides do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.numpy import load_file, save_file
from tiny_models import BYTE_BPE, SENTENCEPIECE, build

from llmcompress.errors import CheckpointError, GGUFError, LlmcompressError, PlanError, RecipeError
from llmcompress.plan import Plan
from llmcompress.recipe import Recipe, parse_recipe


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    """stories260K, to be spoiled."""
    return Path(shutil.copytree(root / "tests" / "data" / "stories260K", tmp_path / "model"))


@pytest.fixture(scope="module")
def mixtral(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }
    return build("mixtral", tmp_path_factory.mktemp("mixtral") / "tiny", tokenizers)


def planned(model: Path, **options) -> Plan:
    return plan_gguf(model, model.parent / "{type}.gguf", parse_recipe(options))


def types_of(plan: Plan, output: int = 0) -> dict[str, str]:
    return {step.name: place.grid.name for step, place in zip(plan.steps, plan.outputs[output].placements)}


def edit_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    for key, value in values.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    (model / "config.json").write_text(json.dumps(config))


def edit_tensors(model: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


CONFIGS = {
    "unknown class": (
        {"architectures": ["LlamaForCausalLMs"], "model_type": "lama"},
        "LlamaForCausalLMs; did you mean 'LlamaForCausalLM'",
    ),
    "unknown class of a known model_type": (
        {"architectures": ["LlamaForCausalLMs"]},
        "its model_type is llama; --architecture LlamaForCausalLM converts it as that",
    ),
    "no class": ({"architectures": ...}, "architectures is missing"),
    "more layers than tensors": ({"num_hidden_layers": 6}, "blk.5."),
    "fewer layers than tensors": ({"num_hidden_layers": 4}, "4 layers, the checkpoint has more"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "unknown rope": (
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "rope type 'spiral' is unknown",
    ),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "heads as text": ({"num_attention_heads": "8"}, "num_attention_heads is '8'"),
    "absurd layers": ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
    "not a number": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
}


@pytest.mark.parametrize("values, message", CONFIGS.values(), ids=CONFIGS)
def test_configs_that_are_refused(values: dict, message: str, model: Path) -> None:
    edit_config(model, **values)
    with pytest.raises(PlanError) as caught:
        planned(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


TENSORS = {
    "no rule": (rename("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_prj.weight"),
                "model.layers.1.mlp.up_prj.weight: LlamaForCausalLM has no rule"),
    "missing": (lambda tensors: tensors.pop("model.layers.2.self_attn.o_proj.weight"), "blk.2.attn_output.weight"),
    "another shape": (lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:8]}), "model.norm.weight"),
    "another vocabulary": (
        lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:500]}),
        "token_embd.weight: 500 rows, but the tokenizer has 512 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_checkpoints_that_are_refused(change: Callable[[dict], None], message: str, model: Path) -> None:
    edit_tensors(model, change)
    with pytest.raises(PlanError) as caught:
        planned(model)
    assert message in str(caught.value)


def test_a_tensor_without_a_rule_is_given_the_nearest_known_name(model: Path) -> None:
    edit_tensors(model, rename("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_prj.weight"))
    with pytest.raises(PlanError, match="did you mean 'layers.0.mlp.up_proj"):
        planned(model)


def test_a_tied_head_is_kept_only_if_it_was_trained_apart(model: Path) -> None:
    edit_tensors(
        model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    )
    plan = planned(model)
    assert "output.weight" not in types_of(plan) and any(
        "it is the embedding again" in note for note in plan.notes
    )
    edit_tensors(model, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    plan = planned(model)
    assert "output.weight" in types_of(plan) and any("it differs from it" in note for note in plan.notes)


def test_missing_and_unlike_experts_are_refused(mixtral: Path, tmp_path: Path) -> None:
    third = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    spoiled = Path(shutil.copytree(mixtral, tmp_path / "missing"))
    edit_tensors(spoiled, lambda tensors: tensors.pop(third))
    with pytest.raises(PlanError, match="blk.1.ffn_gate_exps.weight: expert 2 is missing"):
        planned(spoiled)
    spoiled = Path(shutil.copytree(mixtral, tmp_path / "unlike"))
    edit_tensors(spoiled, lambda tensors: tensors.update({third: tensors[third][:256]}))
    with pytest.raises(PlanError, match="experts.2.w1.weight: is F32 .* alike"):
        planned(spoiled)


RECIPES = {
    "a pattern that matches nothing": (
        {"tensor_types": [["attn_w", "Q8_0"]]},
        RecipeError,
        "'attn_w' matches no tensor",
    ),
    "a pattern that is none": ({"tensor_types": [["attn_(", "Q8_0"]]}, RecipeError, "no regular expression"),
    "an unknown tensor type": ({"tensor_types": [["attn_v", "Q9_K"]]}, RecipeError, "'Q9_K'"),
    "a contradiction": (
        {"output_tensor_type": "Q8_0", "leave_output_tensor": True},
        RecipeError,
        "contradict",
    ),
    "no importance": ({"types": "Q2_K_S"}, PlanError, "needs an importance matrix"),
    "a missing importance file": ({"imatrix": "nowhere.gguf"}, LlmcompressError, "nowhere.gguf"),
    "too little memory": (
        {"max_ram": "1MiB"},
        PlanError,
        "--max-ram 1.0 MiB is too little: this model needs at least",
    ),
    "an unknown pre-tokenizer": ({"pre": "lama-bpe"}, LlmcompressError, "did you mean 'llama-bpe'"),
}


@pytest.mark.parametrize("options, kind, message", RECIPES.values(), ids=RECIPES)
def test_recipes_that_are_refused(
    options: dict, kind: type, message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "{type}.gguf", parse_recipe(options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_importance_matrix_of_another_model_is_refused(shared: Path, model: Path) -> None:
    with pytest.raises((PlanError, GGUFError)) as caught:
        planned(model, imatrix=str(shared / "imatrix" / "tinyllama-1.1b.dat"))
    assert "2048" in str(caught.value) and "64" in str(caught.value)


def test_a_real_importance_matrix_is_used(shared: Path, tmp_path: Path) -> None:
    babyllama = shared / "models" / "babyllama_tok361"
    recipe = Recipe(types=("Q4_0",), imatrix=str(shared / "imatrix" / "babyllama_tok361.imatrix.gguf"))
    plan = plan_gguf(babyllama, tmp_path / "x.gguf", recipe)
    assert len(plan.importance) == 5 * 7  # layers, and their linears
    assert (
        plan.fingerprint() != plan_gguf(babyllama, tmp_path / "x.gguf", Recipe(types=("Q4_0",))).fingerprint()
    )


def test_overrides_and_the_mix(root: Path, tmp_path: Path) -> None:
    sample = root / "examples" / "sample-llama-6m"

    def chosen(**options) -> dict[str, str]:
        return types_of(plan_gguf(sample, tmp_path / "x.gguf", parse_recipe(options)))

    mixed = chosen(types="Q4_K_M")
    assert mixed["token_embd.weight"] == "Q6_K" and mixed["blk.5.attn_v.weight"] == "Q6_K"
    assert mixed["blk.0.attn_q.weight"] == "Q4_K" and mixed["blk.0.attn_norm.weight"] == "F32"
    pure = chosen(types="Q4_K_M", pure=True)
    assert set(pure.values()) == {"Q4_K", "F32"}
    assert chosen(token_embedding_type="q8_0")["token_embd.weight"] == "Q8_0"
    assert chosen(output_tensor_type="Q5_K")["token_embd.weight"] == "Q5_K"  # tied: it serves as the output
    ruled = chosen(tensor_types=[["blk.0.ffn", "Q8_0"], ["ffn_up", "Q3_K"]])
    assert ruled["blk.0.ffn_up.weight"] == "Q8_0" and ruled["blk.1.ffn_up.weight"] == "Q3_K"


def test_copy_leaves_every_tensor_as_it_is(model: Path) -> None:
    def halve(tensors: dict) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(
            np.float16
        )

    edit_tensors(model, halve)
    output = planned(model, types="COPY").outputs[0]
    types = types_of(planned(model, types="copy"))
    assert output.file_type.name == "COPY" and "COPY" in str(output.files[0].path)
    assert types["blk.1.ffn_up.weight"] == "F16"
    assert {kind for name, kind in types.items() if name != "blk.1.ffn_up.weight"} == {"F32"}


def test_auto_is_the_float_type_most_weights_have(root: Path, model: Path, tmp_path: Path) -> None:
    assert planned(model, types="auto").outputs[0].file_type.name == "F32"
    sample = plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "x.gguf", Recipe(types=("auto",)))
    assert sample.outputs[0].file_type.name == "BF16"


def test_rows_that_fit_no_block_fall_back_and_say_so(model: Path) -> None:
    plan = planned(model, types="Q4_K_M")
    found = {s.name: (p.grid.name, p.reason) for s, p in zip(plan.steps, plan.outputs[0].placements)}
    kind, reason = found["blk.1.attn_q.weight"]
    assert kind == "Q5_0" and "64" in reason and "256" in reason
    kind, reason = found["blk.1.ffn_down.weight"]
    assert kind == "F16" and "172" in reason


@pytest.mark.parametrize(
    "out, message", [("x.gguf", "put {type} into the name"), ("{nam}.gguf", "only {name} and {type}")]
)
def test_output_names_that_cannot_be(out: str, message: str, model: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_gguf(model, model.parent / out, Recipe(types=("Q8_0", "F16")))
    assert message in str(caught.value)


def test_the_checkpoint_is_never_overwritten(model: Path) -> None:
    with pytest.raises(PlanError, match="is read by this job"):
        plan_gguf(model, model / "model.safetensors", Recipe())


def test_a_folder_gets_a_name_and_a_template_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (
        plan_gguf(model, tmp_path / "out", Recipe()).files[0].path == tmp_path / "out" / "model-Q4_K_M.gguf"
    )
    assert (
        plan_gguf(model, f"{tmp_path}/new/", Recipe()).files[0].path == tmp_path / "new" / "model-Q4_K_M.gguf"
    )
    plan = plan_gguf(model, tmp_path / "{name}" / "{type}.gguf", Recipe(types=("F16", "Q8_0")))
    assert [file.path for file in plan.files] == [
        tmp_path / "model" / "F16.gguf",
        tmp_path / "model" / "Q8_0.gguf",
    ]


def test_a_plan_reads_no_weights(model: Path) -> None:
    plan = planned(model)
    assert not plan.checkpoint._descriptors


def test_slabs_cover_every_row_once_and_cut_no_group_or_matrix(mixtral: Path) -> None:
    plan = planned(mixtral)
    rows = dict.fromkeys(range(len(plan.steps)), 0)
    for slab in plan.slabs():
        step = plan.steps[slab.step]
        assert slab.first == rows[slab.step] and slab.rows > 0
        assert slab.first % step.operation.group == 0 and slab.rows % step.operation.group == 0
        if len(step.shape) == 3:
            assert slab.first // step.shape[1] == (slab.first + slab.rows - 1) // step.shape[1]
        rows[slab.step] += slab.rows
    assert all(rows[index] == step.rows for index, step in enumerate(plan.steps))


def test_quantized_sources_are_refused_by_name(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quantized .*gptq.* none in a way that can be decoded"):
        planned(model)


def test_a_bias_llama_cpp_would_not_load_is_refused(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.norm.bias": tensors["model.norm.weight"] * 0}))
    with pytest.raises(PlanError, match="model.norm.bias: LlamaForCausalLM has no rule"):
        planned(model)
