"""A checkpoint or artefact as a model that runs: its tokenizer, its blocks in lockstep, or the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from llmcompress.converters import tekken
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.tiktoken import find_tiktoken
from llmcompress.converters.tokenizer_files import read_files, runnable

from llmcompress.block_weights import PartWeights, empty_model
from llmcompress.blocks import DEFAULT_HIDDEN_BYTES, Lockstep
from llmcompress.checkpoint import Checkpoint
from llmcompress.compute import DTYPES, compute_device, precision_of
from llmcompress.errors import CheckpointError, LlmcompressError


def lockstep_of(
    checkpoint: Checkpoint | DecodedGGUF, dtype: str, device: str, hidden_ram: int = DEFAULT_HIDDEN_BYTES
) -> Lockstep:
    """The model of a checkpoint, ready to run on a device in a type, each by name or `auto`."""
    at = compute_device(device)
    matrix = max(checkpoint.index.values(), key=lambda tensor: tensor.rows)
    precision = precision_of(dtype, at.type, matrix.dtype)
    return Lockstep.of(checkpoint, DTYPES[precision], at, hidden_ram, mixed=precision == "mixed")


def read_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    """A model's tokenizer, by transformers, or in a file that needs code which is not run, by us. Raises CheckpointError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if find_tiktoken(directory) or (directory / tekken.NAME).is_file():
            files = read_files(directory)
            roles = {key: text for key, text in files.special_tokens_map.items() if isinstance(text, str)}
            return transformers.PreTrainedTokenizerFast(tokenizer_object=runnable(files), **roles)
        raise CheckpointError(
            f"{directory}: no tokenizer that transformers reads: {' '.join(str(error).split())[:300]}"
        ) from error


def require_fit(model: transformers.PreTrainedModel, rows: Sequence[np.ndarray]) -> None:
    """Raise LlmcompressError where rows of tokens are longer than the model was made for, or not of its vocabulary."""
    config = model.config.get_text_config()
    longest, highest = max(map(len, rows)), max(int(row.max()) for row in rows)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise LlmcompressError(
            f"rows of {longest} tokens: the model has {positions} positions; give --chunk {positions} or less"
        )
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{config.name_or_path or type(model).__name__}: the tokenizer gives token {highest}, the model has "
            f"{config.vocab_size} tokens; are both of the same model?"
        )


def is_quantized(config: dict) -> bool:
    """Whether config.json says that the weights are quantized: transformers then has to load them itself."""
    return bool(config.get("quantization_config"))


def transformers_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> transformers.PreTrainedModel:
    """A checkpoint in whatever quantized form transformers and its helpers read, in memory as a whole.

    Raises CheckpointError.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.directory, dtype=dtype, device_map={"": device}, experts_implementation="eager"
        )
    except (ImportError, ValueError, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: transformers cannot load it: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()


def whole_model(
    checkpoint: Checkpoint | DecodedGGUF, dtype: torch.dtype, device: torch.device
) -> transformers.PreTrainedModel:
    """The model with all its weights in memory, as other programs want it."""
    model = empty_model(checkpoint.directory, dtype, device)
    PartWeights(model, checkpoint, device).load(set(model.state_dict()))
    return model
