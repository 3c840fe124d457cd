"""`llmcompress stats` as people and machines meet it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from llmcompress.stats import Statistics, TensorStats
from llmcompress.stats_commands import app


@pytest.fixture
def golden(root: Path) -> Path:
    return root / "tests" / "golden" / "imatrix"


def stats(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def test_show_prints_every_weight_and_layer(golden: Path) -> None:
    shown = lines(stats("show", golden / "experts.gguf"))
    (row,) = [line for line in shown if re.match(r" +1  ffn_down_exps", line)]
    assert row.split()[2:] == (
        "1698.18 0.0002 37.6713 1.11 2.75 100.00% 1536 8.7674 82.83% 7.29% 0.0763 32 0 / 4 / 8 2 of 8".split()
    )
    assert ["1", "1326.58", "12.0245%", "0.4199"] in [line.split() for line in shown]
    assert "no token reached of 'blk.1.ffn_down_exps.weight': experts 1, 2" in shown
    assert shown[-2:] == ["datasets: 'LICENSE'", "16 weights, from 1 chunks of 16 tokens"]
    assert "calls" in lines(stats("show", golden / "experts.dat"))[0]


def test_show_as_json(golden: Path) -> None:
    result = stats("show", golden / "experts.gguf", "--json")
    found = json.loads(result.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["datasets"], found["chunks"], found["chunk_size"], found["calls"]) == (
        ["LICENSE"],
        1,
        16,
        False,
    )
    (row,) = [row for row in found["tensors"] if row["name"] == "blk.0.ffn_up_exps.weight"]
    assert row["experts"] == {"experts": 8, "smallest": 0, "median": 4.0, "largest": 8, "unreached": [3]}
    assert [row["layer"] for row in found["layers"]] == [0, 1] and len(found["tensors"]) == 16


def test_show_names_what_cannot_be_shown_and_what_is_ours(tmp_path: Path) -> None:
    entries = {"a.weight": TensorStats(np.array([1]), np.ones((1, 2))), "[b].weight": TensorStats.zeros(2, 2)}
    Statistics(entries, (), 0, 512, {"tokens": "00\nff"}).save(tmp_path / "a.gguf")
    shown = lines(stats("show", tmp_path / "a.gguf"))
    assert (
        "no token reached '[b].weight'" in shown
        and "tokens: 00\\nff" in shown
        and "datasets: not said" in shown
    )


def test_merge_adds_up(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    said = lines(
        stats("merge", golden / "dense.gguf", golden / "dense.gguf", golden / "dense.gguf", "-o", out)
    )
    assert said == [f"{out}: 42 weights, 81 chunks"]
    once, thrice = Statistics.load(golden / "dense.gguf"), Statistics.load(out)
    for name, entry in once.entries.items():
        assert (thrice.entries[name].tokens == 3 * entry.tokens).all()
        np.testing.assert_array_equal(thrice.entries[name].squares, np.float32(3 * entry.squares))


def test_merge_keeps_what_only_one_has_and_says_so(golden: Path, tmp_path: Path) -> None:
    some = Statistics.load(golden / "dense.gguf")
    del some.entries["blk.0.attn_k.weight"]
    some.save(tmp_path / "some.gguf")
    said = lines(stats("merge", tmp_path / "some.gguf", golden / "dense.gguf", "-o", tmp_path / "out.dat"))
    assert said[1:] == [
        f"note: {tmp_path / 'some.gguf'} has nothing on 1 weights, kept from the others: 'blk.0.attn_k.weight'"
    ]
    assert len(Statistics.load(tmp_path / "out.dat").entries) == 42


def test_merge_refuses_other_models(golden: Path, tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{name}.gguf" for name in ("one", "two", "three"))
    Statistics({"blk.0.attn_k.weight": TensorStats.zeros(1, 128)}).save(one)
    Statistics({"else.weight": TensorStats.zeros(1, 256)}).save(two)
    for other, message in (
        (one, "'blk.0.attn_k.weight' has 1 x 256 inputs in one and 1 x 128 in the other"),
        (two, "none of its 1 weights, such as 'else.weight', is among the 42 of the files before"),
        (three, "cannot be read"),
    ):
        result = stats("merge", golden / "dense.gguf", other, "-o", tmp_path / "out.gguf")
        assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "out.gguf").exists()
        assert result.stderr.startswith(f"error: {other}: ") and message in result.stderr
        assert result.stderr.count("\n") == 1


def test_convert_says_what_is_lost(golden: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "a.dat", tmp_path / "a.gguf"
    said = lines(stats("convert", golden / "experts.gguf", old))
    assert old.read_bytes() == (golden / "experts.dat").read_bytes()
    assert said[0] == f"{old}: 16 weights, 1 chunks" and "numbers of tokens are lost" in said[1]
    assert said[2].startswith("note: experts that no token reached have ones: 'blk.0.ffn_down_exps.weight', ")
    said = lines(stats("convert", golden / "dense.dat", new, "--chunk-size", "128"))
    assert (
        said[1]
        == f"note: {golden / 'dense.dat'} counts calls, not tokens; each was taken for 128 tokens (--chunk-size)"
    )
    for name, entry in Statistics.load(golden / "dense.gguf").entries.items():
        found = Statistics.load(new).entries[name]
        assert found.tokens.tolist() == entry.tokens.tolist()  # whole chunks
        np.testing.assert_allclose(found.squares, entry.squares, rtol=1e-6)


def test_a_file_can_be_replaced_by_its_own_conversion(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(
        (golden / "dense.dat").read_bytes()
    )  # its content decides how it is read, its name how it is written
    lines(stats("convert", path, path, "--chunk-size", "128"))
    assert path.read_bytes()[:4] == b"GGUF"
