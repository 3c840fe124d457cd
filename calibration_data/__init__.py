"""The bundled calibration texts, several kinds in separate files, listed with their origin in SOURCES.toml.

Text files hold documents with a line of only `---8<---` between them; dialogue.jsonl holds one chat a line.
"""

if __name__ != "llmcompress.calibration_data":
    raise ImportError("this folder installs as llmcompress.calibration_data: import it under that name")

from pathlib import Path

from llmcompress.errors import RecipeError, nearest

_FILES = {file.stem: file for file in Path(__file__).parent.iterdir() if file.suffix in {".txt", ".jsonl"}}
NAMES = tuple(sorted(_FILES))


def path(name: str) -> Path:
    """The file of the text called `name`, one of NAMES. Raises RecipeError for any other name."""
    if name not in _FILES:
        known = ", ".join(NAMES)
        raise RecipeError(f"no calibration text {name!r}{nearest(name, NAMES)} (known: {known})")
    return _FILES[name]


def read(name: str) -> str:
    """The whole text called `name`, one of NAMES. Raises RecipeError for any other name."""
    return path(name).read_text(encoding="utf-8")
