"""The tokenizer in a GGUF as llama.cpp itself runs it, by ctypes on the C API that the xllamacpp wheel's shared object
exports.

`python -m llmcompress.llama_tokenizer FILE` reads texts from standard input and prints their ids: llama.cpp ends the
process that it finds no sense in a file in, so a file that is not trusted gets one of its own.
Declarations follow llama.h. A parameter struct is declared up to the last field set here and ends in spare room, since
llama.cpp adds fields at the end; defaults are checked before a field is set, so that a version with another layout fails
at once instead of misreading.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path

from llmcompress.errors import GGUFError

SPARE = c_uint32 * 128  # more than any version's tail: a struct passed by value may be larger than expected
PATIENCE = 600  # seconds


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("spare", SPARE),
    ]
    EXPECTED = {
        "n_gpu_layers": -1,
        "load_mode": -1,
        "lazy_mode": 1,
        "kv_overrides": None,
        "vocab_only": False,
        "check_tensors": False,
        "use_extra_bufts": True,
        "no_host": False,
        "load_mtp": False,
    }


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

SIGNATURES = {  # function: (result, arguments)
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}

log_lines: list[str] = []


@LogCallback
def keep_log(level: int, text: bytes, user_data: int | None) -> None:
    log_lines.append(text.decode(errors="replace"))


@functools.cache
def library() -> ctypes.CDLL:
    """The shared object with every function of SIGNATURES declared and the backend started. Raises GGUFError where
    xllamacpp is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise GGUFError(
            "comparing tokenizers runs llama.cpp's own, which is not installed: pip install xllamacpp"
        )
    loaded = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    declare(loaded, SIGNATURES)
    loaded.llama_log_set(keep_log, None)
    loaded.llama_backend_init()
    return loaded


def declare(loaded: ctypes.CDLL, signatures: dict) -> None:
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def checked_defaults(params: ctypes.Structure) -> ctypes.Structure:
    """The same. Raises GGUFError where its defaults are not llama.cpp's."""
    for field, expected in params.EXPECTED.items():
        found = getattr(params, field)
        if found != expected:
            raise GGUFError(
                f"{type(params).__name__}.{field} defaults to {found}, not {expected}: "
                "this xllamacpp has another struct layout; compare with its llama.h"
            )
    return params


class LlamaTokenizer:
    """A GGUF file opened by llama.cpp; its tokenizer alone by default. `load_mtp` also loads layers that draft.

    Raises GGUFError with llama.cpp's own log where it refuses the file.
    """

    def __init__(self, path: str | os.PathLike, vocab_only: bool = True, load_mtp: bool = False) -> None:
        self.lib = library()
        log_lines.clear()
        params = checked_defaults(self.lib.llama_model_default_params())
        params.vocab_only, params.load_mtp = vocab_only, load_mtp
        self._model = self.lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise GGUFError(f"llama.cpp does not load {path}:\n{''.join(log_lines)}")
        self._vocab = self.lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self.lib.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        if self._model:
            self.lib.llama_model_free(self._model)
        self._model = self._vocab = None

    def __enter__(self) -> LlamaTokenizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        encoded = text.encode()
        ids = (c_int32 * (len(encoded) + 8))()
        arguments = (add_special, parse_special)
        count = self.lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, len(ids), *arguments)
        if count < 0:  # the room needed, negated
            ids = (c_int32 * -count)()
            count = self.lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, len(ids), *arguments)
        return ids[:count]


def ids_of(path: str | os.PathLike, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
    """The ids of each text by a llama.cpp in another process. Raises GGUFError where it refuses the file or ends."""
    command = [sys.executable, "-m", "llmcompress.llama_tokenizer", os.fspath(path), str(int(add_special))]
    library()  # says what is missing
    try:
        done = subprocess.run(
            command, input=json.dumps(list(texts)), capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise GGUFError(f"{path}: llama.cpp's tokenizer is not done after {PATIENCE} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split())[-600:]
        raise GGUFError(
            f"{path}: llama.cpp's tokenizer ended with {done.returncode}: {said or 'nothing said'}"
        )
    return json.loads(done.stdout)


def main() -> None:
    path, add_special = sys.argv[1:]
    try:
        with LlamaTokenizer(path) as tokenizer:
            ids = [tokenizer.tokenize(text, add_special == "1") for text in json.load(sys.stdin)]
    except GGUFError as error:
        sys.exit(str(error))
    json.dump(ids, sys.stdout)


if __name__ == "__main__":
    main()
