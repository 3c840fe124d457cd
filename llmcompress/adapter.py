"""A peft adapter folder: what it says of itself, and the matrices it adds.

`adapter_config.json` says how the tensors of `adapter_model.safetensors` (or `.bin`) change the base model. A LoRA
(https://arxiv.org/abs/2106.09685) of a linear W `(outputs, inputs)` is W + scale·B·A with A `(rank, inputs)` and
B `(outputs, rank)`, scale being alpha / rank, or alpha / √rank for rsLoRA (https://arxiv.org/abs/2312.03732). AdaLoRA
(https://arxiv.org/abs/2303.10512) puts a diagonal E between the two. DoRA (https://arxiv.org/abs/2402.09353) gives the
sum's rows new lengths. The layout follows peft 0.21's `save_pretrained`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress import hub
from llmcompress.checkpoint import Checkpoint, read_index
from llmcompress.errors import CheckpointError, shown
from llmcompress.grids.floats import to_float32
from llmcompress.json_object import read_object
from llmcompress.tensor_info import TensorInfo

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
KINDS = ("LORA", "ADALORA")
# Fields of variants that compute something else than the above.
VARIANTS = {
    "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "arrow_config": "Arrow", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA", "megatron_config": "Megatron's layers",
}  # fmt: skip
# Initialisations that take the first B·A off the base model's weights, which then are not those of the checkpoint.
CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# In which order modules register the parameters that may be targets: peft wraps the first one first, innermost.
REGISTERED = ("weight", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
_ADDED = re.compile(
    r"(?P<module>.+?)(?P<depth>(\.base_layer)*)"
    r"\.lora_(?P<part>A|B|E|embedding_A|embedding_B|magnitude_vector)(\.default)?(?P<suffix>\.weight|\.bias)?"
)
_WRAPPED = re.compile(r"\.(base_layer|token_adapter|modules_to_save(\.default)?)(?=\.)")
_TOKENS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")


@dataclass(frozen=True)
class LowRank:
    """What is added to one tensor of the base: `scale * b @ a`, for each of its stacked matrices.

    name: the tensor as transformers calls it. embedding: `outputs` are tokens, and the factors lie transposed.
    """

    name: str
    outputs: int
    inputs: int
    rank: int
    matrices: int
    scale: float
    factors: Mapping[str, TensorInfo]  # by the part of _ADDED
    weights: Checkpoint
    embedding: bool = False

    def a(self, matrix: int = 0) -> np.ndarray:
        """float32 (rank, inputs); AdaLoRA's E is multiplied in."""
        if self.embedding:
            return np.ascontiguousarray(self._read("embedding_B").T)
        values = self._read("A", matrix * self.rank, self.rank)
        return values * self._read("E").reshape(-1, 1) if "E" in self.factors else values

    def b(self, first: int = 0, rows: int | None = None, matrix: int = 0) -> np.ndarray:
        """float32 (rows, rank), of the outputs from `first` on."""
        rows = self.outputs - first if rows is None else rows
        if self.embedding:
            return self._columns("embedding_A", first, rows)
        return np.ascontiguousarray(self._read("B", first, rows)[:, matrix :: self.matrices])

    @property
    def magnitude(self) -> np.ndarray | None:
        """DoRA's lengths of the rows of the sum: float32 (outputs,), of an embedding (inputs,)."""
        return self._read("magnitude_vector").reshape(-1) if "magnitude_vector" in self.factors else None

    def _read(self, part: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        tensor = self.factors[part]
        return finite(self.weights.read(tensor.name, first, rows), tensor)

    def _columns(self, part: str, first: int, columns: int) -> np.ndarray:
        """Columns of a factor as rows, read a row's part at a time."""
        tensor = self.factors[part]
        size = tensor.nbytes // (tensor.rows * tensor.columns)
        parts = [
            self.weights.read_bytes(tensor.name, (row * tensor.columns + first) * size, columns * size)
            for row in range(tensor.rows)
        ]
        kind = self.weights.read(tensor.name, 0, 0).dtype
        return np.ascontiguousarray(
            finite(np.frombuffer(b"".join(parts), kind).reshape(tensor.rows, columns), tensor).T
        )


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that were trained: `indices`, and their values in `tensor`."""

    name: str
    indices: tuple[int, ...]
    tensor: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. `full`: whole tensors by the names of those they replace; `biases`: what is added to biases."""

    directory: Path
    config: Mapping[str, Any]
    weights: Checkpoint
    low_rank: tuple[LowRank, ...]
    full: Mapping[str, TensorInfo]
    tokens: tuple[Tokens, ...]
    biases: Mapping[str, tuple[float, TensorInfo]]

    @property
    def base(self) -> str | None:
        """The model it was trained on, as its config names it."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    @property
    def trained_in_nf4(self) -> bool:
        """Whether `llmcompress finetune` trained it, as it is, on weights that it had rounded to NF4."""
        return self._training.get("load") == "4bit" and self._options.get("init") == "default"

    @property
    def keeps_zeros(self) -> bool:
        """Whether `llmcompress finetune` trained it with the model's zeros held: merged, they are zeros."""
        return self._options.get("keep_zeros") is True

    @property
    def _training(self) -> dict[str, Any]:
        """What `llmcompress finetune` says of it."""
        file = self.directory / "finetune.json"
        return read_object(file) if file.is_file() else {}

    @property
    def _options(self) -> dict[str, Any]:
        options = self._training.get("options")
        return options if isinstance(options, dict) else {}

    @property
    def kind(self) -> str:
        """LoRA, rsLoRA, DoRA or AdaLoRA."""
        if self.config["peft_type"] == "ADALORA":
            return "AdaLoRA"
        return (
            "DoRA" if self.config.get("use_dora") else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        )

    @classmethod
    def open(cls, adapter: str | Path) -> Adapter:
        """Open a folder or a hub id. Raises CheckpointError for what is no complete adapter, and for a kind of adapter
        whose matrices mean something else."""
        directory = hub.resolve(str(adapter))
        config = _read_config(directory)
        files = [directory / name for name in WEIGHTS if (directory / name).is_file()]
        if not files:
            raise CheckpointError(f"{directory}: none of {', '.join(WEIGHTS)}; fetch the adapter again")
        return _parsed(directory, config, Checkpoint(directory, config, read_index(files[0])))


def finite(raw: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """`raw` as float32. Raises CheckpointError for a NaN or infinity."""
    values = to_float32(np.ascontiguousarray(raw), tensor.dtype)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{tensor.file}: tensor {shown(tensor.name)} holds a NaN or infinity; train the adapter again"
        )
    return values


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{directory}: no {CONFIG}; give the folder of a peft adapter")
    config = read_object(file)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"{file}: peft_type is {shown(kind)}, not one of {', '.join(KINDS)}; {_BY_PEFT}"
        )
    for field, name in VARIANTS.items():
        if config.get(field):
            raise CheckpointError(f"{file}: {field} makes it {name}, which is no plain LoRA; {_BY_PEFT}")
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(CHANGE_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {shown(started)}: training began by changing the base model's weights, which "
            "the adapter does not hold; save it again with save_pretrained(..., path_initial_model_for_weight_conversion"
            "=...), as a plain LoRA"
        )
    for field, ok in (("rank_pattern", dict), ("alpha_pattern", dict), ("target_parameters", list)):
        if not isinstance(config.get(field) or ok(), ok):
            raise CheckpointError(f"{file}: {field} is {shown(config[field])}, it must be a {ok.__name__}")
    return config


