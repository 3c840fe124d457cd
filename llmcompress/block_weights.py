"""A transformers model without weights, and its weights from a checkpoint, a part at a time.

The model is built on torch's meta device. A part (a decoder block, or what lies outside the blocks) gets its
parameters through transformers' own conversions (`core_model_loading`), so fused experts and renamed tensors of
any version arrive as its modelling code wants them, and gives them back when the part is done.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from torch import nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from llmcompress.errors import CheckpointError, shown
from llmcompress.freed_memory import hand_back_memory
from llmcompress.tensor_info import TensorInfo

transformers.utils.logging.disable_progress_bar()  # one would run for every block


class Readable(Protocol):
    """What weights are read from: a Checkpoint, or a GGUF decoded back to one."""

    directory: Path
    index: dict[str, TensorInfo]

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Target:
    """Where a checkpoint's tensor goes: a parameter, and which of its stacked matrices. `whole`: the tensor is the
    parameter as it stands."""

    parameter: str
    matrix: int = 0
    whole: bool = False


class ModelState(Mapping[str, torch.Tensor]):
    """The parameters and persistent buffers of a model as they are at the moment, by name.

    `state_dict` walks over all modules, which took a quarter of the time of loading a block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[dict, str]] = {}
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= model.named_buffers(remove_duplicate=False)
        kept = model.state_dict(keep_vars=True)
        for name in filter(tensors.__contains__, kept):
            module, _, own = name.rpartition(".")
            owner = model.get_submodule(module)
            self._places[name] = (owner._buffers if own in owner._buffers else owner._parameters, own)

    def __getitem__(self, name: str) -> torch.Tensor:
        owner, own = self._places[name]
        return owner[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def put(self, name: str, value: torch.Tensor) -> None:
        owner, own = self._places[name]
        owner[own] = value


def empty_model(directory: Path, dtype: torch.dtype, device: torch.device) -> transformers.PreTrainedModel:
    """The model of a directory's config.json on the meta device, in eval mode; what is computed lies on `device`.

    Experts are run one after the other, so that every expert's inputs can be told apart. Raises CheckpointError.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation="eager"
            )
    except Exception as error:  # every model checks its config in its own way, few of them with care
        raise CheckpointError(
            f"{directory}: transformers {transformers.__version__} cannot build this model: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    with torch.random.fork_rng():  # initialising must not disturb the caller's random numbers
        for name, buffer in list(model.named_non_persistent_buffers()):
            module, _, own = name.rpartition(".")
            model.get_submodule(module)._buffers[own] = torch.empty_like(buffer, device=device)
        model.initialize_weights()
    return model.eval()


class PartWeights:
    """The parameters of a meta model, loaded and dropped by part.

    targets: for every tensor of the checkpoint that the model uses, the parameter it becomes (a part of).
    ignored: tensors of the checkpoint that the model has no place for.
    Not safe from several threads at once.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, checkpoint: Readable, device: torch.device
    ) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.state = ModelState(model)
        self._mapping = get_model_conversion_mapping(model)
        self.targets, self.ignored = self._match()
        self._tied = self._ties()
        self._loaded: dict[str, nn.Parameter] = {}  # what stood on the meta device, by name

    def sources(self, parameter: str) -> list[str]:
        """The checkpoint's tensors that `parameter` is made of."""
        return [name for name, target in self.targets.items() if target.parameter == parameter]

    @contextlib.contextmanager
    def loaded(self, parameters: set[str]) -> Iterator[None]:
        """The given parameters (and persistent buffers) hold the checkpoint's weights inside this context."""
        try:
            self.load(parameters)
            yield
        finally:
            self.drop()

    def load(self, parameters: set[str]) -> None:
        """Read `parameters` from the checkpoint. Raises CheckpointError for one that the checkpoint lacks."""
        places = {other for name in parameters for other in self.tied(name)}
        self._loaded |= {name: self.state[name] for name in places}
        sources = {name: target for name, target in self.targets.items() if target.parameter in parameters}
        for name, target in sources.items():
            if target.whole:
                self._put_whole(target.parameter, self._tensor(name))
        self._convert({name: self._tensor(name) for name, target in sources.items() if not target.whole})
        for name in {target.parameter for target in sources.values()}:
            for other in self.tied(name) - {name}:
                self.state.put(other, self.state[name])
        self._require(parameters)

    def _put_whole(self, name: str, values: torch.Tensor) -> None:
        """Most tensors; transformers' machinery for the others takes as long as reading them."""
        # A copy in torch's own memory, which is aligned: where it is not, products may differ in their last bit.
        values = torch.empty_like(self.state[name], device=self.device).copy_(values)
        parameter = isinstance(self.state[name], nn.Parameter)
        self.state.put(name, nn.Parameter(values, requires_grad=False) if parameter else values)

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Let transformers make parameters of `tensors`. Raises CheckpointError for shapes that do not fit."""
        if not tensors:
            return
        config = LoadStateDictConfig(
            weight_mapping=self._mapping,
            device_map={"": str(self.device)},
            dtype=self.model.dtype,
        )
        with _quiet(self.model):
            info, _ = core_model_loading.convert_and_load_state_dict_in_model(
                self.model, tensors, config, None
            )
        for name, found, wanted in info.mismatched_keys:
            raise CheckpointError(
                f"{self.checkpoint.directory}: {name} is {tuple(found)}, config.json makes it {tuple(wanted)}"
            )
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{self.checkpoint.directory}: {name} cannot be assembled: {shown(error)}")

    def drop(self) -> None:
        """Put what was loaded back to the meta device, which frees its memory."""
        for name, parameter in self._loaded.items():
            self.state.put(name, parameter)
        self._loaded = {}
        hand_back_memory()

    def tied(self, parameter: str) -> set[str]:
        """All names of a parameter, its own among them."""
        return self._tied[parameter]

    def _ties(self) -> dict[str, set[str]]:
        """Names of one and the same parameter. A name that has a tensor of its own is not tied: it may differ."""
        own = {target.parameter for target in self.targets.values()}
        names: dict[int, set[str]] = {}
        for name, value in self.state.items():
            names.setdefault(id(value), set()).add(name)
        tied: dict[str, set[str]] = {}
        for group in names.values():
            first = min(group & own, default=min(group))
            for name in (group & own) - {first}:
                self.state.put(name, nn.Parameter(torch.empty_like(self.state[name]), requires_grad=False))
                group.remove(name)
                tied[name] = {name}
            tied |= {name: group for name in group}
        return tied

    def _require(self, parameters: set[str]) -> None:
        missing = sorted(name for name in parameters if self.state[name].is_meta)
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.directory}: the checkpoint has nothing for {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; is a shard missing?"
            )

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.index[name]
        values = torch.from_numpy(self.checkpoint.read(name))
        return (values.view(torch.bfloat16) if tensor.dtype == "BF16" else values).view(tensor.shape)

    def _match(self) -> tuple[dict[str, Target], list[str]]:
        """Every tensor of the checkpoint's place, by the renamings and converters transformers loads with."""
        renamings = [entry for entry in self._mapping if isinstance(entry, core_model_loading.WeightRenaming)]
        converters = [
            entry for entry in self._mapping if isinstance(entry, core_model_loading.WeightConverter)
        ]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets: dict[str, Target] = {}
        ignored: list[str] = []
        stacked: dict[tuple[str, str | None], int] = {}
        for name in sorted(self.checkpoint.index, key=_natural):
            renamed, pattern = core_model_loading.rename_source_key(
                name, renamings, converters, prefix, state
            )
            if renamed not in state:
                renamed, pattern = core_model_loading.rename_source_key(name, [], [], prefix, state)
            if renamed not in state:
                ignored.append(name)
                continue
            place = stacked.get((renamed, pattern), 0)
            stacked[renamed, pattern] = place + 1
            whole = not pattern and list(state[renamed].shape) == list(self.checkpoint.index[name].shape)
            targets[name] = Target(renamed, place, whole)
        return targets, ignored


class WholeWeights:
    """The weights of a model that is in memory as a whole: there is nothing to load."""

    targets: Mapping[str, Target] = {}
    ignored: Sequence[str] = ()

    @contextlib.contextmanager
    def loaded(self, parameters: set[str]) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _quiet(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Loading prints nothing, and remembers nothing of its conversions on the model."""
    logger = transformers.utils.logging.get_logger("transformers")
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def _natural(name: str) -> list[int | str]:
    """Sorts expert 10 behind expert 9, as transformers does when it stacks them."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
