"""Number formats: how weights become bytes, one file per family."""

from __future__ import annotations

from llmcompress.errors import RecipeError, nearest
from llmcompress.grids.binary import Q1_0, Q2_0
from llmcompress.grids.float4 import MXFP4, NVFP4
from llmcompress.grids.floats import BF16, F16, F32
from llmcompress.grids.grid import Grid
from llmcompress.grids.iq1 import IQ1_M, IQ1_S
from llmcompress.grids.iquants import IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from llmcompress.grids.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from llmcompress.grids.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from llmcompress.grids.nonlinear import IQ4_NL, IQ4_XS
from llmcompress.grids.ternary import TQ1_0, TQ2_0

GRIDS: dict[str, Grid] = {
    grid.name: grid for grid in (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}
GRIDS |= {grid.name: grid for grid in (IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0)}
GRIDS |= {grid.name: grid for grid in (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)}


def find_grid(name: str) -> Grid:
    """The grid ggml calls `name`, in any case. Raises RecipeError for a type that cannot be written."""
    grid = GRIDS.get(name.upper())
    if grid is None:
        known = ", ".join(GRIDS)
        raise RecipeError(f"no tensor type {name!r}{nearest(name, GRIDS)} (known: {known})")
    return grid
