"""How long a search may take: each format brings candidates, and fewer or more are tried."""

from __future__ import annotations

import numpy as np

from llmcompress.errors import RecipeError, nearest

EFFORTS = ("fast", "normal", "best")
ROUNDS = {"fast": 0, "normal": 1, "best": 3}  # of rounding anew on the best grid so far, and fitting it again


def check_effort(effort: str) -> None:
    if effort not in EFFORTS:
        raise RecipeError(f"effort: {effort!r} is none of {', '.join(EFFORTS)}{nearest(effort, EFFORTS)}")


def search_at(effort: str, candidates: tuple[np.ndarray, ...]) -> tuple:
    """What `encode` gets: the candidates, every other one or those in between too, and the rounds."""
    scale = {"fast": lambda tops: tops[::2], "normal": lambda tops: tops, "best": denser}[effort]
    return (*(np.ascontiguousarray(scale(tops)) for tops in candidates), ROUNDS[effort])


def denser(candidates: np.ndarray) -> np.ndarray:
    """The candidates, along axis 0, and the middles between neighbours."""
    return np.concatenate([candidates, (candidates[1:] + candidates[:-1]) / 2])
