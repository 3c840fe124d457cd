"""Recipes: strictly parsed, from YAML and from flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.errors import RecipeError
from llmcompress.recipe import Recipe, parse_recipe, read_recipe
from llmcompress.sizes import format_size, parse_size


def test_every_field_can_come_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "types: [Q4_K_M, Q8_0]\ntensor_types: {attn_v: Q6_K}\noutput_tensor_type: Q8_0\npure: true\nmax_ram: 1GiB\n"
        "token_embedding_type: Q5_K\nsplit_max_size: 4G\nthreads: 3\nverify: full\npre: llama-bpe\nname: X\n"
    )
    assert read_recipe(file) == Recipe(
        types=("Q4_K_M", "Q8_0"), tensor_types=(("attn_v", "Q6_K"),), output_tensor_type="Q8_0", pure=True,
        max_ram=2**30, token_embedding_type="Q5_K", split_max_size=4 * 10**9, threads=3, verify="full",
        pre="llama-bpe", name="X",
    )  # fmt: skip


@pytest.mark.parametrize(
    "data, message",
    [
        ({"typs": ["Q8_0"]}, "typs: is no field of a recipe; did you mean 'types'"),
        ({"types": 7}, "types: cannot be 7"),
        ({"types": []}, "at least one"),
        ({"types": "Q4_K_X"}, "'Q4_K_X'; did you mean 'Q4_K"),
        ({"tensor_types": ["attn_v"]}, "tensor_types: cannot be"),
        ({"pure": "yes"}, "pure: cannot be 'yes'"),
        ({"threads": 0}, "threads: 0"),
        ({"threads": True}, "threads: cannot be True"),
        ({"verify": "ful"}, "'ful' is none of off, sample, full; did you mean 'full'"),
        ({"max_ram": "much"}, "max_ram: 'much' is not a size"),
        ({"max_ram": -5}, "not a size"),
        ({"name": 3}, "name: cannot be 3"),
    ],
)
def test_what_makes_no_sense_is_refused(data: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("text, message", [("- a\n- b\n", "a mapping"), ("a: [", "YAML"), ("\x00", "YAML")])
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "missing.yaml")


def test_a_recipe_says_only_what_decides_bytes() -> None:
    assert Recipe(verify="full", max_ram=2**30, threads=1).as_dict() == {"types": ("Q4_K_M",)}
    assert Recipe(pure=True).as_dict() == {"types": ("Q4_K_M",), "pure": True}


@pytest.mark.parametrize(
    "text, size",
    [
        ("512MiB", 512 * 2**20),
        ("4G", 4 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("1000", 1000),
        ("2kb", 2000),
        (77, 77),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1G", "1X", "0", "1e9", "nan", "5 potatoes"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**42, "4.00 TiB")],
)
def test_sizes_are_written_as_people_read_them(count: int, text: str) -> None:
    assert format_size(count) == text
