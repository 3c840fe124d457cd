"""What a calibration has summed up so far, on disk: a killed one goes on from here.

Sums are kept in float64 and sums of products in float32, as they are in memory, so that going on gives the very
bits that running through would have given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from llmcompress.errors import LlmcompressError
from llmcompress.linear_inputs import InputSums
from llmcompress.stats import TensorStats
from llmcompress.whole_file import whole_file


class CalibrationState:
    """The sums of the first groups of a calibration, in `path`; sums of products in files of `products`.

    `fingerprint` says what is calibrated on what: a state with another one is not gone on with.
    """

    def __init__(self, path: Path, fingerprint: str, products: Path | None = None) -> None:
        self.path, self.products, self._fingerprint = path, products, fingerprint
        self._saved: set[str] = set()  # weights that the saved groups have sums of

    def load(self) -> tuple[dict[str, TensorStats], list[str], int] | None:
        """Sums, complaints and the number of groups they are of; None where there is nothing to go on with."""
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self._fingerprint:
                    return None
                names = sorted(key.removesuffix(".tokens") for key in file.keys() if key.endswith(".tokens"))
                sums = {
                    name: TensorStats(
                        file.get_tensor(f"{name}.tokens").numpy(), file.get_tensor(f"{name}.squares").numpy()
                    )
                    for name in names
                }
                self._saved = set(sums)
                return sums, json.loads(about["complaints"]), int(about["groups"])
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LlmcompressError(
                f"{self.path}: cannot be read ({error}); remove it to calibrate from the start"
            ) from None

    def save(self, sums: Mapping[str, TensorStats], complaints: list[str], groups: int) -> None:
        """Put the sums of the first `groups` groups in the place of what was there."""
        tensors = {}
        for name, stats in sums.items():
            tensors[f"{name}.tokens"] = torch.from_numpy(stats.tokens)
            tensors[f"{name}.squares"] = torch.from_numpy(stats.squares)
        about = {
            "fingerprint": self._fingerprint,
            "groups": str(groups),
            "complaints": json.dumps(complaints),
        }
        with whole_file(self.path) as file:
            file.write(safetensors.torch.save(tensors, about))
        self._saved = set(sums)

    def add_products(self, group: int, sums: Mapping[str, InputSums]) -> None:
        """Add a group's XᵀX, float32 (matrices, inputs, inputs), to the files of their parameters.

        A file that has this group already, because the run was killed behind it, stays as it is. Raises
        LlmcompressError where that of the groups before is gone.
        """
        for name, of_group in sums.items():
            path = self.products / f"{name}.safetensors"
            held, groups = self._read_products(path) if group else (None, 0)
            if name in self._saved and groups < group:
                raise LlmcompressError(
                    f"{path}: the sums of {group} groups that {self.path} goes on from are not there; remove that to "
                    "calibrate from the start"
                )
            if groups > group:
                continue
            value = of_group.products.cpu()
            value = value if held is None else held.add_(value)
            about = {"fingerprint": self._fingerprint, "groups": str(group + 1)}
            with whole_file(path) as file:
                file.write(safetensors.torch.save({"products": value}, about))

    def finish(self) -> None:
        """The sums are where they belong: the state is no longer needed."""
        self.path.unlink(missing_ok=True)

    def _read_products(self, path: Path) -> tuple[torch.Tensor | None, int]:
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") == self._fingerprint:
                    return file.get_tensor("products"), int(about["groups"])
        except (SafetensorError, OSError):  # whether it should be there, the caller knows
            pass
        return None, 0


def add_sums(sums: dict[str, TensorStats], name: str, tokens: np.ndarray, squares: np.ndarray) -> None:
    """Add the sums of some more tokens of a weight."""
    if name in sums:
        sums[name].merge(TensorStats(tokens, squares))
    else:
        sums[name] = TensorStats(tokens, squares)
