"""The README's tables of models, quantized sources and tokenizers, from the code and the tests that prove each row.

python tools/models_table.py            writes them into README.md
python tools/models_table.py --check    says whether README.md has them
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
LOGITS, SAME, NONE = "logits", "logits of a model with the same tensors", "none yet"
RENAMED = "logits of {}, its tensors under this class's names"
REFERENCE = dict.fromkeys(
    ("RWKV7ForCausalLM", "Rwkv7ForCausalLM"), "logits of a plain reference"
)  # tests/test_rwkv7.py
TEXT = "plan equal to the text model's (text part alone; the rest is left out)"  # tests/test_multimodal.py


def proofs() -> dict[str, str]:
    """What shows that a class converts rightly, by its name: a tiny model's logits in llama.cpp and in transformers."""
    from tiny_families import MORE
    from tiny_models import MODELS

    made = [tiny for tiny, _ in (*MODELS.values(), *MORE.values())]
    found = {name: RENAMED.format(tiny.kind) if tiny.relabel else SAME for tiny in made for name in tiny.also}
    return found | REFERENCE | {tiny.kind: LOGITS for tiny in made}


def models() -> str:
    from llmcompress.converters.families import ARCHITECTURES, NO_GRAPH

    proved = proofs()
    rows: dict[tuple[str, str], list[str]] = {}
    for family in ARCHITECTURES:
        for name in family.classes:
            proof = proved.get(name, TEXT if family.text else NONE)
            of_row = rows.setdefault((family.name, proof), [])
            of_row += [name] if name not in of_row else []
    found = [(f"`{name}`", ", ".join(classes), proof) for (name, proof), classes in rows.items()]
    refused = ("none", ", ".join(NO_GRAPH), "refused: llama.cpp has no graph for them")
    return table(("`general.architecture`", "classes", "proof"), [*found, refused])


def sources() -> str:
    from proofs import SOURCES

    from llmcompress.sources import FORMATS

    methods: dict[str, list[str]] = {}
    for method, module in FORMATS.items():
        methods.setdefault(module, []).append(f"`{method}`")
    rows = []
    for module, names in methods.items():
        read, proof = importlib.import_module(f"llmcompress.sources.{module}").READS, SOURCES[module]
        check_exist(*proof.tests, *filter(None, [proof.job]))
        rows.append((", ".join(names), read, proof.peer, proof.shows if proof.job else NONE))
    return table(("`quant_method`", "what is read", "held against", "whole job"), rows)


def tokenizers() -> str:
    from llmcompress.converters.tokenizer_files import FILES
    from proofs import TOKENIZERS

    check_exist(*(test for name in FILES for test in TOKENIZERS[name].tests))
    return table(
        ("file", "what is read", "held against"),
        [(f"`{name}`", what, TOKENIZERS[name].peer) for name, what in FILES.items()],
    )


def check_exist(*tests: str) -> None:
    """Raises LookupError for a test that no file in tests/ has."""
    text = "\n".join(file.read_text() for file in sorted((ROOT / "tests").glob("test_*.py")))
    for name in tests:
        if not re.search(rf"^def {name}\(", text, re.M):
            raise LookupError(f"tests/proofs.py names {name}, which no file in tests/ has")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines
    )


TABLES = {"models": models, "sources": sources, "tokenizers": tokenizers}


def with_tables(readme: str) -> str:
    for name, made in TABLES.items():
        begin, end = f"<!-- {name}: python tools/models_table.py -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{made()}\n{end}{rest.split(end)[1]}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text()
    wanted = with_tables(readme)
    if arguments.check:
        sys.exit(None if readme == wanted else "README.md: its tables are not those of the code")
    path.write_text(wanted)


if __name__ == "__main__":
    main()
