"""The tensors that a PyTorch pickle describes, found without unpickling it.

A pickle is a program for a small stack machine, and Python's own machine can be made to call anything.
This one knows the opcodes that `torch.save` writes for dictionaries of tensors, works on plain values,
and stands for five functions with a line each; it imports and calls nothing.

Sources: Python's pickletools.py for the opcodes; torch/serialization.py (`persistent_id`) and
torch/_utils.py (`_rebuild_*`) for the functions and their arguments.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import CheckpointError, shown
from llmcompress.tensor_info import is_shape, is_size

_STORAGES = {
    "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
# Element types without a storage class of their own.
_DTYPES = {
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip
_FUNCTIONS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
_GLOBALS = _FUNCTIONS | _STORAGES.keys() | _DTYPES.keys()

_PUSH_ARGUMENT = {
    "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
}  # fmt: skip
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Storage:
    """A flat run of elements, kept in the archive under `key`."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; `offset` and `strides` count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


def read_pickle(program: bytes, where: str) -> Any:
    """What the pickle describes: dictionaries, lists and tuples of plain values and StoredTensor.

    `where` begins the message of the CheckpointError that is raised for an opcode or a global that weights
    do not need, and for a program that is broken."""
    machine = _Machine(where)
    try:
        for opcode, argument, _ in pickletools.genops(program):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"{where}: broken pickle ({shown(str(error))}); fetch it again") from error


class _Machine:
    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # a dict: the index is the file's, and an array would grow to hold it

    def step(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if opcode in _PUSH_ARGUMENT:
            return push(argument)
        if opcode in _PUSH_CONSTANT:
            return push(_PUSH_CONSTANT[opcode])
        if opcode in _TUPLES:
            return push(tuple(reversed([pop() for _ in range(_TUPLES[opcode])])))
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "APPEND":
                self._extend([pop()])
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                self._update([pop(), pop()][::-1])
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "GLOBAL":
                push(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                push(self._global(*[pop(), pop()][::-1]))
            case "BINPERSID":
                push(self._storage(pop()))
            case "REDUCE":
                push(self._call(*[pop(), pop()][::-1]))
            case "BUILD":
                self._ignore_state(pop())
            case _:
                raise self._refused(f"opcode {opcode}")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {what} has no place in a file of weights, and pickled code is never run; "
            "save the weights as safetensors"
        )

    def _pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise self._refused("appending to what is no list")
        self.stack[-1].extend(values)

    def _update(self, keys_and_values: list[Any]) -> None:
        target, keys = self.stack[-1], keys_and_values[::2]
        # Only these keys: the hash of nested tuples can be made to take for ever.
        if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in keys):
            raise self._refused("a dictionary with keys other than words and numbers")
        if target.keys() & set(keys) or len(set(keys)) < len(keys):
            raise self._refused("a dictionary with one key twice")
        target.update(zip(keys, keys_and_values[1::2], strict=True))

    def _global(self, module: Any, name: Any) -> _Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._refused("a global without a name")
        if f"{module}.{name}" not in _GLOBALS:
            raise self._refused(f"global {shown(f'{module}.{name}')}")
        return _Global(f"{module}.{name}")

    def _storage(self, identity: Any) -> Storage:
        match identity:
            case ("storage", _Global(name), str(key), str(), size) if name in _STORAGES and is_size(size):
                return Storage(key, _STORAGES[name], size)
        raise self._refused("a persistent id that is no storage")

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else "a value that is no function"
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, _, _):
                return tensor
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, _, _):
                return self._tensor(storage, storage.dtype, offset, shape, strides)
            case (
                "torch._utils._rebuild_tensor_v3",
                (Storage() as storage, offset, shape, strides, _, _, _Global(dtype)),
            ) if dtype in _DTYPES:
                return self._tensor(storage, _DTYPES[dtype], offset, shape, strides)
        raise self._refused(f"calling {name} with other arguments than torch.save writes")

    def _tensor(self, storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> StoredTensor:
        if not (is_size(offset) and is_shape(shape) and is_shape(strides) and len(shape) == len(strides)):
            raise self._refused("a tensor whose offset, shape and strides do not fit together")
        return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))

    def _ignore_state(self, state: Any) -> None:
        """`nn.Module.state_dict` hangs `_metadata`, the versions of its modules, on its OrderedDict."""
        if not isinstance(self.stack[-1], dict) or not isinstance(state, dict):
            raise self._refused("the state of an object")
