"""What is to go of a model's structure: layers, widths or experts; and what that is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llmcompress.errors import RecipeError, nearest

STRUCTURES = ("layers", "width", "experts", "svd")
BY = {
    "layers": ("kl", "loss", "influence"),
    "width": ("reconstruction", "norm"),
    "experts": ("reap", "output", "use"),
    "svd": ("reconstruction",),
}
PARTS = ("ffn", "attention")
RUN_ONLY = {"device", "hidden_ram", "split_max_size", "threads"}


@dataclass(frozen=True)
class StructureOptions:
    """Fields behind `device` only say how the job is run.

    drop: how many layers, or experts of each layer. layers: those that go, in place of a choice. ratio: share of the
    width, the experts or the ranks that goes. rank: what is left of them, for svd. by: how importance is measured, a word of BY, the first where None.
    parts: of PARTS, for widths.
    """

    method: str
    drop: int | None = None
    layers: tuple[int, ...] = ()
    ratio: float | None = None
    rank: int | None = None
    by: str | None = None
    parts: tuple[str, ...] = PARTS
    data: tuple[str, ...] = ("default",)
    tokens: int | None = None
    chunk: int = 512
    seed: int = 0
    dtype: str = "auto"
    batch_tokens: int | None = None
    device: str = "auto"
    hidden_ram: int = 2**30  # bytes of waiting hidden states, more go to disk
    split_max_size: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _one_of("--method", self.method, STRUCTURES)
        if self.by:
            _one_of("--by", self.by, BY[self.method])
        for part in self.parts:
            _one_of("--parts", part, PARTS)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise RecipeError(f"--ratio {self.ratio:g}: is no share; give a number above 0 and below 1")
        for name in ("drop", "rank"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise RecipeError(f"--{name} {count}: give at least 1")
        ways = {
            "layers": {"--drop": self.drop, "--layers": self.layers}, "width": {"--ratio": self.ratio},
            "experts": {"--drop": self.drop, "--ratio": self.ratio}, "svd": {"--rank": self.rank, "--ratio": self.ratio},
        }[self.method]  # fmt: skip
        if sum(bool(value) for value in ways.values()) != 1:
            raise RecipeError(f"--method {self.method}: say how much goes, by {' or '.join(ways)}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"--threads {self.threads}: give at least 1")

    @property
    def measure(self) -> str:
        """How importance is measured."""
        return self.by or BY[self.method][0]

    def as_dict(self) -> dict[str, Any]:
        """The fields that decide bytes and are set."""
        unset = {field.name: field.default for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name not in RUN_ONLY and value != unset[name]
        }


def parse_layers(text: str) -> tuple[int, ...]:
    """`20,21,25-27`, rising. Raises RecipeError."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (last and not last.isdecimal()) or len(part) > 20:
            raise RecipeError(f"--layers {text}: write numbers from 0 on, such as 20,21 or 20-22")
        found += range(int(first), min(int(last or first), 10**6) + 1)
    if not found or len(set(found)) < len(found):
        raise RecipeError(f"--layers {text}: names {'a layer twice' if found else 'none'}")
    return tuple(sorted(found))


def parse_parts(text: str | None) -> tuple[str, ...]:
    """`ffn`, `attention` or both, with a comma between; both for None."""
    return tuple(word.strip() for word in text.split(",")) if text else PARTS


def _one_of(flag: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise RecipeError(f"{flag} {word}: is none of {', '.join(known)}{nearest(word, known)}")
