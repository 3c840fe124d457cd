"""What each tensor loses in each type: measured on a sample of its rows, and kept in a file for any number of targets.

The measure is the relative error of what the tensor puts out, e H eᵀ / w H wᵀ for rounding errors e of rows w, where
H = XᵀX of its inputs is known; with an importance matrix only H's diagonal counts; with neither all inputs count alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RecipeError, nearest
from llmcompress.grids import GRIDS
from llmcompress.importance import Importance
from llmcompress.json_object import read_object
from llmcompress.machine import cores
from llmcompress.mix import IMATRIX_REQUIRED
from llmcompress.parallel import in_parallel
from llmcompress.progress import Progress
from llmcompress.slab import read_slab
from llmcompress.step import Slab, Step, slabs_of
from llmcompress.whole_file import whole_file

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
I_TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")
TYPES_OF_SHORT_ROWS = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1")  # rows that do not divide into 256
CANDIDATES = (*I_TYPES, *TYPES_OF_SHORT_ROWS, *K_TYPES)
SAMPLES = 16  # runs of rows, spread evenly over a tensor
SAMPLE_WEIGHTS = 2**14  # in each


@dataclass(frozen=True)
class Sensitivity:
    """errors: relative error of each tensor, by GGUF name, in each type. energies: mean over tokens of the squared output of
    those with importance. What they were measured with stands beside. gains: nats of KL divergence a token for each unit of
    a tensor's relative error, of those that were measured (converters/measured_gains.py)."""

    checkpoint: str  # fingerprints
    importance: str
    method: str
    effort: str
    errors: Mapping[str, Mapping[str, float]]
    energies: Mapping[str, float]
    gains: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a JSON file. Raises LlmcompressError where that is not possible."""
        with whole_file(path) as file:
            file.write(json.dumps({"llmcompress": "sensitivity", **asdict(self)}, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Raises RecipeError for a file that is not by `save`."""
        if not Path(path).is_file():
            raise RecipeError(f"{path}: is no file; make it with `llmcompress sensitivity`")
        held = read_object(Path(path))
        words = [held.get(key) for key in ("checkpoint", "importance", "method", "effort")]
        errors, energies, gains = held.get("errors"), held.get("energies"), held.get("gains", {})
        if held.get("llmcompress") != "sensitivity" or not all(isinstance(word, str) for word in words):
            raise RecipeError(f"{path}: is no sensitivity file; make one with `llmcompress sensitivity`")
        sound = isinstance(errors, dict) and all(
            _are_numbers(found) and found.keys() <= set(CANDIDATES) for found in errors.values()
        )
        if not sound or not _are_numbers(energies) or not _are_numbers(gains):
            raise RecipeError(f"{path}: is damaged; measure again with `llmcompress sensitivity`")
        return cls(*words, errors, energies, gains)

    def check_made_from(
        self, checkpoint: Checkpoint, importance: Importance, method: str, effort: str, path: str | Path
    ) -> None:
        """Raises RecipeError where the file is of another model, importance, method or effort."""
        wanted = (checkpoint.fingerprint(), importance.fingerprint(), method, effort)
        held = (self.checkpoint, self.importance, self.method, self.effort)
        for what, mine, theirs in zip(("checkpoint", "importance", "method", "effort"), wanted, held):
            if mine != theirs:
                raise RecipeError(
                    f"{path}: was measured with another {what} ({theirs[:12]}, here it is {mine[:12]}); "
                    "measure again with `llmcompress sensitivity`"
                )


