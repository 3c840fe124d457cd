"""The README's table of models, from the tables in converters/ and the tiny models that tests prove them with.

python tools/models_table.py            writes it into README.md
python tools/models_table.py --check    says whether README.md has it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- models: python tools/models_table.py -->", "<!-- end of models -->"
LOGITS, SAME, NONE = "logits", "logits of a model with the same tensors", "none yet"
TEXT = "plan equal to the text model's (text part alone; the rest is left out)"  # tests/test_multimodal.py


def proofs() -> dict[str, str]:
    """What shows that a class converts rightly, by its name: a tiny model's logits in llama.cpp and in transformers."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_families import MORE
    from tiny_models import MODELS

    made = [tiny for tiny, _ in (*MODELS.values(), *MORE.values())]
    found = {name: SAME for tiny in made for name in tiny.also}
    return found | {tiny.kind: LOGITS for tiny in made}


def table() -> str:
    from llmcompress.converters.families import ARCHITECTURES

    proved = proofs()
    rows: dict[tuple[str, str], list[str]] = {}
    for family in ARCHITECTURES:
        for name in family.classes:
            proof = proved.get(name, TEXT if family.text else NONE)
            rows.setdefault((family.name, proof), []).append(name)
    lines = ["| `general.architecture` | classes | proof |", "|---|---|---|"]
    lines += [f"| `{name}` | {', '.join(classes)} | {proof} |" for (name, proof), classes in rows.items()]
    return "\n".join(lines)


def with_table(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text()
    wanted = with_table(readme)
    if arguments.check:
        sys.exit(None if readme == wanted else "README.md: its table of models is not that of the code")
    path.write_text(wanted)


if __name__ == "__main__":
    main()