_BY_PEFT = "merge it with peft (merge_and_unload) and give the saved model"


def _parsed(directory: Path, config: Mapping[str, Any], weights: Checkpoint) -> Adapter:
    parts: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    untrained: dict[str, TensorInfo] = {}  # what modules_to_save began with
    tokens: list[Tokens] = []
    for name, tensor in weights.index.items():
        own = name.removeprefix(PREFIX)
        if match := _ADDED.fullmatch(own):
            place = match["module"], match["depth"].count(".")
            part = match["part"] + ("" if match["suffix"] != ".bias" else ".bias")
            if part in parts.setdefault(place, {}):
                raise CheckpointError(
                    f"{tensor.file}: tensor {shown(name)} comes twice; fetch the adapter again"
                )
            parts[place][part] = weights.readable(name)
        elif match := _TOKENS.fullmatch(own):
            tokens.append(_tokens(match["module"], config, weights.readable(name)))
        elif ".original_module." in own:
            untrained[own.replace(".original_module.", ".")] = weights.readable(name)
        else:
            full[_WRAPPED.sub("", own)] = weights.readable(name)
    for name in untrained.keys() - full.keys():
        raise CheckpointError(
            f"{directory}: no tensor {shown(name)}, only what it was before; save the adapter again"
        )
    if not (parts or full or tokens):
        raise CheckpointError(f"{weights.files or directory}: holds no tensor; train the adapter again")
    added = [
        _low_rank(directory, config, weights, f"{module}.{_parameter(config, module, depth, parts)}", found)
        for (module, depth), found in parts.items()
    ]
    biases = {
        update.name.removesuffix("weight") + "bias": (update.scale, update.factors["B.bias"])
        for update in added
        if "B.bias" in update.factors
    }
    return Adapter(directory, config, weights, tuple(update for update in added if update.rank), full, tuple(tokens),
                   biases)  # fmt: skip


def _parameter(
    config: Mapping[str, Any], module: str, depth: int, parts: Mapping[tuple[str, int], object]
) -> str:
    """The parameter of a module that is changed: its weight, or one of those that target_parameters name.

    peft wraps a module once for each, the first one innermost; the deeper a name, the earlier its parameter."""
    listed = [word for word in config.get("target_parameters") or () if isinstance(word, str)]
    own = {word.rpartition(".")[2] for word in listed if _targets(word, module)}
    depths = sorted(other for name, other in parts if name == module)
    names = sorted(
        own or {"weight"}, key=lambda name: (REGISTERED.index(name) if name in REGISTERED else -1, name)
    )
    if depths != list(range(len(names))) or (len(names) > 1 and not own <= set(REGISTERED)):
        raise CheckpointError(
            f"{CONFIG}: target_parameters are {shown(sorted(own))} of {shown(module)}, the adapter has tensors for "
            f"{len(depths)} parameters of it; {_BY_PEFT}"
        )
    return names[len(names) - 1 - depth]


