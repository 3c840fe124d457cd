"""llama.cpp's file types, and the type each of them gives to each tensor of a model.

A file type is a default type and a mix: tensors that matter more get more bits. `mix.py` holds the
rules as tables; this module walks a model's tensors in llama-quantize's order and applies them, so that
a file made here has the same types as one made there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress import mix
from llmcompress.errors import PlanError, RecipeError, nearest
from llmcompress.gguf.types import TYPES
from llmcompress.mix import ModelTraits, Place, Role, role_of


@dataclass(frozen=True)
class FileType:
    name: str  # "Q4_K_M"
    id: int  # general.file_type of the GGUF
    default: str  # ggml's type of the tensors that no rule names: "Q4_K"


FILE_TYPES: dict[str, FileType] = {
    name: FileType(name, number, default)
    for name, number, default in (
        ("F32", 0, "F32"),
        ("F16", 1, "F16"),
        ("BF16", 32, "BF16"),
        ("Q8_0", 7, "Q8_0"),
        ("Q4_0", 2, "Q4_0"),
        ("Q4_1", 3, "Q4_1"),
        ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"),
        ("Q2_K", 10, "Q2_K"),
        ("Q2_K_S", 21, "Q2_K"),
        ("Q3_K_S", 11, "Q3_K"),
        ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_L", 13, "Q3_K"),
        ("Q4_K_S", 14, "Q4_K"),
        ("Q4_K_M", 15, "Q4_K"),
        ("Q5_K_S", 16, "Q5_K"),
        ("Q5_K_M", 17, "Q5_K"),
        ("Q6_K", 18, "Q6_K"),
        ("IQ1_S", 24, "IQ1_S"),
        ("IQ1_M", 31, "IQ1_M"),
        ("IQ2_XXS", 19, "IQ2_XXS"),
        ("IQ2_XS", 20, "IQ2_XS"),
        ("IQ2_S", 28, "IQ2_XS"),
        ("IQ2_M", 29, "IQ2_S"),
        ("IQ3_XXS", 23, "IQ3_XXS"),
        ("IQ3_XS", 22, "IQ3_S"),
        ("IQ3_S", 26, "IQ3_S"),
        ("IQ3_M", 27, "IQ3_S"),
        ("IQ4_NL", 25, "IQ4_NL"),
        ("IQ4_XS", 30, "IQ4_XS"),
        ("TQ1_0", 36, "TQ1_0"),
        ("TQ2_0", 37, "TQ2_0"),
        ("MXFP4_MOE", 38, "MXFP4"),
        ("Q1_0", 40, "Q1_0"),
        ("Q2_0", 41, "Q2_0"),
    )
}
FILE_TYPES |= {alias: FILE_TYPES[f"{alias}_M"] for alias in ("Q3_K", "Q4_K", "Q5_K")}

# NVFP4 has no file type of its own.
TENSOR_TYPES = {file_type.default for file_type in FILE_TYPES.values()} | {"NVFP4"}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TypeOverrides:
    """What the user asks for by hand; types are ggml's names in any case.

    `tensor_types` holds (pattern, type) pairs: a regular expression searched in the tensor's name without
    regard to case, the first that matches wins. `pure` means the default everywhere, without the mix.
    """

    tensor_types: tuple[tuple[str, str], ...] = ()
    output: str | None = None
    token_embedding: str | None = None
    pure: bool = False
    leave_output: bool = False


@dataclass(frozen=True)
class TypeChoice:
    type: str  # ggml's name: "Q4_K"
    reason: str
    imatrix_required: bool = False
    instead_of: str | None = None  # the type whose blocks the rows do not divide into
    fixed: bool = False  # kept, or asked for by the user: not the file type's to decide


def find_file_type(name: str) -> FileType:
    """The file type called `name`, in any case and with '-' for '_'. Raises RecipeError."""
    file_type = FILE_TYPES.get(name.upper().replace("-", "_"))
    if file_type is None:
        raise RecipeError(f"no file type is called {name!r}{nearest(name, FILE_TYPES)}")
    return file_type


def find_tensor_type(name: str, asked_by: str) -> str:
    """ggml's spelling of a type that a tensor may be given. Raises RecipeError."""
    known = name.upper().replace("-", "_")
    if known not in TENSOR_TYPES:
        raise RecipeError(f"{asked_by}: no tensor type is called {name!r}{nearest(name, TENSOR_TYPES)}")
    return known


def layer_number(name: str) -> int:
    """The N of `blk.N.`, -1 for tensors outside the blocks."""
    match = re.match(r"blk\.(\d+)", name, re.ASCII)
    return int(match[1]) if match else -1


def tensor_order(names: Sequence[str]) -> list[str]:
    """The names as llama-quantize visits and writes them: by layer, then by bytes."""
    return sorted(names, key=lambda name: (layer_number(name), name.encode()))


