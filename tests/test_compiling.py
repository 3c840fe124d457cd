"""The line that says that kernels are being compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_checkpoint import Llama, write_checkpoint

LINE = "compiling kernels for this CPU, once: F32 F16"


@pytest.mark.slow
def test_the_line_comes_once_and_only_where_something_is_compiled(tmp_path: Path) -> None:
    model = write_checkpoint(
        tmp_path / "model", Llama(layers=1, hidden=64, feed_forward=96, heads=2, kv_heads=1)
    )
    program = [sys.executable, "-m", "llmcompress", "convert", model, "--type", "F16"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    for number, expected in enumerate((1, 0)):
        command = [*program, "-o", tmp_path / f"{number}.gguf"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(LINE) == expected, done.stderr
