"""The repository checks itself: layers, packaging, what the README says, and what must not be in it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.families import ARCHITECTURES

from llmcompress.recipe import read_recipe

# Lower layers may not import higher ones.
LAYERS = [
    {"errors"},
    {"small_file", "whole_file", "reported", "calibration_data", "documents", "companions"},
    {"json_object", "tensor_info", "sizes", "machine", "progress", "parallel", "llama_tokenizer"},
    {"gguf"},
    {"stats", "stats_table", "divergence", "logits_file"},
    {"grids"},
    {"safetensors_header"},
    {"sources"},
    {"hub", "safetensors_files", "torch_pickle", "torch_zip", "checkpoint", "wrapped", "smaller"},
    {"freed_memory"},
    {"gguf_source"},
    {"text_sources", "token_stream", "token_rows", "compute", "answers"},
    {"tuning_options", "tuning_data", "frozen_model"},
    {"row_packing", "adapter_method", "adapter_start", "adalora"},
    {"held_zeros", "distillation"},
    {"training", "training_curve"},
    {"hidden_states", "linear_inputs", "block_weights"},
    {"calibration_state"},
    {"blocks"},
    {"calibrate", "evaluate"},
    {"mix", "filetypes", "inspect", "step_list"},
    {"methods"},
    {"pruning_options", "structure_options"},
    {"pruning_report"},
    {"recipe", "step", "arrays", "adapter"},
    {"merged"},
    {"hessians"},
    {"importance"},
    {"output"},
    {"plan"},
    {"allocate", "slab", "journal", "verify", "report", "run", "fallback", "checkpoint_output"},
    {"sensitivity", "gains", "confirm"},
    {"target"},
    {"converters"},
    {"display", "stats_display"},
    {"model_display"},
    {"structure_command"},
    {
        "stats_commands",
        "model_commands",
        "sensitivity_command",
        "adapter_commands",
        "finetune_command",
        "prune_command",
        "run_command",
        "compensate_command",
    },
    {"cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LONGEST = 400  # lines of a source file, which is read in one sitting; tables are exempt
TABLES: set[str] = set()


def tracked(root: Path) -> list[Path]:
    """Files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    return [root / name for name in names.decode().split("\0") if name and (root / name).exists()]


def sources(root: Path) -> list[Path]:
    return [*sorted((root / "llmcompress").rglob("*.py")), *sorted((root / "converters").rglob("*.py"))]


def module_of(file: Path, root: Path) -> str:
    """The layer's word: the first name below llmcompress."""
    parts = file.relative_to(root).with_suffix("").parts
    return "converters" if parts[0] == "converters" else parts[1]


def imported(file: Path) -> set[str]:
    """First names below llmcompress that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llmcompress":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmcompress."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llmcompress.")
            }
    return found - {"__version__"}


def test_every_module_has_a_layer_and_imports_point_down(root: Path) -> None:
    for file in sources(root):
        name = module_of(file, root)
        if name == "__init__":
            continue  # the public names, which import on use
        assert name in RANK, f"{file}: give it a layer"
        above = {other for other in imported(file) if RANK[other] > RANK[name]}
        assert not above, f"{file.relative_to(root)} imports from above: {above}"


def test_files_are_short_and_named_for_what_they_hold(root: Path) -> None:
    for file in sources(root):
        assert file.stem not in {"utils", "util", "base", "helpers", "common", "misc"}
        lines = file.read_text().count("\n")
        assert lines <= LONGEST or file.name in TABLES, f"{file.relative_to(root)} has {lines} lines"


def test_packages_listed_are_the_folders_there_are(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {"converters": "llmcompress.converters", "calibration_data": "llmcompress.calibration_data"}
    folders = {str(file.parent.relative_to(root)) for file in root.glob("llmcompress/**/__init__.py")}
    assert set(settings["packages"]) == {folder.replace(os.sep, ".") for folder in folders} | set(
        mapped.values()
    )
    for folder, package in mapped.items():
        assert settings["package-dir"][package] == folder


@pytest.mark.parametrize("folder", ["converters", "calibration_data"])
def test_mapped_packages_refuse_their_plain_name(folder: str, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode and f"llmcompress.{folder}" in done.stderr
    importlib.import_module(f"llmcompress.{folder}")


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_data_file(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # pip leaves a build folder where it builds
    for file in tracked(root):
        target = copy / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        copy,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for file in sources(root):
        path = file.relative_to(root).as_posix()
        assert (path if path.startswith("llmcompress/") else f"llmcompress/{path}") in held
    assert "llmcompress/converters/pretokenizers.json" in held
    assert "llmcompress/calibration_data/prose.txt" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_every_architecture_is_listed(root: Path) -> None:
    found: list[Architecture] = []
    for file in sorted((root / "converters").glob("[a-z]*.py")):
        module = importlib.import_module(f"llmcompress.converters.{file.stem}")
        if file.stem != "families":
            found += [value for value in vars(module).values() if isinstance(value, Architecture)]
    assert {id(family) for family in found} == {id(family) for family in ARCHITECTURES}


@pytest.mark.slow
def test_the_readmes_table_of_models_is_that_of_the_code(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("models_table", root / "tools" / "models_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    readme = (root / "README.md").read_text()
    assert tool.with_tables(readme) == readme, "python tools/models_table.py writes its tables anew"
    for file in re.findall(r"\b[\w]+\.py\b", (root / "README.md").read_text()):
        assert list(root.rglob(file)), f"README names {file}, which does not exist"


def shown_commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("llmcompress ")]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/finetuning.md", "docs/pruning.md"])
def test_commands_run_as_written(root: Path, tmp_path: Path, page: str) -> None:
    (tmp_path / "examples").symlink_to(root / "examples")
    commands = shown_commands(root / page)
    assert len(commands) >= 6
    for command in commands:
        arguments = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.slow
def test_the_readme_python_runs_as_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(root / "examples")
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 3


def test_example_recipes_parse(root: Path) -> None:
    recipes = list((root / "examples").glob("*.yaml"))
    assert recipes
    for file in recipes:
        if "\nsteps:" not in file.read_text():  # a list of commands is read by those of docs/
            read_recipe(file)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, llmcompress.cli; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "numpy",
        "numba",
        "torch",
        "transformers",
        "gguf",
        "tokenizers",
        "huggingface_hub",
        "rich",
        "yaml",
    }
    assert not heavy & set(modules)


def test_nothing_of_this_machine_is_in_the_tree(root: Path) -> None:
    forbidden = re.compile(rb"/(?:work|root|farm)/|pypi\.org/simple|--(?:extra-)?index-url")
    for file in tracked(root):
        if file.suffix in {".safetensors"} or file == Path(__file__).resolve():
            continue
        found = forbidden.search(file.read_bytes())
        assert not found, f"{file.relative_to(root)}: {found[0]!r}"
