"""What the user asked for. Every flag of the command line is short for a field here.

A recipe can be kept in a YAML file; the one that made a GGUF is stored inside it under `llmcompress.recipe`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import RecipeError, nearest
from llmcompress.filetypes import TypeOverrides, find_file_type
from llmcompress.grids.effort import check_effort
from llmcompress.grids.integer import BITS, GROUPS
from llmcompress.methods import METHODS
from llmcompress.sizes import parse_count, parse_size

if TYPE_CHECKING:
    from llmcompress.methods.joint import Pruning

SOURCE_TYPES = ("AUTO", "COPY")  # file types that the checkpoint decides
VERIFY = ("off", "sample", "full")
FALLBACKS = ("llama.cpp", "best")
MTP = ("drop", "keep")
GAINS = ("measured", "predicted")
FORMATS = ("gguf", "gptq", "nf4", "fp4", "int8")
STORAGE = ("uint8", "bfloat16", "float16", "float32")
GGUF_ONLY = {
    "types", "tensor_types", "output_tensor_type", "token_embedding_type", "pure", "leave_output_tensor", "fallback",
    "architecture", "mtp", "pre", "name", "verify", "target_size", "target_bpw", "sensitivity",
    "confirm", "gains",
}  # fmt: skip
FORMATS_OF = {  # fields that only some formats know
    **dict.fromkeys(GGUF_ONLY, ("gguf",)),
    **dict.fromkeys(("bits", "group_size", "sym", "desc_act"), ("gptq",)),
    **dict.fromkeys(("double_quant", "storage"), ("nf4", "fp4")),
    "keep": ("nf4", "fp4", "int8"),
    "sequential": ("gguf", "gptq"),
}
DEFAULT_MAX_RAM = 512 * 2**20


def check_gains(how: str) -> None:
    """Raises RecipeError for what is none of GAINS."""
    if how not in GAINS:
        raise RecipeError(f"gains: {how!r} is none of {', '.join(GAINS)}{nearest(how, GAINS)}")


@dataclass(frozen=True)
class Recipe:
    """One job. Fields that decide bytes come first; the last four only say how the job is run."""

    types: tuple[str, ...] = ("Q4_K_M",)  # llama.cpp file types, or "auto": the checkpoint's own float type
    tensor_types: tuple[tuple[str, str], ...] = ()  # (pattern, ggml type), the first match wins
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    fallback: str = "llama.cpp"  # types for rows that do not divide: its own, or "best" by measure
    adapter: str | None = None  # a peft adapter that is merged into the weights on the way
    onto: str | None = None  # 16bit or nf4: the weights it is merged into; by default what it was trained on
    imatrix: str | None = None
    target_size: int | None = None  # bytes of the file: types are chosen for the least error within them
    target_bpw: float | None = None  # or bits per weight of its tensors
    sensitivity: str | None = None  # a file of errors by `llmcompress sensitivity`, for a target
    gains: str = "measured"  # or "predicted": how much a tensor's error counts, for a target with importance
    confirm: int = 0  # swaps of types that are tried by measuring, on `data`, for a target
    method: str = "nearest"  # what chooses the codes: rounding to nearest, or gptq
    hessian: str | None = None  # a folder of XᵀX by `calibrate --hessian`, for gptq
    calibrate: bool = False  # make the importance while quantizing, from `data`
    data: tuple[str, ...] = ("default",)  # texts to calibrate on
    tokens: int = 2**18  # of them
    sequential: bool = False  # each block on what the quantized ones before it put out
    format: str = "gguf"  # or a checkpoint's: gptq, of which the next four fields speak, nf4, fp4, int8
    bits: int = 4  # of a code
    group_size: int = 128  # weights that share a scale; -1: a row
    sym: bool = True  # zero in the middle of the codes
    desc_act: bool = False  # columns are rounded in the order of their importance
    sparsity: float | None = None  # of the linears of the blocks: pruned by SparseGPT in the same sweep
    pattern: str | None = None  # the same as N:M, such as 2:4
    keep_zeros: bool = False  # of those linears: what is zero in the checkpoint stays zero in gptq's sweep
    double_quant: bool = False  # of nf4 and fp4: scales in eight bits
    storage: str = "uint8"  # what nf4's and fp4's bytes count as
    keep: tuple[str, ...] = ()  # modules that stay as they are, as llm_int8_skip_modules names them
    effort: str = "normal"  # of the search for scales: fast, normal or best
    architecture: str | None = None  # the class to convert as, for one that has no table
    mtp: str = "drop"  # or "keep": the layers behind the last that predict further tokens
    pre: str | None = None  # pre-tokenizer by name, where detection fails
    name: str | None = None  # general.name
    split_max_size: int | None = None  # bytes
    max_ram: int = DEFAULT_MAX_RAM  # bytes above the interpreter and its libraries
    threads: int | None = None
    verify: str = "sample"

    def __post_init__(self) -> None:
        if not self.types:
            raise RecipeError("no type is asked for: give at least one, such as Q4_K_M")
        for name in self.types:
            if name.upper() not in SOURCE_TYPES:
                find_file_type(name)
        if self.verify not in VERIFY:
            raise RecipeError(
                f"verify: {self.verify!r} is none of {', '.join(VERIFY)}{nearest(self.verify, VERIFY)}"
            )
        if self.fallback not in FALLBACKS:
            hint = nearest(self.fallback, FALLBACKS)
            raise RecipeError(f"fallback: {self.fallback!r} is none of {', '.join(FALLBACKS)}{hint}")
        if self.mtp not in MTP:
            raise RecipeError(f"mtp: {self.mtp!r} is none of {', '.join(MTP)}{nearest(self.mtp, MTP)}")
        check_gains(self.gains)
        check_effort(self.effort)
        if self.method not in METHODS:
            raise RecipeError(
                f"method: {self.method!r} is none of {', '.join(METHODS)}{nearest(self.method, METHODS)}"
            )
        if self.method == "gptq" and not (self.hessian or self.calibrate):
            raise RecipeError(
                "method: gptq needs to see inputs: add --calibrate, or --hessian with a calibrated folder"
            )
        if self.sequential and not (self.calibrate and (self.method == "gptq" or self.format == "gptq")):
            raise RecipeError("sequential: is a way to calibrate for gptq: add --calibrate and --method gptq")
        if self.sequential and len(self.types) > 1:
            raise RecipeError(
                "sequential: blocks can be calibrated on one file's weights; give a single type"
            )
        if self.onto and not self.adapter:
            raise RecipeError("onto: is for an adapter; add --adapter")
        given = [name for name in ("imatrix", "hessian", "calibrate") if getattr(self, name)]
        if len(given) > 1:
            raise RecipeError(f"{given[0]} and {given[1]}: each gives the importance; leave one out")
        self._check_pruning()
        self._check_format()
        self._check_target()
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads: {self.threads} is less than 1")

    def _check_format(self) -> None:
        """Each format has fields that mean nothing to the other."""
        if self.format not in FORMATS:
            raise RecipeError(
                f"format: {self.format!r} is none of {', '.join(FORMATS)}{nearest(self.format, FORMATS)}"
            )
        for name, known in (("bits", BITS), ("group_size", GROUPS)):
            if getattr(self, name) not in known:
                listed = ", ".join(map(str, known))
                raise RecipeError(f"{name}: {getattr(self, name)} is none of {listed}")
        if self.storage not in STORAGE:
            hint = nearest(self.storage, STORAGE)
            raise RecipeError(f"storage: {self.storage!r} is none of {', '.join(STORAGE)}{hint}")
        for field in fields(self):
            known = FORMATS_OF.get(field.name, FORMATS)
            if self.format not in known and getattr(self, field.name) != field.default:
                raise RecipeError(
                    f"{field.name}: means nothing to the format {self.format}; leave it out, or choose the other format"
                )
        if self.desc_act and not (self.hessian or self.calibrate):
            raise RecipeError(
                "desc_act: the order is that of the inputs: add --calibrate, or --hessian with a calibrated folder"
            )

    def _check_pruning(self) -> None:
        if not self.prunes:
            return
        asked = {
            "sparsity": self.sparsity is not None,
            "pattern": self.pattern is not None,
            "keep_zeros": self.keep_zeros,
        }
        flag, *others = (name for name, given in asked.items() if given)
        if self.keep_zeros and others:
            raise RecipeError(f"keep_zeros: holds the zeros there are, {flag} makes others; leave one out")
        if self.keep_zeros and self.method != "gptq":
            raise RecipeError(
                "keep_zeros: is for gptq, which moves zeros as it does all weights; rounding to nearest keeps them where a type can"
            )
        if self.method != "gptq":
            raise RecipeError(
                f"{flag}: prunes in the sweep of gptq; add --method gptq, or take `llmcompress prune`"
            )
        if self.sparsity is not None and not (type(self.sparsity) in (int, float) and 0 < self.sparsity < 1):
            raise RecipeError(
                f"sparsity: {self.sparsity!r} is no share of the weights; give a number between 0 and 1"
            )
        if self.has_target:
            raise RecipeError(
                f"{flag}: a target measures errors without pruning; give types, or take `llmcompress prune`"
            )
        _ = self.pruning  # raises for a pattern that is none

    @property
    def prunes(self) -> bool:
        """Whether zeros are made, or held, in the sweep that quantizes."""
        return self.sparsity is not None or self.pattern is not None or self.keep_zeros

    @cached_property
    def pruning(self) -> Pruning | None:
        """What goes in the sweep that quantizes; to hold what is zero already, none of the rest."""
        if not self.prunes:
            return None
        from llmcompress.methods.joint import pruning_of

        return pruning_of(0 if self.keep_zeros else self.sparsity, self.pattern)

    def _check_target(self) -> None:
        if self.confirm < 0:
            raise RecipeError(f"confirm: {self.confirm} is less than 0")
        if self.target_size and self.target_bpw:
            raise RecipeError("target_size and target_bpw: each gives the size; leave one out")
        if not self.has_target:
            if self.sensitivity:
                raise RecipeError("sensitivity: is for a target; add --target-size or --target-bpw")
            if self.confirm:
                raise RecipeError("confirm: is for a target; add --target-size or --target-bpw")
            if self.gains != Recipe.gains:
                raise RecipeError("gains: is for a target; add --target-size or --target-bpw")
            return
        if self.sensitivity and self.gains != Recipe.gains:
            raise RecipeError("gains: are in the sensitivity file, too; leave one of the two out")
        if self.pure or self.types != Recipe.types:
            given = "pure" if self.pure else f"type {','.join(self.types)}"
            raise RecipeError(f"{given}: a target chooses the type of each tensor; leave one of the two out")
        if self.calibrate:
            raise RecipeError(
                "calibrate: a target measures before the calibration runs; calibrate first, and give --imatrix or "
                "--hessian"
            )

    @property
    def has_target(self) -> bool:
        return bool(self.target_size or self.target_bpw)

    @property
    def overrides(self) -> TypeOverrides:
        return TypeOverrides(
            tensor_types=self.tensor_types,
            output=self.output_tensor_type,
            token_embedding=self.token_embedding_type,
            pure=self.pure,
            leave_output=self.leave_output_tensor,
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields that decide bytes and differ from their defaults, ready for JSON or YAML."""
        run_only = {"max_ram", "threads", "verify"}
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in run_only
            and (field.name == "types" or getattr(self, field.name) != field.default)
        }

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)


