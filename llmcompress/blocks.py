"""Running a model block by block, for all batches in lockstep, with one block's weights in memory.

The model's own `forward` runs once for each batch, inside a greenlet. Each decoder block's `forward` is replaced by
one that parks the call until the block's weights are there; so masks, rotary embeddings and whatever else a model
hands to its blocks pass through untouched, and no line here is about an architecture.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from llmcompress.block_weights import ModelState, PartWeights, Readable, WholeWeights, empty_model
from llmcompress.compute import PRECISIONS, MixedProducts, narrow_matrices
from llmcompress.errors import RunError
from llmcompress.hidden_states import HiddenStates

DEFAULT_HIDDEN_BYTES = 2**30


@dataclass
class _Arrival:
    """A call that waits at a block."""

    block: int
    args: tuple
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        return _hidden_of(self.args or tuple(self.kwargs.values()))


class Lockstep:
    """One model and the batches on their way through it.

    `start` brings every batch to the first block; `through` takes all of them through the next one; `finish` brings
    them out one after the other. A second `start` begins a new pass. Use it under `torch.no_grad()`.

    blocks: names of the decoder blocks, such as `model.layers.0`, in order. head: the output matrix's parameter, by
    the name that has a tensor in the checkpoint: the embedding's where they are tied.
    `weights` are read as they are needed, onto `device`. Hidden states beyond `hidden_bytes` bytes wait in a file. On a
    CPU as many batches run side by side as torch has threads, each in one, which is faster. Models that transformers
    loaded run one batch at a time: layers of bitsandbytes rearrange their weights in the first forward.
    """

    mixed = False  # whether products are of bfloat16, see MixedProducts

    def __init__(
        self, model: PreTrainedModel, weights: PartWeights | WholeWeights, device: torch.device,
        hidden_bytes: int = DEFAULT_HIDDEN_BYTES,
    ) -> None:  # fmt: skip
        self.model, self.weights, self.device = model, weights, device
        self._state = ModelState(model)
        side_by_side = device.type == "cpu" and isinstance(weights, PartWeights)
        self.workers = torch.get_num_threads() if side_by_side else 1
        self.blocks, modules = decoder_blocks(self.model)
        heads = self._owned_by(model.get_output_embeddings())
        own = {target.parameter for target in weights.targets.values()}
        self.head = min(heads & own or heads)
        self._hidden_bytes = hidden_bytes
        self._forwards = [module.forward for module in modules]
        for block, module in enumerate(modules):
            module.forward = self._parking(block)
        self._hub = getcurrent()
        self._calls: list[greenlet] = []
        self._moving: list[int] = []  # batches that go through the blocks
        self._rest: tuple | None = None  # what the last block returned behind its hidden states, if a tuple
        self._waiting: list[_Arrival | torch.Tensor] = []  # a block's output, once the last block is done
        self._packed: dict[int, torch.Tensor] = {}  # matrices of the block under way, see MixedProducts

    @classmethod
    def of(
        cls, checkpoint: Readable, dtype: torch.dtype, device: torch.device,
        hidden_bytes: int = DEFAULT_HIDDEN_BYTES, mixed: bool = False,
    ) -> Lockstep:  # fmt: skip
        """The model of a checkpoint, one part of it in memory at a time, in `dtype`; `mixed`, with the blocks'
        matrices in bfloat16. Raises CheckpointError."""
        model = empty_model(checkpoint.directory, dtype, device)
        if mixed:
            narrow_matrices(decoder_blocks(model)[1])
        lockstep = cls(model, PartWeights(model, checkpoint, device), device, hidden_bytes)
        lockstep.mixed = mixed
        return lockstep

    @property
    def precision(self) -> str:
        """What the model computes in: f32, bf16, f16 or mixed."""
        return "mixed" if self.mixed else PRECISIONS[self.model.dtype]

    def parameters_of(self, block: int) -> dict[str, nn.Parameter]:
        """The parameters and buffers of one block, by their full names."""
        inside = f"{self.blocks[block]}."
        return {name: value for name, value in self._state.items() if name.startswith(inside)}

    def start(self, batches: Sequence[torch.Tensor], copies: int = 0) -> None:
        """Run every batch, int64 (rows, tokens) without padding, up to the first block.

        `copies` of all of them wait there without hidden states, until `branch` brings them elsewhere. Batch b's are
        the batches b + len(batches), b + 2·len(batches), and so on.
        """
        self._hub = getcurrent()
        self._hidden = HiddenStates(self._hidden_bytes)
        self._calls = [greenlet(self._forward) for _ in range(len(batches) * (1 + copies))]
        self._moving = list(range(len(batches)))
        self._waiting = []
        with self.weights.loaded(self._entry()):
            for batch, call in enumerate(self._calls):
                tokens = batches[batch % len(batches)].to(self.device)
                self._waiting.append(self._arrived(batch, call.switch(tokens), 0))
                if batch >= len(batches):
                    self._hidden.release(batch)
                    hidden = self._waiting[batch].hidden
                    hidden.data = hidden.new_empty(0)

    @contextlib.contextmanager
    def loaded(self, block: int) -> Iterator[dict[str, nn.Parameter]]:
        """The block's parameters, holding their weights inside this context."""
        with self.weights.loaded(set(self.parameters_of(block))):
            yield self.parameters_of(block)

    def hidden(self, batch: int) -> torch.Tensor:
        """What a waiting batch brings to its next block, or brought out of the last: (rows, tokens, hidden)."""
        waiting = self._waiting[batch]
        hidden = waiting.hidden if isinstance(waiting, _Arrival) else _hidden_of(waiting)
        return hidden.to(self.device)

    def through(
        self,
        block: int,
        seen: Callable[[int, torch.Tensor], None] | None = None,
        watch: Callable[[int], contextlib.AbstractContextManager] | None = None,
    ) -> None:
        """Take every batch through `block`, whose weights are loaded, and on to the next.

        A batch runs inside `watch(batch)`, in a thread of its own; `seen(batch, output)` gets each output, (rows,
        tokens, hidden), here and in order.
        """
        self._packed = {}
        for batch, output in self._outputs(block, watch or (lambda batch: contextlib.nullcontext())):
            self._rest = None if isinstance(output, torch.Tensor) else tuple(output[1:])
            if seen:
                seen(batch, _hidden_of(output))
            if block + 1 < len(self.blocks):
                self._waiting[batch] = self._arrived(batch, self._calls[batch].switch(output), block + 1)
            else:  # what follows needs the head, and gives logits too large to hold for all
                self._hidden.keep(batch, _hidden_of(output))
                self._waiting[batch] = output
        self._packed = {}

    def visit(
        self,
        block: int,
        seen: Callable[[int, torch.Tensor], None] | None = None,
        watch: Callable[[int], contextlib.AbstractContextManager] | None = None,
        among: Iterable[int] | None = None,
    ) -> None:
        """As `through`, but every batch, or those `among` them, comes back to where it was, for the block to be run again
        with other weights."""
        self._packed = {}
        for batch, output in self._outputs(block, watch or (lambda batch: contextlib.nullcontext()), among):
            if seen:
                seen(batch, _hidden_of(output))

    def branch(self, block: int, copy: int, hidden: torch.Tensor) -> None:
        """Bring a waiting copy behind `block`, as if `hidden` were the output of that; from there it goes with the others.

        Raises RunError for models whose blocks hand on more than hidden states.
        """
        output = self._shaped(hidden)
        for passed in range(block + 1):
            if passed + 1 == len(self.blocks):
                self._hidden.keep(copy, hidden)
                self._waiting[copy] = output
            else:
                arrival = self._calls[copy].switch(output)
                if passed == block:
                    self._waiting[copy] = self._arrived(copy, arrival, block + 1)
        self._moving.append(copy)

    def _shaped(self, hidden: torch.Tensor) -> Any:
        """What a block returns, with `hidden` as its output."""
        if not self._rest:
            return hidden if self._rest is None else (hidden,)
        if any(isinstance(value, torch.Tensor) for value in self._rest):
            raise RunError(
                f"{type(self.model).__name__}: its blocks return more than hidden states; none can be left out of a run"
            )
        return (hidden, *self._rest)

    def _outputs(
        self,
        block: int,
        watch: Callable[[int], contextlib.AbstractContextManager],
        among: Iterable[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Batches and their outputs, in order, at most one more than there are workers under way."""
        batches = tuple(self._moving if among is None else among)
        if min(self.workers, len(batches)) < 2:
            for batch in batches:
                yield batch, self._run(block, self._fetched(batch), watch(batch))
            return
        with _one_thread_each(), ThreadPoolExecutor(self.workers) as pool:
            running: deque[tuple[int, Future]] = deque()
            for batch in batches:
                running.append((batch, pool.submit(self._run, block, self._fetched(batch), watch(batch))))
                if len(running) > self.workers:
                    done, output = running.popleft()
                    yield done, output.result()
            while running:
                done, output = running.popleft()
                yield done, output.result()

    @torch.no_grad()
    def _run(self, block: int, arrival: _Arrival, watch: contextlib.AbstractContextManager) -> Any:
        with MixedProducts(self._packed) if self.mixed else contextlib.nullcontext(), watch:
            return self._forwards[block](*arrival.args, **arrival.kwargs)

    def _fetched(self, batch: int) -> _Arrival:
        arrival = self._waiting[batch]
        self._hidden.fetch(arrival.hidden, self.device)
        return arrival

    def finish(self, batches: Iterable[int] | None = None) -> Iterator[torch.Tensor]:
        """The logits, (rows, tokens, vocabulary), of every batch in turn, or in the order given."""
        with self.weights.loaded(self._exit()):
            for batch in range(len(self._calls)) if batches is None else batches:
                yield self._logits(batch)  # no name here, which would hold them while the next are computed

    def finish_before_head(self, seen: Callable[[int, torch.Tensor], None]) -> None:
        """Hand the inputs of the output matrix, (rows, tokens, hidden), to `seen(batch, inputs)`; the matrix itself
        is neither read nor multiplied."""
        head = self.model.get_output_embeddings()
        forward = head.forward
        head.forward = self._stopping
        try:
            with self.weights.loaded(self._exit() - self._owned_by(head)):
                for batch, call in enumerate(self._calls):
                    seen(batch, call.switch(self._brought_out(batch)))
                    call.throw()  # ends the forward there
                    self._forget(batch)
        finally:
            head.forward = forward

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def _parking(self, block: int) -> Callable:
        def park(*args: Any, **kwargs: Any) -> Any:
            return self._hub.switch(_Arrival(block, args, kwargs))

        return park

    def _stopping(self, inputs: torch.Tensor) -> None:
        self._hub.switch(inputs)

    def _arrived(self, batch: int, arrival: Any, block: int) -> _Arrival:
        if not isinstance(arrival, _Arrival) or arrival.block != block:
            raise RunError(
                f"{self.blocks[block]}: {type(self.model).__name__} does not run its blocks one after the other, "
                "each once; it cannot be run block by block"
            )
        self._hidden.keep(batch, arrival.hidden)
        return arrival

    def _logits(self, batch: int) -> torch.Tensor:
        logits = self._calls[batch].switch(self._brought_out(batch))
        self._forget(batch)
        return logits

    def _brought_out(self, batch: int) -> Any:
        """What the last block gave."""
        output = self._waiting[batch]
        self._hidden.fetch(_hidden_of(output), self.device)
        return output

    def _forget(self, batch: int) -> None:
        self._waiting[batch] = self._calls[batch] = None
        self._hidden.release(batch)

    def _outside(self) -> set[str]:
        inside = tuple(f"{block}." for block in self.blocks)
        return {name for name in self._state if not name.startswith(inside)}

    def _entry(self) -> set[str]:
        """What lies outside the blocks, but for an output matrix of its own."""
        head = self._owned_by(self.model.get_output_embeddings())
        return self._outside() - (head - self._owned_by(self.model.get_input_embeddings()))

    def _exit(self) -> set[str]:
        """What lies outside the blocks, but for an embedding that is not the output matrix too."""
        embedding = self._owned_by(self.model.get_input_embeddings())
        return self._outside() - (embedding - {self.head})

    def _owned_by(self, module: nn.Module) -> set[str]:
        """Names of a module's parameters, with the other names of those that are tied."""
        own = {id(value) for value in module.state_dict(keep_vars=True).values()}
        return {name for name, value in self._state.items() if id(value) in own}


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's own operations run on one thread inside this context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decoder_blocks(model: PreTrainedModel) -> tuple[list[str], list[nn.Module]]:
    """The longest list of modules that lies in no other list; before all, one of as many as config.json counts layers."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outer:
        raise RunError(
            f"{type(model).__name__} has no list of decoder blocks; it cannot be run block by block"
        )
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    name, modules = max(outer, key=lambda found: (len(found[1]) == layers, len(found[1])))
    return [f"{name}.{block}" for block in range(len(modules))], list(modules)


def _hidden_of(output: Any) -> torch.Tensor:
    """The hidden states among a block's inputs or outputs: the first of them."""
    return output if isinstance(output, torch.Tensor) else output[0]
