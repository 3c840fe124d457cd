"""The real llama.cpp and ggml, for tests: more of the C API that llmcompress/llama_tokenizer.py takes a tokenizer from.

Declarations follow llama.h and ggml.h, and its rules.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import numpy as np

from llmcompress import llama_tokenizer
from llmcompress.llama_tokenizer import SPARE, LlamaTokenizer, checked_defaults, declare, log_lines

GGML_F32, GGML_F16 = 0, 1
FLASH_ATTENTION_OFF, FLASH_ATTENTION_AUTO = 0, -1
THREADS = 2


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("spare", SPARE),
    ]
    EXPECTED = {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "attention_type": -1,
        "flash_attn_type": FLASH_ATTENTION_AUTO,
        "rope_freq_base": 0.0,
        "yarn_beta_slow": -1.0,
        "yarn_orig_ctx": 0,
        "defrag_thold": -1.0,
        "cb_eval_user_data": None,
        "type_k": GGML_F16,
        "type_v": GGML_F16,
    }


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    ]


SIGNATURES = {  # function: (result, arguments)
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_free": (None, [c_void_p]),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, c_size_t]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_blck_size": (c_int64, [c_int]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The shared object with these functions declared, too."""
    loaded = llama_tokenizer.library()
    declare(loaded, SIGNATURES)
    return loaded


class Ggml:
    """ggml's own quantizers and decoders. `ggml_type` is ggml's type id."""

    def __init__(self) -> None:
        self.lib = library()

    def quantize(self, x: np.ndarray, ggml_type: int, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 `(rows, columns)`, importance `(columns,)` -> uint8 `(rows, row_bytes)`."""
        x = np.ascontiguousarray(x, np.float32)
        rows, columns = x.shape
        self._check_columns(ggml_type, columns)
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (columns,):
                raise ValueError(f"importance has shape {importance.shape}, the weights {x.shape}")
        elif self.lib.ggml_quantize_requires_imatrix(ggml_type):
            raise ValueError(f"{self.name(ggml_type)} needs an importance vector")
        out = np.empty((rows, self.lib.ggml_row_size(ggml_type, columns)), np.uint8)
        vector = None if importance is None else importance.ctypes.data
        source, target = x.ctypes.data, out.ctypes.data
        written = self.lib.ggml_quantize_chunk(ggml_type, source, target, 0, rows, columns, vector)
        if written != out.nbytes:
            raise RuntimeError(f"ggml wrote {written} bytes of {out.nbytes}")
        return out

    def dequantize(self, data: np.ndarray, ggml_type: int, columns: int) -> np.ndarray:
        """uint8 `(rows, row_bytes)` -> float32 `(rows, columns)`, for each block type ggml can decode."""
        data = np.ascontiguousarray(data, np.uint8)
        self._check_columns(ggml_type, columns)
        row_bytes = self.lib.ggml_row_size(ggml_type, columns)
        if data.ndim != 2 or data.shape[1] != row_bytes:
            raise ValueError(f"{self.name(ggml_type)}: shape {data.shape}, but a row is {row_bytes} bytes")
        decode = getattr(self.lib, f"dequantize_row_{self.name(ggml_type)}")
        decode.restype, decode.argtypes = None, [c_void_p, c_void_p, c_int64]
        out = np.empty((len(data), columns), np.float32)
        decode(data.ctypes.data, out.ctypes.data, out.size)
        return out

    def name(self, ggml_type: int) -> str:
        """ggml's own spelling: "q4_K", "iq4_xs"."""
        return self.lib.ggml_type_name(ggml_type).decode()

    def _check_columns(self, ggml_type: int, columns: int) -> None:
        # ggml asserts this and takes the whole process with it
        block = self.lib.ggml_blck_size(ggml_type)
        if columns % block:
            raise ValueError(f"{self.name(ggml_type)}: {columns} columns are not a multiple of {block}")


class Model(LlamaTokenizer):
    """A GGUF file opened by llama.cpp; computes with an F32 cache and without flash attention.

    Raises GGUFError with llama.cpp's own log where it refuses the file. With `vocab_only` just the
    tokenizer and the metadata work.
    """

    def __init__(self, path: str | os.PathLike, context: int = 512, vocab_only: bool = False) -> None:
        library()
        self.context_size = context
        self._context = None
        super().__init__(path, vocab_only)
        if not vocab_only:
            self._open_context()

    def _open_context(self) -> None:
        params = checked_defaults(self.lib.llama_context_default_params())
        params.n_ctx = params.n_batch = params.n_ubatch = self.context_size
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = GGML_F32
        self._context = self.lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise RuntimeError(f"llama.cpp makes no context:\n{''.join(log_lines)}")
        self.lib.llama_set_n_threads(self._context, THREADS, THREADS)

    def close(self) -> None:
        if self._context:
            self.lib.llama_free(self._context)
        self._context = None
        super().close()

    def use_adapter(self, path: str | os.PathLike | None, scale: float = 1.0) -> None:
        """Compute with a LoRA in a GGUF from here on, with none for None. It is freed with the model."""
        adapters = []
        if path is not None:
            log_lines.clear()
            adapters = [self.lib.llama_adapter_lora_init(self._model, os.fsencode(path))]
            if not adapters[0]:
                raise RuntimeError(f"llama.cpp does not load {path}:\n{''.join(log_lines)}")
        handles, scales = (c_void_p * 1)(*adapters), (c_float * 1)(scale)
        if self.lib.llama_set_adapters_lora(self._context, handles, len(adapters), scales):
            raise RuntimeError(f"llama.cpp does not use {path}:\n{''.join(log_lines)}")

    @property
    def description(self) -> str:
        """Architecture, size and file type: "llama 8B Q4_K - Medium"."""
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode()

    def meta(self, key: str) -> str | None:
        """A metadata value as llama.cpp prints it, or None where the file lacks the key."""
        size = self.lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self.lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def detokenize(
        self, ids: Sequence[int], remove_special: bool = False, unparse_special: bool = True
    ) -> str:
        tokens = (c_int32 * len(ids))(*ids)
        arguments = (remove_special, unparse_special)
        buffer = ctypes.create_string_buffer(16 * len(ids) + 16)
        count = self.lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, len(buffer), *arguments)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self.lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, len(buffer), *arguments)
        return buffer.raw[:count].decode(errors="replace")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits after each position, float32 `(len(ids), n_vocab)`."""
        if not self._context:
            raise RuntimeError("opened with vocab_only, or closed: there is nothing to compute with")
        if not 0 < len(ids) <= self.context_size:
            raise ValueError(f"{len(ids)} ids in a context of {self.context_size}")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = int(token), position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1
        status = self.lib.llama_decode(self._context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}:\n{''.join(log_lines[-20:])}")
        flat = self.lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(flat, (len(ids), self.n_vocab)).copy()

    def perplexity(self, ids: Sequence[int]) -> float:
        """exp of the mean negative log likelihood of ids[1:], in one window."""
        logits = self.logits(ids)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), np.asarray(ids[1:])]
        return float(np.exp(np.mean(np.log(np.exp(logits).sum(axis=1)) - chosen)))

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` ids that follow, each the likeliest after all before it."""
        sequence = list(ids)
        for _ in range(n):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(ids) :]
