"""What a model is run in."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmcompress import compute
from llmcompress.blocks import Lockstep
from llmcompress.checkpoint import Checkpoint
from llmcompress.compute import (
    DTYPES,
    MixedProducts,
    causal_attention,
    compute_device,
    is_plain_causal,
    narrow_matrices,
    precision_of,
)
from llmcompress.errors import LlmcompressError

CPU = torch.device("cpu")


def test_auto_is_mixed_where_bfloat16_is_stored_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_bfloat16_instructions", lambda: True)
    assert precision_of("auto", "cpu", "BF16") == "mixed"
    assert precision_of("auto", "cpu", "F16") == precision_of("auto", "cuda", "F32") == "f32"
    monkeypatch.setattr(compute, "_bfloat16_instructions", lambda: False)
    assert precision_of("auto", "cpu", "BF16") == "f32"
    assert precision_of("auto", "cuda", "BF16") == "mixed"
    assert all(precision_of(name, "cpu", "BF16") == name for name in DTYPES)
    with pytest.raises(LlmcompressError, match="did you mean 'mixed'"):
        precision_of("mixd", "cpu", "F32")


def test_a_device_that_is_not_there_is_one_line() -> None:
    assert compute_device("cpu") == CPU
    with pytest.raises(LlmcompressError, match="--device cuda:99"):
        compute_device("cuda:99")


PRODUCTS = {
    "linear": lambda x, w, b: functional.linear(x, w.T.contiguous()),
    "linear with bias": lambda x, w, b: functional.linear(x, w.T.contiguous(), b),
    "linear by name": lambda x, w, b: functional.linear(x, w.T.contiguous(), bias=b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "@": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "mm": lambda x, w, b: x.mm(w),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_of_bfloat16_and_the_rest_is_not(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((7, 64), (64, 32), (32,)))
    narrow = w.bfloat16()
    with MixedProducts():
        found = PRODUCTS[name](x, narrow, b)
        same = PRODUCTS[name](x, w, b)  # float32 matrices are left alone
    wanted = x.bfloat16().float() @ narrow.float() + (
        b if name in ("addmm",) or "bias" in name or "by name" in name else 0
    )
    assert found.dtype is torch.float32
    assert (found - wanted).abs().max() < 2**-8 * wanted.abs().max()
    assert torch.equal(same, PRODUCTS[name](x, w, b))


def test_a_changed_input_is_rounded_anew() -> None:
    x, w = torch.ones(2, 4), torch.eye(4).bfloat16()
    with MixedProducts():
        first = x @ w
        x.add_(1)
        second = x @ w
    assert torch.equal(second, first + 1)


def test_a_matrix_is_packed_once() -> None:
    x, w = torch.randn(3, 70, 64), torch.randn(32, 64).bfloat16()
    packed: dict[int, torch.Tensor] = {}
    with MixedProducts():
        wanted = functional.linear(x, w)
    for _ in range(2):
        with MixedProducts(packed):
            found = functional.linear(x, w)
    assert (found - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    assert list(packed) == [w.data_ptr()]
    with MixedProducts(packed):
        assert functional.linear(x[:, :0], w).shape == (3, 0, 32)


@pytest.mark.parametrize("tokens", [1, 64, 150])
@pytest.mark.parametrize("shared", [1, 3])
def test_causal_attention_is_that_of_torch(tokens: int, shared: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 6, tokens, 16, generator=generator)
    key, value = (torch.randn(2, 6 // shared, tokens, 16, generator=generator) for _ in range(2))
    options = {"is_causal": True, "enable_gqa": shared > 1, "scale": 20.0}  # large scores, as Qwen 2 has them
    wanted = functional.scaled_dot_product_attention(query, key, value, **options)
    with MixedProducts():
        found = functional.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(found, causal_attention(query, key, value, **options))
    assert (found - wanted).abs().max() < 2**-7 * value.abs().max()


def test_other_attention_is_left_to_torch() -> None:
    states = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    assert is_plain_causal(*states, is_causal=True, attn_mask=None, dropout_p=0.0, scale=None)
    assert not is_plain_causal(*states)
    assert not is_plain_causal(*states, is_causal=True, dropout_p=0.1)
    assert not is_plain_causal(*states, attn_mask=torch.ones(5, 5).bool())
    assert not is_plain_causal(states[0][:, :, :3], *states[1:], is_causal=True)
    assert not is_plain_causal(*(part.bfloat16() for part in states), is_causal=True)


def test_convolutions_and_vectors_stay_as_they_are() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Conv1d(2, 2, 3), torch.nn.LayerNorm(4))
    narrow_matrices([module])
    assert module[0].weight.dtype is torch.bfloat16 and module[0].bias.dtype is torch.float32
    assert module[1].weight.dtype is module[2].weight.dtype is torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
@torch.no_grad()
def test_a_mixed_model_is_near_the_float32_one(name: str, tiny) -> None:
    checkpoint = Checkpoint.open(tiny(name))
    batches = [torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(1))]
    logits = []
    for mixed in (False, True):
        lockstep = Lockstep.of(checkpoint, torch.float32, CPU, mixed=mixed)
        assert lockstep.precision == ("mixed" if mixed else "f32")
        lockstep.start(batches)
        for block in range(len(lockstep.blocks)):
            with lockstep.loaded(block) as parameters:
                held = {value.dtype for value in parameters.values() if value.ndim in (2, 3)}
                assert held == {torch.bfloat16 if mixed else torch.float32}
                lockstep.through(block)
        logits += lockstep.finish()
    difference = (logits[1] - logits[0]).abs()
    assert 0 < difference.mean() < 0.02 * (logits[0].max() - logits[0].min())