def choose_types(
    file_type: FileType,
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    traits: ModelTraits,
    overrides: TypeOverrides = TypeOverrides(),
) -> list[TypeChoice]:
    """The type of each tensor, in the order given.

    `tensors` holds (GGUF name, shape with the slowest axis first, type it would have unquantized) of a
    whole model: the rules count tensors. Raises RecipeError for overrides that make no sense or apply to
    nothing, PlanError for a tensor that cannot have the type it should.
    """
    by_name = {name: (shape, source) for name, shape, source in tensors}
    chooser = Chooser(file_type, list(by_name), traits, overrides)
    chosen = {name: chooser.choose(name, *by_name[name]) for name in tensor_order(list(by_name))}
    chooser.rules.check_all_applied(by_name)
    return [chosen[name] for name, _, _ in tensors]


class TensorTypeRules:
    """The --tensor-type rules, which remember whether they were of use."""

    def __init__(self, tensor_types: Sequence[tuple[str, str]]) -> None:
        self.rules = [
            (self._compiled(pattern), find_tensor_type(kind, f"--tensor-type {pattern}={kind}"))
            for pattern, kind in tensor_types
        ]
        self.applied: set[int] = set()

    @staticmethod
    def _compiled(pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise RecipeError(f"--tensor-type: {pattern!r} is no regular expression: {error}") from None

    def find(self, name: str) -> tuple[str, str] | None:
        """The type that the first matching rule gives and the rule in words."""
        for number, (pattern, kind) in enumerate(self.rules):
            if pattern.search(name):
                self.applied.add(number)
                return kind, f"rule --tensor-type {pattern.pattern}={kind}"
        return None

    def check_all_applied(self, names: Sequence[str]) -> None:
        for number, (pattern, _) in enumerate(self.rules):
            if number in self.applied:
                continue
            if not any(pattern.search(name) for name in names):
                raise RecipeError(f"--tensor-type: {pattern.pattern!r} matches no tensor of this model")
            raise RecipeError(
                f"--tensor-type: {pattern.pattern!r} applies to no tensor: all that it matches are never "
                "quantized, or an earlier rule or option takes them; remove it or put it first"
            )


class Chooser:
    """Chooses one tensor's type after the other. Tensors must come in `tensor_order`: rules count them."""

    def __init__(
        self, file_type: FileType, names: Sequence[str], traits: ModelTraits, overrides: TypeOverrides
    ) -> None:
        self.file_type = file_type
        self.traits = traits
        self.tied = "output.weight" not in names
        self.values = sum(role_of(name) is Role.VALUE for name in names)
        self.seen: Counter[Role] = Counter()
        self.never_quantized = mix.NEVER_QUANTIZED | mix.NEVER_QUANTIZED_IN.get(traits.architecture, {})
        self.pure = overrides.pure
        self.leave_output = overrides.leave_output
        self.rules = TensorTypeRules(overrides.tensor_types)
        self.direct = {
            role: (find_tensor_type(kind, option), f"{option} {kind}")
            for role, option, kind in (
                (Role.OUTPUT, "--output-tensor-type", overrides.output),
                (Role.EMBEDDING, "--token-embedding-type", overrides.token_embedding),
            )
            if kind
        }
        if self.leave_output and overrides.output:
            raise RecipeError("--leave-output-tensor and --output-tensor-type contradict each other")

    def choose(self, name: str, shape: tuple[int, ...], source: str) -> TypeChoice:
        role = role_of(name)
        kept = self._reason_to_keep(name, shape)
        if kept:
            return TypeChoice(source, f"{kept}: kept {source}", fixed=True)
        rule = self.rules.find(name) if self._rules_apply(name, role) else None
        if rule is None and role in self.direct:
            return self._checked(name, shape, *self.direct[role])
        if rule is None and self.file_type.name == "COPY":
            return TypeChoice(source, f"COPY: {source}, as it is", fixed=True)
        wanted, reason = rule or self._without_rule(name, role, shape)
        kind, reason = with_fallback(name, shape, wanted, reason)
        fixed = bool(rule) or self._asked_for_as_output(role)
        return TypeChoice(
            kind, reason, self._needs_imatrix(role, kind), wanted if kind != wanted else None, fixed
        )

    def _reason_to_keep(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What the tensor is, if it is one of those that are never quantized."""
        if self.leave_output and name == "output.weight":
            return "--leave-output-tensor"
        if name in mix.NEVER_QUANTIZED_NAMES:
            return mix.NEVER_QUANTIZED_NAMES[name]
        for part, words in self.never_quantized.items():
            if part in name:
                return words
        if not name.endswith("weight"):
            return "no weight matrix"
        return "one dimension" if dimensions(shape) < 2 else None

    def _rules_apply(self, name: str, role: Role) -> bool:
        # llama.cpp lets the options for output and embedding win, except over this second embedding
        return role not in self.direct or name == "per_layer_token_embd.weight"

    def _asked_for_as_output(self, role: Role) -> bool:
        return self.tied and role is Role.EMBEDDING and Role.OUTPUT in self.direct

    def _checked(self, name: str, shape: tuple[int, ...], kind: str, option: str) -> TypeChoice:
        """A type given by an option of its own has no fallback: it is what the user asked for or nothing."""
        block = TYPES[kind].block
        if shape[-1] % block:
            raise PlanError(
                f"{name}: {option} needs rows of a multiple of {block}, these have {shape[-1]}; "
                f"use {mix.FALLBACK.get(kind, mix.LAST_FALLBACK)}"
            )
        return TypeChoice(kind, option, fixed=True)

    def _without_rule(self, name: str, role: Role, shape: tuple[int, ...]) -> tuple[str, str]:
        default = self.file_type.default
        if self._asked_for_as_output(role):
            kind, option = self.direct[Role.OUTPUT]
            return kind, f"{option}: serves as the output"
        if default in FLOATS:
            return default, f"default of {self.file_type.name}"
        if self.pure:
            return default, f"--pure: default of {self.file_type.name}"
        return self._mixed(name, role, shape)

    def _mixed(self, name: str, role: Role, shape: tuple[int, ...]) -> tuple[str, str]:
        if any(part in name for part in mix.ALWAYS_Q8_0_IN.get(self.traits.architecture, ())):
            return "Q8_0", f"mix: always Q8_0 in {self.traits.architecture}"
        if role is Role.OUTPUT or (role is Role.EMBEDDING and self.tied):
            return self._output_type(shape)
        if self.file_type.name == "MXFP4_MOE":
            return self._expert_type(role, shape)
        kind, reason = self._by_table(name, role)
        if self.file_type.name not in mix.LOW:
            kind, reason = self._more_for_small(role, kind, reason)
        return kind, reason

    def _output_type(self, shape: tuple[int, ...]) -> tuple[str, str]:
        name, default = self.file_type.name, self.file_type.default
        undivided = shape[-1] % TYPES[default].block
        if name == "MXFP4_MOE" or self.traits.architecture == "falcon" or undivided or default == "Q8_0":
            kind = "Q8_0"
        else:
            kind = mix.OUTPUT.get(name, "Q6_K")
        return kind, f"mix of {name}: output" + (", tied to token_embd" if self.tied else "")

    def _expert_type(self, role: Role, shape: tuple[int, ...]) -> tuple[str, str]:
        is_expert = dimensions(shape) > 2
        if self.traits.architecture == "bailingmoe3":
            is_expert = is_expert and role in (Role.UP, Role.GATE, Role.DOWN)
        if is_expert:
            return "MXFP4", "default of MXFP4_MOE"
        return "Q8_0", "mix of MXFP4_MOE: not an expert"

    def _by_table(self, name: str, role: Role) -> tuple[str, str]:
        place = self._place(name, role)
        table = mix.FALCON_MIX if self.traits.architecture == "falcon" else mix.MIX
        for when, kind in table[role].get(self.file_type.name, ()):
            if when.holds(place):
                return kind, f"mix of {self.file_type.name}: {role.value}, {when.words}"
        return self.file_type.default, f"default of {self.file_type.name}"

    def _place(self, name: str, role: Role) -> Place:
        index = self.seen[role]
        self.seen[role] += 1
        if role is Role.VALUE:
            return Place(index, self.values, self.traits)
        counted = self.traits.experts <= 1 or (role is Role.DOWN and self.file_type.name in mix.LOW)
        if role in (Role.UP, Role.GATE, Role.DOWN) and not counted:
            index = layer_number(name)
            if not 0 <= index < self.traits.blocks:
                raise PlanError(f"{name}: block {index} of a model of {self.traits.blocks} blocks")
        return Place(index, self.traits.blocks, self.traits)

    def _more_for_small(self, role: Role, kind: str, reason: str) -> tuple[str, str]:
        """More bits for keys and values where they are a small part of the model."""
        if self.traits.experts == 8 and role in (Role.KEY, Role.VALUE):
            return "Q8_0", f"mix: {role.value}, eight experts"
        if self.traits.is_70b and role is Role.VALUE and kind in ("Q3_K", "Q4_K"):
            return "Q5_K", f"mix: {role.value} of a 70B model"
        return kind, reason

    def _needs_imatrix(self, role: Role, kind: str) -> bool:
        if role in (Role.OUTPUT, Role.EMBEDDING):
            return False
        return kind in mix.IMATRIX_REQUIRED or kind == mix.IMATRIX_REQUIRED_IN.get(self.file_type.name)


def dimensions(shape: tuple[int, ...]) -> int:
    """Axes as ggml counts them: leading axes of one do not count."""
    return next((len(shape) - axis for axis, size in enumerate(shape) if size != 1), 0)


def with_fallback(name: str, shape: tuple[int, ...], kind: str, reason: str) -> tuple[str, str]:
    """The type itself where the rows divide into its blocks, else the one llama.cpp takes instead."""
    columns, block = shape[-1], TYPES[kind].block
    if columns % block == 0:
        return kind, reason
    if kind not in mix.FALLBACK and block > 32:
        raise PlanError(
            f"{name}: rows of {columns} do not divide into the {kind} blocks of {block}, and nothing takes "
            f"the place of {kind}; give this tensor another type with --tensor-type"
        )
    fallback = mix.FALLBACK.get(kind, kind)
    if columns % TYPES[fallback].block:
        fallback = mix.LAST_FALLBACK
    return fallback, f"row of {columns} is no multiple of {block}: {fallback} for {kind}"
