"""Mistral's tekken.json: byte strings by rank behind the special tokens, and the regex that splits text.

Source: mistral-common (tokens/tokenizers/tekken.py).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from llmcompress.converters.byte_ranks import added_token, as_json

from llmcompress.errors import TokenizerError, shown
from llmcompress.json_object import read_object

NAME = "tekken.json"
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# Those of files that do not list them, version 7 at the latest.
_OLD = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
_MOST = 1 << 21


def read_tekken(file: Path) -> dict[str, Any]:
    """The tokenizer.json that cuts text as the file says. Raises TokenizerError, or CheckpointError where the file is
    no JSON object."""
    held = read_object(file)
    config, vocab = held.get("config"), held.get("vocab")
    if not isinstance(config, dict) or not isinstance(vocab, list):
        raise TokenizerError(f"{file}: no config and vocab in it; fetch it again")
    pattern = config.get("pattern")
    sizes = [config.get(key) for key in ("default_vocab_size", "default_num_special_tokens")]
    if not isinstance(pattern, str) or any(type(size) is not int or not 0 <= size <= _MOST for size in sizes):
        raise TokenizerError(
            f"{file}: config is {shown(config)}, without a pattern and sizes; fetch it again"
        )
    size, special = sizes
    if not special <= size <= special + len(vocab):
        raise TokenizerError(
            f"{file}: {size} tokens of {special} special and {len(vocab)} others; fetch it again"
        )
    tokens = [_token(entry, rank, file) for rank, entry in enumerate(vocab[: size - special])]
    names = {id: f"<SPECIAL_{id}>" for id in range(special)} | _special(held, special, file)
    added = [added_token(id, name) for id, name in names.items()]
    return as_json(tokens, pattern, added, where=str(file), first_id=special, begin=(ROLES["bos_token"],))


def _token(entry: Any, rank: int, file: Path) -> bytes:
    try:
        if entry["rank"] == rank:
            return base64.b64decode(entry["token_bytes"], validate=True)
    except (TypeError, KeyError, ValueError, binascii.Error):
        pass
    raise TokenizerError(
        f"{file}: vocab entry {rank} is {shown(entry)}, no bytes of that rank; fetch it again"
    )


def _special(held: dict[str, Any], count: int, file: Path) -> dict[int, str]:
    said = held.get("special_tokens")
    if said is None:
        return dict(enumerate(_OLD[:count]))
    names = {}
    for entry in said if isinstance(said, list) else [said]:
        id, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(id) is not int or not 0 <= id < count or not isinstance(text, str):
            raise TokenizerError(f"{file}: special token {shown(entry)} has no text or no id below {count}")
        names[id] = text
    return names