def measure(
    checkpoint: Checkpoint,
    steps: Sequence[Step],
    importance: Importance,
    method: str = "nearest",
    effort: str = "normal",
    types: Sequence[str] = CANDIDATES,
    progress: Progress = Progress(),
    gains: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda energies: {},
) -> Sensitivity:
    """Round sampled rows of every step to every type that can hold it. `gains` measures those, given the energies.

    Raises RecipeError for a type that is none of CANDIDATES, RunError for weights that are not finite.
    """
    for name in types:
        if name not in CANDIDATES:
            raise RecipeError(
                f"--types: {name!r} is none of {', '.join(CANDIDATES)}{nearest(name, CANDIDATES)}"
            )
    names = {step.name: candidates(step, types, step.name in importance) for step in steps}
    work = partial(_tensor_errors, checkpoint, importance, method, effort, names)
    errors: dict[str, dict[str, float]] = {}
    energies: dict[str, float] = {}
    progress.start("measuring", len(steps), "tensors")
    for name, found, energy in in_parallel(cores(), steps, work):
        errors[name], energies[name] = found, energy
        progress.advance(1)
    known = {step.name: energies[step.name] for step in steps if step.name in importance}
    return Sensitivity(
        checkpoint.fingerprint(),
        importance.fingerprint(),
        method,
        effort,
        {step.name: errors[step.name] for step in steps},
        known,
        gains(known),
    )


def candidates(step: Step, types: Sequence[str], has_importance: bool) -> list[str]:
    """Those of `types` whose blocks divide the step's rows. Types of 32 weights a block are for rows that the larger
    blocks do not divide; types that need an importance matrix, for tensors that have one."""
    divided = step.columns % 256 == 0
    return [
        name
        for name in types
        if step.columns % GRIDS[name].block == 0
        and not (divided and name in TYPES_OF_SHORT_ROWS)
        and (has_importance or name not in IMATRIX_REQUIRED)
    ]


def sample(step: Step) -> list[Slab]:
    """SAMPLES runs of rows, or all there are, in order."""
    slabs = list(slabs_of(0, step, SAMPLE_WEIGHTS))
    chosen = np.linspace(0, len(slabs) - 1, min(SAMPLES, len(slabs)))
    return [slabs[round(place)] for place in chosen]


def _tensor_errors(
    checkpoint: Checkpoint,
    importance: Importance,
    method: str,
    effort: str,
    names: Mapping[str, Sequence[str]],
    step: Step,
) -> tuple[str, dict[str, float], float]:
    """The step's name, its relative error in each of its types, and the mean squared output of one of its matrices."""
    errors = dict.fromkeys(names[step.name], 0.0)
    size, sampled = 0.0, 0
    entry = importance.get(step.name)
    products_of = lru_cache(maxsize=1)(partial(importance.products, step.name))
    for slab in sample(step) if errors else []:
        matrix = slab.first // step.shape[-2] if len(step.shape) > 2 else 0
        weigh = None if entry is None else entry[matrix]
        products = products_of(matrix)
        solver = importance.solver(step.name, matrix) if method == "gptq" and products is not None else None
        rows = read_slab(checkpoint, step, slab)
        if products is not None and (trace := products.trace()) > 0:
            products = products * np.float32(weigh.sum() / trace)  # of one token
        size += _energy(rows.float32, products, weigh)
        sampled += slab.rows
        for name in errors:
            data = rows.encoded(GRIDS[name], weigh, effort, solver)
            errors[name] += _energy(GRIDS[name].dequantize(data) - rows.float32, products, weigh)
    relative = {name: error / size if size else 0.0 for name, error in errors.items()}
    return step.name, relative, size / max(sampled, 1) * step.shape[-2]


def _energy(rows: np.ndarray, products: np.ndarray | None, importance: np.ndarray | None) -> float:
    """What float32 rows `(rows, columns)` put out, squared and summed, for inputs with these XᵀX, or with these mean
    squares `(columns,)`, or all alike."""
    if products is not None:
        return max(0.0, float(np.einsum("rc,rc->", rows @ products, rows, dtype=np.float64)))
    columns = np.einsum("rc,rc->c", rows, rows, dtype=np.float64)
    return float(columns.sum() if importance is None else columns @ importance)


def _are_numbers(held: object) -> bool:
    return isinstance(held, dict) and all(
        isinstance(number, (int, float)) and 0 <= number < math.inf for number in held.values()
    )
