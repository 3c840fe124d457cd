"""JSON objects from files that are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcompress.errors import CheckpointError, shown

LARGEST_JSON = 100_000_000  # bytes; also the safetensors library's own limit for its headers


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError as `parse_object` does, or if it is too large."""
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise CheckpointError(f"{file}: {size} bytes of JSON, {LARGEST_JSON} are the limit; fetch it again")
    return parse_object(file.read_bytes(), str(file))


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
