"""JSON objects from files that are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcompress.errors import CheckpointError, shown
from llmcompress.small_file import read_bytes


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError as `parse_object` does, or if it is too large."""
    return parse_object(read_bytes(file), str(file))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. `where` begins the message of the CheckpointError that is raised for text
    that is not UTF-8 or not JSON, for anything but an object, and for a key that comes twice."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{where}: key {shown(twice)} comes twice; remove one of the two")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({shown(str(error))}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON {type(value).__name__}, not an object; fetch it again")
    return value
