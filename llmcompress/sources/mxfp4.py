"""MXFP4 checkpoints of gpt-oss: stacked experts as E2M1 under powers of two, 32 weights each.

    NAME_blocks   uint8 (experts, outputs, groups, 16)   pairs of E2M1, the low bits first
    NAME_scales   uint8 (experts, outputs, groups)       exponents + 127

and NAME is what the plain model has, (experts, inputs, outputs). Source: transformers/integrations/mxfp4.py, and the
OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from llmcompress.sources.blocked import Blocked, matrix, powers, scale_rows
from llmcompress.sources.codes import E2M1
from llmcompress.sources.stored import DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo

GROUP = 32
READS = "gpt-oss's experts, kept bit for bit where the target is MXFP4"  # in the README's table


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
        rows = experts * outputs
        layout = MXFP4(matrix(blocks, rows, groups * half), matrix(scales, rows, groups))
        found = layout.weight(stored, name, (experts, groups * GROUP, outputs), (blocks, scales))
        yield replace(found, transposed=True)


@dataclass(frozen=True)
class MXFP4:
    """Blocks (rows, groups * 16) and scales (rows, groups), both in bytes."""

    blocks: TensorInfo
    scales: TensorInfo

    def weight(
        self, stored: Stored, name: str, shape: tuple[int, ...], parts: tuple[TensorInfo, ...]
    ) -> DecodedTensor:
        codes = Blocked(
            self.blocks, 4, 2 * self.blocks.columns, GROUP, scale_rows(self.scales, 1, powers), E2M1
        )
        found = stored.weight(name, shape, "BF16", parts, "MXFP4", codes.decode)
        return replace(found, packed="MXFP4", pack=self.packed)

    def packed(self, read: Read, first: int, rows: int) -> np.ndarray:
        """uint8 (rows, row_bytes) of GGUF's MXFP4: a block is its scale and 16 bytes, in the low bits the first 16
        codes, in the high bits the last."""
        pairs = read(self.blocks, first, rows).reshape(rows, -1, GROUP // 2)
        scales = read(self.scales, first, rows).view(np.uint8)
        if (scales == 255).any():
            raise wrong(self.scales, "has a scale that is no number")
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1, GROUP)
        turned = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
        return np.concatenate([scales[..., None], turned], -1).reshape(rows, -1)