def _targets(word: str, module: str) -> bool:
    """Whether a word of target_parameters names a parameter of a module; a parameter by itself is one of experts."""
    owner = word.rpartition(".")[0] or "experts"
    return f".{module}".endswith(f".{owner}")


def _low_rank(
    directory: Path, config: Mapping[str, Any], weights: Checkpoint, name: str, found: dict[str, TensorInfo]
) -> LowRank:
    embedding = "embedding_A" in found
    names = ("embedding_B", "embedding_A") if embedding else ("A", "B")
    missing = [
        part for part in (*names, *(["E"] if config["peft_type"] == "ADALORA" else [])) if part not in found
    ]
    if missing or any(len(found[part].shape) != 2 for part in names):
        what = f"no lora_{missing[0]}" if missing else "no matrices"
        raise CheckpointError(
            f"{directory}: {what} for {shown(name)}; a shard of the adapter is missing: save it again"
        )
    if bool(config.get("use_dora")) != ("magnitude_vector" in found):
        has = "has a" if "magnitude_vector" in found else "lacks the"
        raise CheckpointError(
            f"{directory}: {shown(name)} {has} lora_magnitude_vector, use_dora is {config.get('use_dora')}; "
            "take both files from one adapter"
        )
    first, second = (found[part] for part in names)
    if embedding:
        ranks, inputs, outputs = (first.shape[1], second.shape[0]), first.shape[0], second.shape[1]
    else:
        ranks, inputs, outputs = (first.shape[0], second.shape[1]), first.shape[1], second.shape[0]
    if ranks[0] != ranks[1]:
        raise CheckpointError(
            f"{directory}: {shown(name)}: A has {ranks[0]} ranks and B {ranks[1]}; save the adapter again"
        )
    rank, scale = _rank_and_scale(directory, config, name, ranks[0])
    if ranks[0] % max(rank, 1):
        raise CheckpointError(
            f"{directory}: {shown(name)} has {ranks[0]} ranks, {CONFIG} says {rank}; take both from one adapter"
        )
    sizes = {"E": rank, "magnitude_vector": inputs if embedding else outputs, "B.bias": outputs}
    for part, size in sizes.items():
        if part in found and math.prod(found[part].shape) != size:
            raise CheckpointError(
                f"{directory}: lora_{part} of {shown(name)} has {math.prod(found[part].shape)} values, not {size}; "
                "save the adapter again"
            )
    return LowRank(name, outputs, inputs, rank, ranks[0] // max(rank, 1), scale, found, weights, embedding)


def _rank_and_scale(directory: Path, config: Mapping[str, Any], name: str, stored: int) -> tuple[int, float]:
    """The rank of one matrix by the config, or AdaLoRA's as it is stored, and what B·A is multiplied by."""
    module = name.removesuffix(".weight")
    alpha = _number(directory, config, "alpha_pattern", "lora_alpha", module)
    if config["peft_type"] == "ADALORA":
        first = _number(directory, config, "", "init_r", module)
        return stored, alpha / (first + 1e-5)
    rank = int(_number(directory, config, "rank_pattern", "r", module))
    if rank > stored and stored:
        raise CheckpointError(
            f"{directory}: {shown(name)} has {stored} ranks, {CONFIG} says {rank}; take both from one adapter"
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _number(directory: Path, config: Mapping[str, Any], pattern: str, field: str, module: str) -> float:
    """A number of the config: of the first key of `pattern` that the module's name ends with, else that of `field`."""
    where, value = field, config.get(field)
    for key, own in (config.get(pattern) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{directory}: {CONFIG}: {pattern}: {shown(key)} is no pattern: {error}"
            ) from None
        if matches:
            where, value = f"{pattern} of {shown(key)}", own
            break
    whole = field != "lora_alpha"
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < 2**31:
        raise CheckpointError(
            f"{directory}: {CONFIG}: {where} is {shown(value)}, it must be a {'whole ' * whole}number above zero"
        )
    return value


def _tokens(module: str, config: Mapping[str, Any], tensor: TensorInfo) -> Tokens:
    """Rows of an embedding: which ones, the config says for all embeddings or for each by its name's end."""
    listed = config.get("trainable_token_indices")
    if isinstance(listed, dict):
        named = [rows for name, rows in listed.items() if f".{module}".endswith(f".{name}")]
        listed = named[0] if named else next(iter(listed.values()), None) if len(listed) == 1 else None
    good = isinstance(listed, list) and all(type(row) is int and row >= 0 for row in listed)
    if not good or len(tensor.shape) != 2 or tensor.rows != len(listed) or len(set(listed)) < len(listed):
        raise CheckpointError(
            f"{tensor.file}: {shown(tensor.name)} is {tensor.shape}, trainable_token_indices are {shown(listed)}; "
            "take both from one adapter"
        )
    return Tokens(f"{module}.weight", tuple(listed), tensor)
