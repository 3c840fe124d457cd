"""The types that llama.cpp's own llama-quantize gives the tensors of a tiny model of every family.

python tools/type_snapshots.py llama-quantize > tests/golden/type-snapshots/families.jsonl

A line for each model: what its types hang on (the fields of ModelTraits, without an importance matrix), the shapes of its
matrices as a GGUF has them, and for each file type the tensors that get another type than most, by that type.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TYPES = ("Q2_K", "Q3_K_L", "Q4_K_M", "Q5_K_S", "Q4_0", "IQ4_XS")


def types_of(path: Path) -> dict[str, str]:
    from llmcompress.gguf.reader import GGUFFile

    with GGUFFile.open(path) as file:
        return {name: tensor.type.name for name, tensor in file.tensors.items()}


def snapshot(name: str, folder: Path, program: str) -> dict[str, object]:
    """Of the tiny model called `name`. Raises CalledProcessError where `program` refuses its F32 file."""
    from llmcompress.converters.requantize import traits
    from relabelled import relabelled
    from tiny_families import MORE
    from tiny_models import BYTE_BPE, MODELS, SENTENCEPIECE, build

    import llmcompress
    from llmcompress.filetypes import FILE_TYPES
    from llmcompress.gguf_source import GGUFSource

    tokenizers = {
        BYTE_BPE: ROOT / "examples" / "sample-llama-6m",
        SENTENCEPIECE: ROOT / "tests" / "data" / "stories260K",
    }
    tiny = (MODELS | MORE)[name][0]
    model = build(name, folder / "tiny", tokenizers, models=MODELS | MORE)
    source = relabelled(tiny, model, folder / "tiny-relabelled") if tiny.relabel else model
    (path,) = llmcompress.quantize(source, folder / "F32.gguf", type="F32", verify="off").paths
    whole = GGUFSource.open(path)
    matrices = {key: tensor.shape for key, tensor in whole.index.items() if len(tensor.shape) > 1}
    found: dict[str, dict[str, list[str]]] = {}
    for kind in TYPES:
        made = folder / f"{kind}.gguf"
        subprocess.run([program, path, made, kind, "1"], check=True, capture_output=True)
        others = found.setdefault(kind, {})
        for key, type in types_of(made).items():
            if key in matrices and type != FILE_TYPES[kind].default:
                others.setdefault(type, []).append(key)
    said = traits(whole, has_imatrix=False)
    values = [said.architecture, said.blocks, said.heads, said.kv_heads, said.experts]
    return {"model": name, "traits": values, "tensors": matrices, "types": found}


def main() -> None:
    from tiny_families import MORE
    from tiny_models import MODELS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", help="llama-quantize, of a llama.cpp that knows all these families")
    parser.add_argument("--models", nargs="*", default=[*MODELS, *MORE])
    arguments = parser.parse_args()
    seen = set()
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            held = snapshot(name, Path(folder), arguments.program)
        known = json.dumps([held["traits"], held["tensors"]])
        if known not in seen:
            print(json.dumps(held, separators=(",", ":")), flush=True)
        seen.add(known)


if __name__ == "__main__":
    main()
