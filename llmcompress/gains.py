"""How much a tensor's relative output error moves the model's output: what makes errors of different tensors add up.

Blocks write to the residual stream, which grows; a norm takes out its size. So an error of attn_output or ffn_down counts
by its share of the stream so far. Errors of q, k and v count by the share of the attn_output they go into, those of gate
and up by that of ffn_down, and those of the output matrix by the size of the logits: for small errors KL is half the
logits' error squared. The factors by role are KL divergences of single tensors in Q3_K over what this predicts,
averaged over the two sample models (Llama and Qwen3, six blocks) and relative to attn_output's.

All this is a guess, for where the model cannot be run; where it can, converters/measured_gains.py measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from llmcompress.filetypes import layer_number
from llmcompress.mix import Role, role_of

FACTORS = {
    Role.ATTENTION_OUTPUT: 1.0, Role.DOWN: 0.65, Role.UP: 0.45, Role.GATE: 0.7, Role.KEY: 0.6, Role.QUERY: 0.45,
    Role.VALUE: 0.4, Role.OUTPUT: 0.8, Role.EMBEDDING: 0.35, Role.OTHER: 0.5,
}  # fmt: skip
OF_FFN = (Role.DOWN, Role.UP, Role.GATE)


def gains_of(energies: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """The gain of each tensor of `rows`, by GGUF name.

    energies: mean over tokens of a tensor's squared output, for those whose inputs are known; others have a share of 1.
    rows: outputs of each tensor.
    """
    written: dict[tuple[Role, int], float] = defaultdict(
        float
    )  # by attention and by feed-forward of each block
    other: dict[tuple[Role, int], float] = defaultdict(float)
    for name, energy in energies.items():
        role, block = role_of(name), layer_number(name)
        (written if role in (Role.ATTENTION_OUTPUT, Role.DOWN) else other)[role, block] += energy
    shares: dict[tuple[Role, int], float] = {}
    stream = 0.0
    for block in sorted({block for _, block in written}):
        for role in (Role.ATTENTION_OUTPUT, Role.DOWN):
            stream += written[role, block]
            shares[role, block] = written[role, block] / stream if stream and written[role, block] else 1.0
    tied = not any(role_of(name) is Role.OUTPUT for name in rows)

    def gain(name: str) -> float:
        role, block = role_of(name), layer_number(name)
        if role is Role.OUTPUT or (role is Role.EMBEDDING and tied):
            return FACTORS[Role.OUTPUT] * (energies[name] / rows[name] if name in energies else 1.0)
        if block < 0:
            return FACTORS[role]
        share = shares.get((Role.DOWN if role in OF_FFN else Role.ATTENTION_OUTPUT, block), 1.0)
        if role is Role.GATE and other[Role.UP, block] > 0 and other[role, block] > 0:
            share *= other[role, block] / other[Role.UP, block]  # its own size is lost in the activation
        return FACTORS[role] * share

    return {name: gain(name) for name in rows}


def completed(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    """The measured gains, and for tensors without one the predicted, as much larger as those measured are in the median."""
    both = [measured[name] / gain for name, gain in predicted.items() if gain and name in measured]
    scale = median(both) if both else 1.0
    return {name: measured.get(name, gain * scale) for name, gain in predicted.items()}
