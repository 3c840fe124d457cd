"""The number type and the threads a model is run with."""

from __future__ import annotations

from typing import Any

import torch

from llmcompress.errors import LlmcompressError, nearest
from llmcompress.machine import cores

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Narrower matrices are multiplied as fast in float32: 256 wide they were, 896 wide bfloat16 was 2.5 times as fast
# (AVX512-BF16, two cores).
_SMALLEST_WIDTH = 512


def compute_dtype(asked: str, device: str, width: int, stored: str) -> torch.dtype:
    """The type to compute in. `auto` is bfloat16 where the weights are stored so (`stored` is BF16) and the device has
    instructions for it that pay at matrices `width` columns wide; else float32.

    Raises LlmcompressError for a name that is none.
    """
    if asked != "auto":
        if asked not in DTYPES:
            raise LlmcompressError(
                f"--dtype {asked}: is none of auto, {', '.join(DTYPES)}{nearest(asked, DTYPES)}"
            )
        return DTYPES[asked]
    fast = device != "cpu" or (_bfloat16_instructions() and width >= _SMALLEST_WIDTH)
    return torch.bfloat16 if stored == "BF16" and fast else torch.float32


def compute_device(asked: str) -> torch.device:
    """The device called `asked`; `auto` is the first GPU there is, else the CPU with all cores we may use.

    Raises LlmcompressError for one that is not there.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # "meta" makes tensors, but of no values
    except (RuntimeError, AssertionError) as error:
        raise LlmcompressError(f"--device {asked}: {' '.join(str(error).split())[:200]}") from None
    if device.type == "cpu":
        torch.set_num_threads(cores())
    return device


def _bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 by AVX512-BF16 or AMX."""
    checks: list[Any] = [
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    ]
    return any(check() for check in checks if check)
