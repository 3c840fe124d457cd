"""How errors of tensors count against each other."""

from __future__ import annotations

import pytest

from llmcompress.gains import FACTORS, gains_of
from llmcompress.mix import Role

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def model(energy: float = 1.0, blocks: int = 4) -> dict[str, float]:
    return {f"blk.{block}.{part}.weight": energy for block in range(blocks) for part in PARTS}


def test_what_is_written_counts_by_its_share_of_the_stream() -> None:
    gains = gains_of(model(), dict.fromkeys(model(), 64))
    for block in range(4):
        assert gains[f"blk.{block}.attn_output.weight"] == pytest.approx(1 / (2 * block + 1))
        assert gains[f"blk.{block}.ffn_down.weight"] == pytest.approx(FACTORS[Role.DOWN] / (2 * block + 2))
        assert gains[f"blk.{block}.attn_v.weight"] == pytest.approx(FACTORS[Role.VALUE] / (2 * block + 1))
        assert gains[f"blk.{block}.ffn_up.weight"] == pytest.approx(FACTORS[Role.UP] / (2 * block + 2))


def test_the_scale_of_all_outputs_does_not_matter() -> None:
    assert gains_of(model(7.0), dict.fromkeys(model(), 64)) == pytest.approx(
        gains_of(model(), dict.fromkeys(model(), 64))
    )


def test_the_output_counts_by_the_size_of_its_logits() -> None:
    for name, energies in (
        ("output.weight", {"output.weight": 400.0}),
        ("token_embd.weight", {"token_embd.weight": 400.0}),
    ):
        assert gains_of(energies, {name: 100})[name] == pytest.approx(4 * FACTORS[Role.OUTPUT])
    untied = gains_of({"output.weight": 400.0}, {"output.weight": 100, "token_embd.weight": 100})
    assert untied["token_embd.weight"] == FACTORS[Role.EMBEDDING]


def test_tensors_without_known_inputs_have_the_factor_of_their_role() -> None:
    gains = gains_of({}, dict.fromkeys(model(), 64))
    assert gains["blk.3.ffn_down.weight"] == FACTORS[Role.DOWN]
    assert gains_of({}, {"output.weight": 9})["output.weight"] == FACTORS[Role.OUTPUT]


def test_silent_tensors_do_not_divide_by_nothing() -> None:
    assert all(gain > 0 for gain in gains_of(model(0.0), dict.fromkeys(model(), 64)).values())
