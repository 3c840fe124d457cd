"""What a pruning is asked to do."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from llmcompress.errors import RecipeError, nearest, shown
from llmcompress.grids.effort import check_effort
from llmcompress.methods import PRUNING

ALLOCATIONS = ("uniform", "owl")
RUN_ONLY = {"split_max_size", "max_ram", "threads", "hidden_ram", "device"}


@dataclass(frozen=True)
class PruningOptions:
    """Fields that decide bytes come first, those behind `device` only say how the job is run.

    sparsity: share of the weights that go, by default half, or what the pattern says. pattern: N:M, of every M weights in
    a row N stay. whole_model: magnitudes are compared across all matrices. by_score: Wanda's variant, rows
    give up the same share of their scores. shares: sparsities by pattern of a tensor's
    name, the first that is found in it wins. keep: patterns of tensors that stay as they are.
    """

    method: str = "wanda"
    sparsity: float | None = None
    pattern: str | None = None
    whole_model: bool = False
    by_score: bool = False
    shares: tuple[tuple[str, float], ...] = ()
    keep: tuple[str, ...] = ()
    allocate: str = "uniform"
    effort: str = "normal"
    data: tuple[str, ...] = ("default",)
    tokens: int = 2**18
    chunk: int = 512
    seed: int = 0
    dtype: str = "auto"
    batch_tokens: int | None = None
    device: str = "auto"
    hidden_ram: int = 2**30  # bytes of waiting hidden states, more go to disk
    split_max_size: int | None = None
    max_ram: int | None = None  # bytes above the interpreter and its libraries
    threads: int | None = None

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("method", self.method, PRUNING),
            ("allocate", self.allocate, ALLOCATIONS),
        ):
            if value not in known:
                raise RecipeError(f"--{flag} {value}: is none of {', '.join(known)}{nearest(value, known)}")
        check_effort(self.effort)
        if self.sparsity is not None:
            _share(self.sparsity, "--sparsity")
        for pattern, share in self.shares:
            _share(share, f"sparsity of {pattern}")
        for pattern in (*self.keep, *(pattern for pattern, _ in self.shares)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"{shown(pattern)}: is no regular expression ({error})") from None
        if self.whole_model and self.method != "magnitude":
            raise RecipeError(
                f"--global: is for --method magnitude; {self.method} compares within a row or a block"
            )
        if self.by_score and self.method != "wanda":
            raise RecipeError(f"--by-score: is for --method wanda, not {self.method}")
        if self.allocate == "owl" and self.method == "magnitude":
            raise RecipeError("--allocate owl: looks at inputs; take --method wanda or sparsegpt")
        if self.whole_model and self.shares:
            raise RecipeError(
                "--global and --shares: all weights are compared with each other; leave one out"
            )
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"--threads {self.threads}: give at least 1")
        self._check_pattern()

    def _check_pattern(self) -> None:
        if not self.group:
            return
        given = f"--pattern {self.group}"
        for flag, set_ in (
            ("--global", self.whole_model),
            ("--shares", self.shares),
            ("--allocate owl", self.allocate != "uniform"),
        ):
            if set_:
                raise RecipeError(
                    f"{given} and {flag}: a pattern takes as much of every matrix; leave one out"
                )

    @cached_property
    def group(self):
        """The pattern, a `methods.masks.Pattern`, or None."""
        if self.pattern is None:
            return None
        from llmcompress.methods.masks import matching_pattern  # Numba, which help does without

        return matching_pattern(self.pattern, self.sparsity)

    @property
    def share(self) -> float:
        """What goes where nothing else is said."""
        if self.group:
            return self.group.sparsity
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def of_products(self) -> bool:
        """Whether the method looks at XᵀX, not at its diagonal alone."""
        return self.method == "sparsegpt" or self.method == "wanda" and self.effort != "fast"

    def share_of(self, name: str, usual: float) -> float:
        """The sparsity of a tensor: by the patterns, else the usual."""
        for pattern in self.keep:
            if re.search(pattern, name):
                return 0.0
        return next((share for pattern, share in self.shares if re.search(pattern, name)), usual)

    def require_matches(self, names: Iterable[str]) -> None:
        """Raises RecipeError for a pattern that is found in none of the names."""
        names = list(names)
        for pattern in (*self.keep, *(pattern for pattern, _ in self.shares)):
            if not any(re.search(pattern, name) for name in names):
                raise RecipeError(
                    f"{shown(pattern)}: is found in none of the {len(names)} tensors that can be pruned, such as "
                    f"{', '.join(names[:2])}"
                )

    def as_dict(self) -> dict[str, Any]:
        """The fields that decide bytes and differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in RUN_ONLY
            and (field.name == "method" or getattr(self, field.name) != field.default)
        }  # fmt: skip


def parse_options(given: Mapping[str, Any], kind: type = PruningOptions) -> Any:
    """A `kind` of options by name; lists, and texts alone, become tuples. Raises RecipeError for a name that is none."""
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            raise RecipeError(f"prune(): {name} is none of {', '.join(known)}{nearest(name, known)}")
    values = dict(given)
    for name in ("data", "keep", "layers", "parts"):
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str) else tuple(values[name])
    if isinstance(values.get("shares"), Mapping):
        values["shares"] = tuple(values["shares"].items())
    return kind(**values)


def read_shares(path: str | Path) -> tuple[tuple[str, float], ...]:
    """Sparsities by pattern from a JSON or TOML file: `"layers\\\\.0\\\\." = 0.3`. Raises RecipeError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        held = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path}: cannot be read as JSON or TOML: {' '.join(str(error).split())[:200]}"
        ) from None
    if not isinstance(held, dict) or not held:
        raise RecipeError(
            f'{path}: holds no sparsities; write a line such as "down_proj" = 0.4 for each pattern'
        )
    return tuple((pattern, _share(share, f"{path}: {shown(pattern)}")) for pattern, share in held.items())


def _share(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise RecipeError(
            f"{where}: {shown(value)} is no share of the weights; give a number from 0 to below 1"
        )
    return float(value)
