"""MXFP4 checkpoints of gpt-oss: stacked experts as E2M1 under powers of two, 32 weights each.

    NAME_blocks   uint8 (experts, outputs, groups, 16)   pairs of E2M1, the low bits first
    NAME_scales   uint8 (experts, outputs, groups)       exponents + 127

and NAME is what the plain model has, (experts, inputs, outputs). Source: transformers/integrations/mxfp4.py, and the
OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmcompress.sources.blocked import Blocked, matrix, powers, scale_rows
from llmcompress.sources.codes import E2M1
from llmcompress.sources.stored import DecodedTensor, Stored, wrong

GROUP = 32


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight stored as blocks and scales. Raises CheckpointError."""
    for name, blocks in stored.ending("_blocks"):
        stored.need(blocks.name, "U8")
        if len(blocks.shape) != 4 or blocks.columns != GROUP // 2:
            raise wrong(
                blocks, f"has shape {list(blocks.shape)}, not (experts, outputs, groups, {GROUP // 2})"
            )
        experts, outputs, groups, half = blocks.shape
        scales = stored.need(f"{name}_scales", "U8", (experts, outputs, groups))
        rows, columns = experts * outputs, groups * GROUP
        layout = Blocked(
            matrix(blocks, rows, groups * half), 4, columns, GROUP, scale_rows(matrix(scales, rows, groups), 1, powers), E2M1
        )  # fmt: skip
        shape = (experts, columns, outputs)
        found = stored.weight(name, shape, "BF16", (blocks, scales), "MXFP4", layout.decode)
        yield replace(found, transposed=True)
