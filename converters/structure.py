"""What makes a checkpoint smaller, by the word the user types."""

from __future__ import annotations

from collections.abc import Callable

from llmcompress.converters.dropping import drop_layers
from llmcompress.converters.lowering import lower_ranks
from llmcompress.converters.narrowing import narrow
from llmcompress.converters.smaller_folder import SmallerReport
from llmcompress.converters.thinning import drop_experts

JOBS: dict[str, Callable[..., SmallerReport]] = {
    "layers": drop_layers,
    "width": narrow,
    "experts": drop_experts,
    "svd": lower_ranks,
}
