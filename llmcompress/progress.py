"""How a running job tells where it is. The command line shows it; a caller may subclass it."""

from __future__ import annotations


class Progress:
    """Says nothing. `start` opens a phase of `total` bytes of the source, or of another unit; `advance` counts them."""

    def start(self, phase: str, total: int, unit: str = "bytes") -> None:
        """A phase begins."""

    def advance(self, count: int) -> None:
        """`count` more are done."""

    def say(self, line: str) -> None:
        """Something worth knowing, in one line."""

    def close(self) -> None:
        """The job is over, well or not."""
