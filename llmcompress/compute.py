"""The number type and the threads a model is run with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from llmcompress.errors import LlmcompressError, nearest
from llmcompress.freed_memory import keep_freed_memory
from llmcompress.machine import cores

# Of the hidden states; `mixed` holds matrices in bfloat16 and multiplies them so.
DTYPES = {"f32": torch.float32, "mixed": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class MixedProducts(TorchFunctionMode):
    """While active, float32 inputs of a bfloat16 matrix are rounded to bfloat16 for the product alone.

    What lies between the products, the residual stream above all, stays float32: on a model of 6 M weights sums of x²
    were 2.5 times nearer to float32's than with all in bfloat16, at 0.93 of the speed. Of causal attention the product
    with the values is one of bfloat16, too; scores, which may be large, are not. For one thread.

    `packed`, by storage, keeps matrices in the layout oneDNN multiplies, so that they are brought into it once and not
    for every batch, which takes 4 % of the time. Its owner drops it before any matrix changes.
    """

    def __init__(self, packed: dict[int, torch.Tensor] | None = None) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None
        self._packed = packed

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            inputs, weight, *bias = args
            if _mixed(inputs, weight):
                return _plus(self._product(inputs, weight), bias[0] if bias else kwargs.get("bias"))
        elif func is torch.addmm and _mixed(args[1], args[2]) and not kwargs:
            return _plus(self._rounded(args[1]) @ args[2], args[0])
        elif func in _PRODUCTS and len(args) > 1 and _mixed(args[0], args[1]):
            return func(self._rounded(args[0]), args[1]).float()
        elif func is functional.scaled_dot_product_attention and is_plain_causal(*args, **kwargs):
            with torch._C.DisableTorchFunction():
                return causal_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _product(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rounded = self._rounded(inputs)
        if self._packed is None or weight.device.type != "cpu" or not _PACKS or not rounded.numel():
            return functional.linear(rounded, weight)
        key = weight.data_ptr()
        if key not in self._packed:
            self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight, rounded.shape[:-1].numel())
        return torch.ops.mkldnn._linear_pointwise(rounded, self._packed[key], None, "none", [], "")

    def _rounded(self, inputs: torch.Tensor) -> torch.Tensor:
        """In bfloat16; that of q, k and v, which share it, once."""
        if self._last is None or self._last[0] is not inputs or self._last[1] != inputs._version:
            self._last = inputs, inputs._version, inputs.bfloat16()
        return self._last[2]


# Whether torch has the products of oneDNN with a matrix of its own layout, as its compiler calls them.
_PACKS = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
ATTENTION_ROWS = 64  # whose scores are made at once; 128 and 256 were slower


def is_plain_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *more: Any, **kwargs: Any
) -> bool:
    """Whether arguments of scaled_dot_product_attention ask for what `causal_attention` does: float32 on a CPU,
    (batch, heads, tokens, columns), every token seeing itself and all before it."""
    masked = kwargs.get("attn_mask") is not None or kwargs.get("dropout_p")
    if more or masked or not kwargs.get("is_causal") or query.ndim != 4:
        return False
    plain = query.device.type == "cpu" and query.dtype is key.dtype is value.dtype is torch.float32
    return plain and query.shape[2] == key.shape[2]


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None, **_: Any
) -> torch.Tensor:
    """Causal attention as scaled_dot_product_attention's, (batch, heads, tokens, columns), float32, with softmax and
    values rounded to bfloat16 for their product; on a CPU 1.3 times as fast. Fewer heads of `key` and `value` are
    shared by as many of `query` each."""
    batch, heads, tokens, columns = query.shape
    shared = heads // key.shape[1]
    query = (query * (columns**-0.5 if scale is None else scale)).reshape(-1, tokens, columns)
    key, value = (
        states.repeat_interleave(shared, 1).reshape(batch * heads, tokens, -1) for states in (key, value)
    )
    value = value.bfloat16()
    later = torch.full((ATTENTION_ROWS, ATTENTION_ROWS), float("-inf")).triu(1)
    output = query.new_empty(batch * heads, tokens, value.shape[-1])
    for first in range(0, tokens, ATTENTION_ROWS):
        past = min(first + ATTENTION_ROWS, tokens)
        scores = query[:, first:past] @ key[:, :past].mT
        scores[:, :, first:] += later[: past - first, : past - first]
        output[:, first:past] = scores.softmax(-1).bfloat16() @ value[:, :past]
    return output.view(batch, heads, tokens, -1)


_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


def _mixed(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    return inputs.dtype is torch.float32 and weight.dtype is torch.bfloat16


def _plus(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product.float() if bias is None else product.float().add_(bias)


def narrow_matrices(modules: Iterable[nn.Module]) -> None:
    """Make bfloat16 of all matrices of modules on the meta device, but for those of convolutions."""
    for module in modules:
        for part in module.modules():
            if not isinstance(part, nn.modules.conv._ConvNd):
                for parameter in part.parameters(recurse=False):
                    if parameter.ndim in (2, 3):
                        parameter.data = parameter.data.bfloat16()


def precision_of(asked: str, device: str, stored: str) -> str:
    """What to compute in, a key of DTYPES. `auto` is `mixed` where the weights are stored in bfloat16 (`stored` is
    BF16) and the device has instructions for it, which on two cores with AVX512-BF16 were 2.2 times as fast; else f32.

    Raises LlmcompressError for a name that is none.
    """
    if asked == "auto":
        return "mixed" if stored == "BF16" and fast_bfloat16(device) else "f32"
    if asked not in DTYPES:
        raise LlmcompressError(
            f"--dtype {asked}: is none of auto, {', '.join(DTYPES)}{nearest(asked, DTYPES)}"
        )
    return asked


def compute_device(asked: str) -> torch.device:
    """The device called `asked`; `auto` is the first GPU there is, else the CPU with all cores we may use.

    Raises LlmcompressError for one that is not there.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # "meta" makes tensors, but of no values
    except (RuntimeError, AssertionError) as error:
        raise LlmcompressError(f"--device {asked}: {' '.join(str(error).split())[:200]}") from None
    if device.type == "cpu":
        torch.set_num_threads(cores())
        keep_freed_memory()
    return device


def fast_bfloat16(device: str) -> bool:
    """Whether a device, cpu or another, is faster in bfloat16 than in float32."""
    return device != "cpu" or _bfloat16_instructions()


def _bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 by AVX512-BF16 or AMX."""
    checks: list[Any] = [
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    ]
    return any(check() for check in checks if check)
