"""The lockstep runner against the plain forward of transformers, for every tiny architecture."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FUSED, MODELS

from llmcompress.block_weights import WholeWeights
from llmcompress.blocks import Lockstep
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError, RunError
from llmcompress.hidden_states import HiddenStates
from llmcompress.linear_inputs import LinearInputs

# Full attention, sliding windows, learned positions, both expert layouts; tied and untied heads.
QUICK = ("llama", "llama-tied", "gemma3", "gpt2", "mixtral-fused", "qwen3moe")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*MODELS, *(f"{name}-fused" for name in FUSED))
]
CPU = torch.device("cpu")

Tiny = Callable[[str], Path]


def batches(vocabulary: int) -> list[torch.Tensor]:
    """Of unequal length, longer than the sliding windows of 16."""
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, shape, generator=chance) for shape in ((2, 40), (1, 17), (3, 64))]


def plain(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def lockstep_of(checkpoint: Checkpoint, hidden_bytes: int = 2**30) -> Lockstep:
    return Lockstep.of(checkpoint, torch.float32, CPU, hidden_bytes)


def through_all(lockstep: Lockstep, given: list[torch.Tensor]) -> None:
    lockstep.start(given)
    for block in range(len(lockstep.blocks)):
        with lockstep.loaded(block):
            lockstep.through(block)


def in_memory(lockstep: Lockstep) -> set[str]:
    return {name for name, value in lockstep.model.named_parameters() if not value.is_meta}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands that other tests run in this process set torch's threads, in which sums and their order would differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_plain_forward(name: str, tiny: Tiny) -> None:
    model = plain(tiny(name))
    given = batches(model.config.vocab_size)
    wanted = [model(tokens).logits for tokens in given]
    for hidden_bytes in (2**30, 0):
        lockstep = lockstep_of(Checkpoint.open(tiny(name)), hidden_bytes)
        assert lockstep.weights.ignored == []
        for _ in range(2):  # a second start is a new pass
            through_all(lockstep, given)
            found = list(lockstep.finish())
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert in_memory(lockstep) == set()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_of_every_block_is_seen_while_only_its_block_is_in_memory(name: str, tiny: Tiny) -> None:
    lockstep = lockstep_of(Checkpoint.open(tiny(name)))
    given = batches(lockstep.model.config.vocab_size)
    lockstep.start(given)
    for block in range(len(lockstep.blocks)):
        with lockstep.loaded(block) as parameters:
            assert in_memory(lockstep) == {key for key in parameters if "buffer" not in key}
            with LinearInputs(parameters) as inputs:
                lockstep.through(block)
            assert set(inputs.sums) == {key for key, value in parameters.items() if value.ndim > 1}
    list(lockstep.finish())


def test_the_callers_random_numbers_are_not_touched(tiny: Tiny) -> None:
    folder = tiny("llama")  # made with numbers of its own where no test has asked for it before
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        through_all(lockstep_of(Checkpoint.open(folder)), batches(512))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


class Counted(Checkpoint):
    """Counts how often a tensor is read."""

    def read(self, name: str, *rows: int) -> np.ndarray:
        self.reads[name] += 1
        return super().read(name, *rows)


def counted(folder: Path) -> Counted:
    checkpoint = Counted.open(folder)
    checkpoint.reads = Counter()
    return checkpoint


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head"), [("llama", "lm_head.weight"), ("llama-tied", "model.embed_tokens.weight")]
)
def test_weights_are_read_once_a_pass(name: str, head: str, tiny: Tiny) -> None:
    checkpoint = counted(tiny(name))
    lockstep = lockstep_of(checkpoint)
    assert lockstep.head == head
    through_all(lockstep, batches(512))
    list(lockstep.finish())
    inside = {key: checkpoint.reads[key] for key in checkpoint.index if key.startswith("model.layers.")}
    assert set(inside.values()) == {1}
    assert checkpoint.reads[head] == (2 if name == "llama-tied" else 1)  # as embedding, and as head


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_inputs_of_the_head_come_without_the_head(name: str, tiny: Tiny) -> None:
    model, checkpoint = plain(tiny(name)), counted(tiny(name))
    given = batches(512)
    wanted: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: wanted.append(inputs[0]))
    for tokens in given:
        model(tokens)
    lockstep = lockstep_of(checkpoint)
    through_all(lockstep, given)
    before = checkpoint.reads[lockstep.head]
    found: dict[int, torch.Tensor] = {}
    lockstep.finish_before_head(lambda batch, inputs: found.update({batch: inputs.clone()}))
    assert all(torch.equal(found[batch], inputs) for batch, inputs in enumerate(wanted))
    assert checkpoint.reads[lockstep.head] == before and in_memory(lockstep) == set()
    through_all(lockstep, given)  # the head is as it was
    assert [logits.shape[:2] for logits in lockstep.finish()] == [tokens.shape for tokens in given]


@torch.no_grad()
def test_outputs_of_a_block_can_be_seen(tiny: Tiny) -> None:
    model = plain(tiny("llama"))
    given = batches(512)
    wanted = [model(tokens, output_hidden_states=True).hidden_states for tokens in given]
    lockstep = lockstep_of(Checkpoint.open(tiny("llama")), 0)
    lockstep.start(given)
    assert all(torch.equal(lockstep.hidden(batch), states[0]) for batch, states in enumerate(wanted))
    seen: dict[int, torch.Tensor] = {}
    with lockstep.loaded(0):
        lockstep.through(0, lambda batch, output: seen.update({batch: output.clone()}))
    assert all(torch.equal(seen[batch], states[1]) for batch, states in enumerate(wanted))
    assert all(torch.equal(lockstep.hidden(batch), states[1]) for batch, states in enumerate(wanted))


@torch.no_grad()
def test_a_model_that_is_in_memory_runs_too(tiny: Tiny) -> None:
    given = batches(512)
    wanted = [plain(tiny("llama"))(tokens).logits for tokens in given]
    lockstep = Lockstep(plain(tiny("llama")), WholeWeights(), CPU)
    through_all(lockstep, given)
    assert all(torch.equal(*pair) for pair in zip(lockstep.finish(), wanted, strict=True))


@torch.no_grad()
def test_blocks_out_of_order_are_refused(tiny: Tiny) -> None:
    lockstep = lockstep_of(Checkpoint.open(tiny("llama")))
    lockstep.model.model.layers = torch.nn.ModuleList(reversed(lockstep.model.model.layers))
    with pytest.raises(RunError, match="model.layers.0: LlamaForCausalLM does not run its blocks one after"):
        lockstep.start(batches(512))
    assert in_memory(lockstep) == set()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(RunError, match="Linear has no list of decoder blocks"):
        Lockstep(torch.nn.Linear(2, 2), WholeWeights(), CPU)


def changed(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | config))
    return to


@pytest.mark.parametrize(
    "config",
    [{"model_type": "no-such-model"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "none"},
     {"vocab_size": -1}, {"hidden_size": 2**70}],
)  # fmt: skip
def test_a_config_that_builds_no_model_is_one_line(config: dict, tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "tiny", **config)
    with pytest.raises(CheckpointError) as raised:
        lockstep_of(Checkpoint.open(folder))
    assert str(raised.value).startswith(f"{folder}: transformers ") and "\n" not in str(raised.value)


@torch.no_grad()
def test_a_missing_or_misshapen_tensor_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "tiny")
    whole = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for tensors, message in (
        ({name: value for name, value in whole.items() if name != key}, f"nothing for {key}"),
        (whole | {key: whole[key][:5].clone()}, rf"{key} is \(5, 256\), config.json makes it \(512, 256\)"),
    ):
        save_file(tensors, folder / "model.safetensors")
        lockstep = lockstep_of(Checkpoint.open(folder))
        lockstep.start(batches(512))
        with lockstep.loaded(0):
            lockstep.through(0)
        with pytest.raises(CheckpointError, match=message), lockstep.loaded(1):
            pass
        assert in_memory(lockstep) == set()


def test_hidden_states_spill_beyond_the_bound_and_come_back(tmp_path: Path) -> None:
    states = HiddenStates(2 * 4096, tmp_path)
    values = [torch.full((2, 512), float(number)) for number in range(4)]  # 4 KiB each
    kept = [states.keep(batch, value.clone()) for batch, value in enumerate(values)]
    assert states.spilled == 2 * 4096
    assert all(torch.equal(*pair) for pair in zip(kept, values))
    states.release(0)
    states.keep(3, values[3].clone())  # now fits in memory
    assert states.spilled == 4096
    half = torch.randn(3, 5).to(torch.bfloat16)
    assert torch.equal(HiddenStates(0, tmp_path).keep(0, half.clone()), half)
    assert list(tmp_path.iterdir()) == []  # the files have no name


def test_a_hidden_state_that_a_model_goes_on_using_keeps_its_values(tmp_path: Path) -> None:
    """Some models bring the first block's input to later ones, too."""
    states = HiddenStates(0, tmp_path)
    first = states.keep(0, torch.zeros(2, 512))
    second = states.keep(0, torch.ones(2, 512))
    assert first.sum() == 0 and second.sum() == 1024
    states.release(0)
    assert second.sum() == 1024


@pytest.mark.parametrize("folder", ["none", "full"])
def test_a_disk_that_refuses_hidden_states_is_one_line(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder == "full":
        full = open("/dev/full", "wb")  # takes no byte, as a full disk
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: full)
    with pytest.raises(RunError, match="4.0 KiB of hidden states cannot be written .*; name a folder"):
        HiddenStates(0, tmp_path / "none").keep(0, torch.zeros(2, 512))