def parse_recipe(
    data: Mapping[str, Any], onto: Recipe | None = None, label: Callable[[str], str] = "recipe: {}".format
) -> Recipe:
    """A Recipe from a mapping of its fields, strictly: unknown keys and wrong kinds are RecipeErrors.

    Fields that are not named keep their value in `onto`. `label` names a field in messages.
    """
    known = {field.name for field in fields(Recipe)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise RecipeError(f"{label(key)}: is no field of a recipe{nearest(str(key), known)}")
        values[key] = _field(key, value, label(key))
    return replace(onto or Recipe(), **values)


def _field(key: str, value: Any, label: str) -> Any:
    if key in ("types", "data", "keep"):
        names = [value] if isinstance(value, str) else value
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return tuple(names)
    elif key == "tensor_types":
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if isinstance(pairs, (list, tuple)) and all(_is_pair(pair) for pair in pairs):
            return tuple((pattern, name) for pattern, name in pairs)
    elif key in ("max_ram", "split_max_size", "target_size"):
        return parse_size(value, label)
    elif key == "sparsity":
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif key == "target_bpw":
        return _bits(value, label)
    elif key == "tokens":
        return parse_count(value, label)
    elif key in (
        "pure",
        "leave_output_tensor",
        "calibrate",
        "sequential",
        "sym",
        "desc_act",
        "double_quant",
        "keep_zeros",
    ):
        if isinstance(value, bool):
            return value
    elif key in ("threads", "bits", "group_size", "confirm"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, str):
        return value
    raise RecipeError(f"{label}: cannot be {value!r}")


def _bits(value: Any, label: str) -> float:
    try:
        bits = float(value)
    except (TypeError, ValueError):
        bits = 0.0
    if not 0 < bits <= 32:
        raise RecipeError(f"{label}: {value!r} is no number of bits per weight; write it like 4.25")
    return bits


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def read_recipe(path: str | Path, onto: Recipe | None = None) -> Recipe:
    """A Recipe from a YAML file whose keys are Recipe's fields; the others are those of `onto`.

    Raises RecipeError."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{path}: a recipe is a mapping such as 'types: [Q4_K_M]', not a {type(data).__name__}"
        )
    return parse_recipe(data, onto, label=lambda key: f"{path}: {key}")
