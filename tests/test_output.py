"""Where results go: names from templates, and places that take none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from llmcompress.converters.to_gguf import plan_gguf

from llmcompress.errors import PlanError
from llmcompress.filetypes import find_file_type
from llmcompress.output import output_paths
from llmcompress.recipe import Recipe

TYPES = [find_file_type("Q4_K_M"), find_file_type("Q8_0")]


def test_templates_folders_and_the_home_folder(tmp_path: Path) -> None:
    named = [Path("{x}-{type}-Q4_K_M.gguf"), Path("{x}-{type}-Q8_0.gguf")]
    assert output_paths("{name}-{type}.gguf", "{x}-{type}", TYPES) == named
    assert output_paths(tmp_path, "m", TYPES)[1] == tmp_path / "m-Q8_0.gguf"
    assert output_paths("new/", "m", TYPES)[0] == Path("new/m-Q4_K_M.gguf")
    assert output_paths("~/{type}.gguf", "m", TYPES)[0] == Path.home() / "Q4_K_M.gguf"
    assert output_paths("{{{type}}}.gguf", "m", TYPES)[0] == Path("{Q4_K_M}.gguf")


@pytest.mark.parametrize(
    "template", ["{size}.gguf", "{type.gguf", "{name.__class__}{type}", "{}", "{0}", "{name[0]}{type}"]
)
def test_other_braces_are_refused(template: str) -> None:
    with pytest.raises(PlanError, match="only {name} and {type} can stand in braces"):
        output_paths(template, "m", TYPES)


def test_two_types_do_not_share_a_file() -> None:
    with pytest.raises(PlanError, match="2 types would go to the same file; put {type} into the name"):
        output_paths("m.gguf", "m", TYPES)


def test_a_pipe_or_device_is_not_replaced(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(PlanError, match="pipe.gguf: is a device or a pipe"):
        plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "pipe.gguf", Recipe())
