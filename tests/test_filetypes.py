"""Type choice against llama.cpp's own snapshots of every decision, and its corners one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
from llmcompress.converters.families import ARCHITECTURES
from snapshot_models import SNAPSHOTS, dense_block, rebuilt

from llmcompress.errors import PlanError, RecipeError
from llmcompress.filetypes import (
    FILE_TYPES,
    TENSOR_TYPES,
    ModelTraits,
    TypeOverrides,
    choose_types,
    find_file_type,
    tensor_order,
)

GOLDEN = Path(__file__).parent / "golden" / "type-snapshots"


def read_snapshot(path: Path) -> tuple[dict[str, int], dict[str, tuple[str, dict[str, str]]]]:
    """The header's numbers, and each file type's default and its tensors that differ from it."""
    title, numbers, *lines = path.read_text().splitlines()
    sections: dict[str, tuple[str, dict[str, str]]] = {}
    for line in filter(None, lines):
        key, kind = line.rsplit(" ", 1)
        if key.startswith("["):
            others = sections.setdefault(key.strip("[]"), (kind.upper(), {}))[1]
        else:
            others[key] = kind.upper()
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", numbers)}, sections


@pytest.mark.slow
@pytest.mark.parametrize("name", SNAPSHOTS)
def test_every_decision_of_llama_cpp(name, request):
    path = GOLDEN / f"{name}.schema"
    if not path.exists():
        path = request.getfixturevalue("shared") / "golden" / "type-snapshots" / path.name
    architecture, expected_decisions = SNAPSHOTS[name]
    head, sections = read_snapshot(path)
    traits = ModelTraits(
        architecture, head["n_layer"], head["n_head"], head["n_head_kv"], head.get("n_expert", 0), False
    )
    said = {tensor for _, others in sections.values() for tensor in others}
    tensors = [(tensor, shape, "a source type") for tensor, shape in rebuilt(name, head, said).items()]
    decisions, wrong = 0, []
    for file_type, (default, others) in sections.items():
        assert FILE_TYPES[file_type].default == default
        choices = choose_types(FILE_TYPES[file_type], tensors, traits)
        chosen = {tensor: choice.type for (tensor, _, _), choice in zip(tensors, choices, strict=True)}
        allowed = {tensor: kind for tensor, kind in chosen.items() if kind != "a source type"}
        assert others.keys() <= allowed.keys()
        decisions += len(allowed)
        expected = {tensor: others.get(tensor, default) for tensor in allowed}
        wrong += [(file_type, tensor) for tensor in allowed if allowed[tensor] != expected[tensor]]
    assert not wrong
    assert len(sections) == 33
    assert decisions == expected_decisions


def test_a_tiny_model_of_every_family_gets_the_types_of_llama_quantize():
    """tools/type_snapshots.py has written what that made of them."""
    wrong, known, decisions = [], set(), 0
    for line in (GOLDEN / "families.jsonl").read_text().splitlines():
        held = json.loads(line)
        traits = ModelTraits(*held["traits"], has_imatrix=False)
        known.add(traits.architecture)
        tensors = [(name, tuple(shape), "F32") for name, shape in held["tensors"].items()]
        for file_type, others in held["types"].items():
            expected = {name: kind for kind, names in others.items() for name in names}
            choices = choose_types(FILE_TYPES[file_type], tensors, traits)
            for (name, _, _), choice in zip(tensors, choices, strict=True):
                decisions += 1
                if choice.type != expected.get(name, FILE_TYPES[file_type].default):
                    wrong.append((held["model"], file_type, name))
    assert not wrong and decisions == 9852
    assert {family.name for family in ARCHITECTURES} - known == {
        "rwkv7"
    }  # which transformers has no code for


def test_the_snapshots_hold_as_many_decisions_as_they_did():
    assert sum(decisions for _, decisions in SNAPSHOTS.values()) == 164_934


def test_ids_and_types_are_those_of_gguf_py():
    known = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind) for kind in gguf.LlamaFileType}
    for file_type in FILE_TYPES.values():
        if file_type.name in known:  # older releases lack the newest
            assert known[file_type.name] == file_type.id
    assert len({file_type.id for file_type in FILE_TYPES.values()}) == 35
    assert {"Q4_K", "Q8_0", "F16"} < TENSOR_TYPES


# A small Llama: 8 blocks, so that the first eighth is block 0; 256 columns divide into every block.
LLAMA = ModelTraits("llama", 8, 8, 8, 0, False)


def llama_tensors(blocks: int = 8, width: int = 256, tied: bool = False) -> list[tuple[str, tuple, str]]:
    head = {"n_embd": width, "n_ff": width, "n_head": 1, "n_head_kv": 1}
    shapes = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (64, width)
    for blk in range(blocks):
        shapes |= dense_block(blk, head, width)
    return [(name, shape, "F32" if "norm" in name else "F16") for name, shape in shapes.items()]


def types(file_type: str, tensors=None, traits: ModelTraits = LLAMA, **overrides) -> dict[str, str]:
    tensors = tensors or llama_tensors()
    choices = choose_types(find_file_type(file_type), tensors, traits, TypeOverrides(**overrides))
    return {name: choice.type for (name, _, _), choice in zip(tensors, choices, strict=True)}


def along(chosen: dict[str, str], part: str) -> list[str]:
    return [chosen[name] for name in tensor_order(chosen) if f".{part}.weight" in name]


def test_file_type_names_are_forgiving_and_unknown_ones_are_not():
    assert find_file_type("q4-k_m") is FILE_TYPES["Q4_K_M"] is find_file_type("Q4_K")
    assert find_file_type("mxfp4_moe").id == 38
    with pytest.raises(RecipeError, match="'Q4_K_X'; did you mean 'Q4_K"):
        find_file_type("Q4_K_X")


def test_tensors_come_by_block_number_then_by_bytes():
    names = ["blk.10.attn_k.weight", "token_embd.weight", "blk.2.b", "blk.2.B", "output.weight", "blk.x"]
    assert tensor_order(names) == [
        "blk.x", "output.weight", "token_embd.weight", "blk.2.B", "blk.2.b", "blk.10.attn_k.weight"
    ]  # fmt: skip


def test_choices_come_in_the_order_asked_whatever_it_is():
    tensors = llama_tensors()
    assert types("Q4_K_M", tensors) == types("Q4_K_M", tensors[::-1])
    down = along(types("Q4_K_M", tensors[::-1]), "ffn_down")
    assert [blk for blk, kind in enumerate(down) if kind == "Q6_K"] == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q_norm.weight", (4, 256)),
        ("blk.0.attn_q.bias", (256,)),
        ("blk.0.ffn_gate_inp.weight", (4, 256)),
        ("blk.0.ssm_conv1d.weight", (4, 256)),
        ("blk.0.ssm_a", (4, 256)),
        ("position_embd.weight", (4, 256)),
        ("blk.0.attn_v.weight", (1, 1, 256)),
        ("rope_freqs.weight", (32,)),
    ],
)
def test_never_quantized(name, shape):
    for file_type in ("F16", "Q8_0", "Q4_K_M"):
        assert types(file_type, [*llama_tensors(), (name, shape, "F64")])[name] == "F64"


def test_reasons_are_told():
    tensors = llama_tensors()
    choices = choose_types(find_file_type("Q4_K_M"), tensors, LLAMA, TypeOverrides((("ffn_up", "q8_0"),)))
    told = {name: choice.reason for (name, _, _), choice in zip(tensors, choices, strict=True)}
    assert told["output_norm.weight"] == "norm: kept F32"
    assert told["blk.1.attn_q.weight"] == "default of Q4_K_M"
    assert told["blk.0.ffn_up.weight"] == "rule --tensor-type ffn_up=Q8_0"
    assert told["blk.0.attn_v.weight"] == "mix of Q4_K_M: attn_v, outer eighths and every third"


def test_fallbacks_where_rows_do_not_divide():
    tensors = [*llama_tensors(), ("blk.0.odd.weight", (4, 96), "F16"), ("blk.0.odder.weight", (4, 20), "F16")]
    for file_type, odd in (("Q2_K", "Q4_0"), ("Q4_K_M", "Q5_0"), ("Q5_K_M", "Q5_1"), ("Q6_K", "Q8_0"),
                           ("IQ4_XS", "IQ4_NL"), ("Q4_1", "Q4_1"), ("TQ2_0", "Q4_0")):  # fmt: skip
        chosen = types(file_type, tensors)
        assert (chosen["blk.0.odd.weight"], chosen["blk.0.odder.weight"]) == (odd, "F16")
    assert types("Q8_0", tensors, tensor_types=(("odd", "Q6_K"),))["blk.0.odd.weight"] == "Q8_0"
    assert types("Q4_K_M", tensors, pure=True)["blk.0.odd.weight"] == "Q5_0"
    choice = choose_types(find_file_type("Q4_K_M"), tensors[-2:], LLAMA)[0]
    assert choice.reason == "row of 96 is no multiple of 256: Q5_0 for Q4_K"
    with pytest.raises(PlanError, match="blk.0.odd.weight: rows of 96 .* Q1_0 blocks of 128"):
        types("Q1_0", tensors)


def test_the_output_takes_8_bits_where_the_default_does_not_divide():
    assert types("Q4_K_M", llama_tensors(width=96))["output.weight"] == "Q8_0"
    assert types("Q4_0", llama_tensors(width=96))["output.weight"] == "Q8_0"  # Q6_K, then its fallback
    assert types("Q4_0")["output.weight"] == "Q6_K"
    assert types("IQ3_XXS")["output.weight"] == "Q5_K"
    assert types("Q8_0")["output.weight"] == "Q8_0"


def test_a_tied_embedding_counts_as_the_output():
    tied = llama_tensors(tied=True)
    assert types("Q4_K_M", tied)["token_embd.weight"] == "Q6_K"
    assert types("Q4_K_M")["token_embd.weight"] == "Q4_K"
    assert types("Q4_K_M", tied, output="Q8_0")["token_embd.weight"] == "Q8_0"
    assert types("F16", tied, output="Q8_0")["token_embd.weight"] == "Q8_0"
    assert types("Q4_K_M", tied, output="Q8_0", token_embedding="Q5_1")["token_embd.weight"] == "Q5_1"


def test_output_and_embedding_options():
    chosen = types("Q4_K_M", output="q5_k", token_embedding="q8-0")
    assert (chosen["output.weight"], chosen["token_embd.weight"]) == ("Q5_K", "Q8_0")
    assert types("F16", output="Q8_0")["output.weight"] == "Q8_0"
    assert types("Q4_K_M", leave_output=True)["output.weight"] == "F16"
    assert types("Q4_K_M", output="BF16", pure=True)["output.weight"] == "BF16"
    with pytest.raises(RecipeError, match="contradict"):
        types("Q4_K_M", output="Q8_0", leave_output=True)
    with pytest.raises(PlanError, match="output.weight: --output-tensor-type Q4_K .* 256, .* 96; use Q5_0"):
        types("Q4_K_M", llama_tensors(width=96), output="Q4_K")


def test_rules_by_pattern():
    chosen = types("Q4_K_M", tensor_types=((r"BLK\.[01]\.ffn_down", "q8_0"), ("ffn_(down|up)", "Q5_K")))
    assert along(chosen, "ffn_down")[:3] == ["Q8_0", "Q8_0", "Q5_K"]
    assert along(chosen, "ffn_up") == ["Q5_K"] * 8
    assert types("Q4_K_M", tensor_types=(("attn_v", "Q4_K"),))["blk.0.attn_v.weight"] == "Q4_K"
    assert types("F16", tensor_types=(("attn_v", "Q4_K"),))["blk.3.attn_v.weight"] == "Q4_K"
    assert types("Q4_K_M", pure=True, tensor_types=(("ffn_up", "Q6_K"),))["blk.3.ffn_up.weight"] == "Q6_K"
    assert types("Q4_K_M", tensor_types=(("blk", "Q6_K"),))["blk.0.attn_norm.weight"] == "F32"


def test_the_option_for_the_embedding_beats_rules_but_for_the_per_layer_one():
    tensors = [*llama_tensors(), ("per_layer_token_embd.weight", (64, 256), "F16")]
    chosen = types("Q4_K_M", tensors, token_embedding="Q8_0", tensor_types=(("token_embd", "Q5_K"),))
    assert (chosen["token_embd.weight"], chosen["per_layer_token_embd.weight"]) == ("Q8_0", "Q5_K")


def test_tensors_that_rules_take_do_not_advance_the_counters():
    chosen = types("Q4_K_S", tensor_types=((r"blk\.[02]\.attn_v", "Q2_K"),))
    assert along(chosen, "attn_v") == "Q2_K Q5_K Q2_K Q5_K Q5_K Q5_K Q4_K Q4_K".split()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("ffn_dwon", "Q6_K"),), "'ffn_dwon' matches no tensor"),
        ((("ffn_down", "Q6_KK"),), "no tensor type is called 'Q6_KK'; did you mean 'Q6_K'"),
        ((("ffn_down", "I32"),), "no tensor type is called 'I32'"),
        ((("ffn_(down", "Q6_K"),), "'ffn_\\(down' is no regular expression"),
        ((("_norm", "F16"),), "'_norm' applies to no tensor"),
        ((("ffn", "Q6_K"), ("ffn_down", "Q8_0")), "'ffn_down' applies to no tensor"),
    ],
)
def test_rules_that_make_no_sense(rules, message):
    with pytest.raises(RecipeError, match=message):
        types("Q4_K_M", tensor_types=rules)


def test_pure_is_the_default_everywhere():
    chosen = types("Q4_K_M", pure=True)
    assert {kind for name, kind in chosen.items() if "norm" not in name} == {"Q4_K"}


def with_traits(**changes) -> ModelTraits:
    return ModelTraits(**({**vars(LLAMA), **changes}))


def test_value_rules_count_and_know_the_heads():
    assert along(types("Q3_K_M"), "attn_v") == ["Q5_K"] * 2 + ["Q4_K"] * 6
    assert along(types("Q4_K_S"), "attn_v") == ["Q5_K"] * 4 + ["Q4_K"] * 4
    assert set(along(types("Q2_K"), "attn_v")) == {"Q3_K"}
    grouped = with_traits(kv_heads=2)
    assert set(along(types("Q2_K", traits=grouped), "attn_v")) == {"Q4_K"}
    assert set(along(types("Q2_K_S", traits=grouped), "attn_v")) == {"Q4_K"}
    assert set(along(types("IQ2_M", traits=with_traits(kv_heads=0)), "attn_v")) == {"IQ3_S"}


def test_fused_attention_follows_the_value_rules():
    tensors = [(name.replace("attn_v", "attn_qkv"), *rest) for name, *rest in llama_tensors()]
    assert along(types("Q4_K_S", tensors), "attn_qkv") == ["Q5_K"] * 4 + ["Q4_K"] * 4


def test_an_imatrix_changes_the_mix():
    known = with_traits(has_imatrix=True)
    assert along(types("Q4_0", traits=known), "ffn_down")[:2] == ["Q4_1", "Q4_0"]
    assert set(along(types("Q4_0"), "ffn_down")) == {"Q4_0"}
    assert along(types("IQ4_XS"), "ffn_down")[:2] == ["Q5_K", "IQ4_XS"]
    assert set(along(types("IQ4_XS", traits=known), "ffn_down")) == {"IQ4_XS"}
    assert along(types("IQ3_XXS"), "ffn_down")[:2] == ["Q4_K", "Q3_K"]
    assert set(along(types("IQ3_XXS", traits=known), "ffn_down")) == {"IQ3_XXS"}
    assert set(along(types("IQ3_XXS", traits=known), "attn_v")) == {"IQ3_XXS"}
    assert set(along(types("IQ3_XXS"), "attn_v")) == {"IQ3_S"}


def test_eight_experts_mean_mixtral():
    eight = with_traits(experts=8)
    chosen = types("Q4_K_M", traits=eight)
    assert set(along(chosen, "attn_k") + along(chosen, "attn_v")) == {"Q8_0"}
    assert set(along(chosen, "attn_output")) == {"Q5_K"}
    assert set(along(types("Q3_K_L", traits=eight), "attn_output")) == {"Q3_K"}
    assert set(along(types("IQ1_S", traits=eight), "attn_k")) == {"Q4_K"}
    assert along(types("IQ3_M", traits=eight), "ffn_down").count("Q4_K") == 4
    sixteen = types("Q4_K_M", traits=with_traits(experts=16))
    assert set(along(sixteen, "attn_k") + along(sixteen, "attn_output")) == {"Q4_K"}


def test_experts_count_by_block_and_not_by_tensor():
    tensors = [(name, shape, kind) for name, shape, kind in llama_tensors() if "ffn_down" not in name]
    tensors += [(f"blk.{blk}.ffn_down_{kind}.weight", (256, 256), "F16") for blk in range(8) for kind in "ab"]
    spread = [0, 3, 6, 7]
    chosen = types("Q4_K_M", tensors, with_traits(experts=4))
    assert [chosen[f"blk.{blk}.ffn_down_b.weight"] for blk in range(8)] == [
        "Q6_K" if blk in spread else "Q4_K" for blk in range(8)
    ]
    low = types("IQ2_XS", tensors, with_traits(experts=4, blocks=16))  # the first 2 tensors, not blocks
    assert [name for name, kind in low.items() if kind == "Q2_K" and "down" in name] == [
        "blk.0.ffn_down_a.weight",
        "blk.0.ffn_down_b.weight",
    ]
    with pytest.raises(PlanError, match="blk.7.ffn_down_a.weight: block 7 of a model of 7 blocks"):
        types("Q4_K_M", [row for row in tensors if "gate" not in row[0] and "up" not in row[0]],
              with_traits(experts=4, blocks=7))  # fmt: skip


def test_falcon_and_70b():
    falcon = with_traits(architecture="falcon", blocks=32)
    chosen = types("Q4_K_M", llama_tensors(blocks=32), falcon)
    assert chosen["output.weight"] == "Q8_0"
    assert along(chosen, "ffn_down")[:5] == ["Q6_K", "Q6_K", "Q5_K", "Q5_K", "Q4_K"]
    assert set(along(types("Q3_K_L", traits=falcon), "attn_output")) == {"Q4_K"}
    assert set(along(types("Q3_K_M", traits=falcon), "attn_output")) == {"Q3_K"}
    seventy = with_traits(blocks=80, kv_heads=1)
    assert set(along(types("Q3_K_S", traits=seventy), "attn_v")) == {"Q5_K"}
    assert set(along(types("Q3_K_S", traits=with_traits(blocks=80)), "attn_v")) == {"Q3_K"}


def test_mxfp4_is_for_experts():
    tensors = [*llama_tensors(), ("blk.0.ffn_up_exps.weight", (4, 256, 256), "F16")]
    chosen = types("MXFP4_MOE", tensors, with_traits(experts=4))
    assert chosen.pop("blk.0.ffn_up_exps.weight") == "MXFP4"
    assert {kind for name, kind in chosen.items() if "norm" not in name} == {"Q8_0"}


def test_types_that_need_an_imatrix():
    def needing(file_type: str, **overrides) -> set[str]:
        tensors = llama_tensors()
        choices = choose_types(find_file_type(file_type), tensors, LLAMA, TypeOverrides(**overrides))
        pairs = zip(tensors, choices, strict=True)
        return {name for (name, _, _), choice in pairs if choice.imatrix_required}

    assert not needing("Q2_K") and not needing("Q4_K_M") and not needing("IQ4_XS") and not needing("IQ3_S")
    assert "blk.3.ffn_up.weight" in needing("Q2_K_S")
    assert "blk.3.ffn_up.weight" in needing("IQ2_XXS")
    assert needing("Q4_K_M", tensor_types=(("blk.1.ffn_up", "IQ2_XS"),)) == {"blk.1.ffn_up.weight"}
    assert not needing("Q4_K_M", output="IQ2_XS", token_embedding="IQ1_M")
