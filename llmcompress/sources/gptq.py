"""GPTQ checkpoints by AutoGPTQ, GPTQModel, us and others: 2, 3, 4 or 8 bits.

In place of the weight (outputs, inputs) of a linear they have

    qweight   int32    (inputs * bits / 32, outputs)   codes, packed along the inputs
    qzeros    int32    (groups, outputs * bits / 32)   zeros, packed along the outputs
    scales    float16  (groups, outputs)
    g_idx     int32    (inputs,)                       the group of each input; some leave it out

and weight = scale * (code - zero). The first version of the format ("gptq") stores zeros less one. Source: AutoGPTQ
(nn_modules/qlinear/qlinear_cuda_old.py), GPTQModel (utils/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import CheckpointError, shown
from llmcompress.grids.words import CODES, pack_words
from llmcompress.sources.codes import floats, scaled, scaled_pairs, unpack
from llmcompress.sources.stored import FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
READS = "2, 3, 4, 8 bits, symmetric or not, act-order, both versions"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that is stored as `qweight`. Raises CheckpointError."""
    settings = stored.settings
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if version not in VERSIONS:
        raise CheckpointError(
            f"quantization_config: GPTQ's checkpoint_format {shown(version)} is none of {', '.join(VERSIONS)}; "
            "give the unquantized model"
        )
    writers = (
        (settings.get("meta") or {}).get("quantizer", []) if isinstance(settings.get("meta"), dict) else []
    )
    borrowed = version == "gptq" and any("gptqmodel" in str(name).lower() for name in _listed(writers))
    for module, qweight in stored.ending(".qweight"):
        yield _weight(stored, module, qweight, version == "gptq", borrowed)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _weight(
    stored: Stored, module: str, qweight: TensorInfo, less_one: bool, borrowed: bool
) -> DecodedTensor:
    stored.need(qweight.name, "I32")
    scales = stored.need(f"{module}.scales", FLOATS)
    index = stored.get(f"{module}.g_idx") and stored.need(f"{module}.g_idx", "I32")
    if len(qweight.shape) != 2 or len(scales.shape) != 2 or (index and len(index.shape) != 1):
        raise wrong(
            qweight, f"has shape {list(qweight.shape)} beside scales of {list(scales.shape)}, not matrices"
        )
    (words, outputs), groups = qweight.shape, scales.shape[0]
    bits = words * 32 // index.shape[0] if index and index.shape[0] else stored.settings.get("bits")
    if bits not in BITS or (index and index.shape[0] * bits != words * 32):
        raise wrong(qweight, f"has {words} words to a column, which are codes of none of {BITS} bits")
    inputs = words * 32 // bits
    stored.need(scales.name, FLOATS, (groups, outputs))
    qzeros = stored.need(f"{module}.qzeros", "I32", (groups, -(-outputs * bits // 32)))
    group = stored.settings.get("group_size")  # the last group may be short
    if not isinstance(group, int) or group < 1 or -(-inputs // group) != groups:
        group = -(-inputs // groups) if groups else 0
    if not group or -(-inputs // group) != groups:
        raise wrong(scales, f"has {groups} groups for {inputs} inputs")
    form = f"GPTQ {bits}-bit, group {group}" + (", act-order" if stored.settings.get("desc_act") else "")
    layout = _Layout(qweight, qzeros, scales, index, bits, inputs, group, less_one, borrowed)
    parts = (qweight, qzeros, scales, index)
    return stored.weight(
        f"{module}.weight", (outputs, inputs), scales.dtype, parts, form, layout.decode, True
    )


@dataclass(frozen=True)
class _Layout:
    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    index: TensorInfo | None
    bits: int
    inputs: int
    group: int
    less_one: bool  # zeros are stored so
    borrowed: bool  # and a zero of 0 has taken its one from the next

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        """float32 (rows, inputs). Raises CheckpointError for an input of no group."""
        words = read(self.qweight, columns=slice(first, first + rows))
        data = np.ascontiguousarray(words.T).view(np.uint8)
        scales = floats(read(self.scales, columns=slice(first, first + rows)).T, self.scales.dtype)
        zeros, groups = self._zeros(read, first, rows), self._groups(read)
        if self.bits == 4 and not isinstance(groups, np.ndarray) and groups % 2 == 0:
            return scaled_pairs(data, scales, zeros, groups)
        return scaled(unpack(data, self.bits, self.inputs), scales, zeros, groups)

    def _zeros(self, read: Read, first: int, rows: int) -> np.ndarray:
        """float32 (rows, groups)."""
        low, outputs = first // CODES * CODES, self.qweight.shape[1]
        high = min(-(-(first + rows) // CODES) * CODES, outputs)
        begin, end = low * self.bits // 32, -(-high * self.bits // 32)
        words = read(self.qzeros, columns=slice(begin, end)).view(np.uint32)
        # GPTQModel takes the one from a whole word, where a zero of 0 borrows, and so gives it back; AutoGPTQ's
        # kernels know each zero alone.
        whole = self.borrowed and CODES % self.bits == 0
        if whole:
            words = words + pack_words(np.ones((CODES, 1), np.uint8), self.bits).view(np.uint32)[0]
        zeros = unpack(words.view(np.uint8), self.bits, high - low)[:, first - low : first - low + rows]
        if self.less_one and not whole:
            zeros = zeros + np.uint8(1) & np.uint8((1 << self.bits) - 1)
        return np.ascontiguousarray(zeros.T, np.float32)

    def _groups(self, read: Read) -> int | np.ndarray:
        if self.index is None:
            return self.group
        groups = read(self.index).reshape(-1)
        if (groups == np.arange(self.inputs) // self.group).all():
            return self.group
        if groups.min() < 0 or groups.max() >= self.scales.shape[0]:
            what = f"has groups from {groups.min()} to {groups.max()}, there are {self.scales.shape[0]}"
            raise wrong(self.index, what)
        return groups
