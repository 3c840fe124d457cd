"""The line that says that kernels are being compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.bytecode import FunctionIdentity
from synthetic_checkpoint import Llama, write_checkpoint

import llmcompress.grids.compiled  # noqa: F401

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


@pytest.mark.slow
def test_processes_share_the_kernels(tmp_path: Path) -> None:
    """The second of two is compiled elsewhere where there are two cores, and read from the disk."""
    program = """
import llmcompress.grids.compiling as compiling
from llmcompress.grids import GRIDS
compiling.cores = lambda: 2
uses = [(GRIDS[name], False) for name in ("Q8_0", "MXFP4")]
compiling.prepare_kernels(uses, "normal", print)
print(*(sum(grid.kernel_dequantize.stats.cache_hits.values()) for grid, _ in uses))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["compiling kernels for this CPU, once: Q8_0 MXFP4", "0 1"], (
        done.stderr
    )


KERNELS = """
import math, sys
from numba.extending import register_jitable
from llmcompress.grids.compiled import compiled

def kernel_of(number):
    @register_jitable
    def closure(n):  # too long for LLVM to make it part of what calls it
        LINES
        return number

    @compiled(f"kernel_{number}")
    def kernel(n):
        return closure(n) + closure(n + 1.0)

    return kernel

if __name__ == "__main__":
    print(*(kernel_of(number)(1.0) for number in map(int, sys.argv[1:])))
""".replace("LINES", "\n        ".join(60 * ["n = math.sin(n) + math.cos(n)", "if n > 9: return 0"]))


@pytest.mark.slow
def test_kernels_of_two_processes_keep_their_own_closures_in_a_third(tmp_path: Path) -> None:
    """IQ2_S and IQ3_XXS, compiled apart, once took entries by each other's search: 80 % of error, or a crash."""
    (tmp_path / "kernels.py").write_text(KERNELS)

    def run(*numbers: str) -> list[str]:
        command = [sys.executable, "kernels.py", *numbers]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()

    apart = run("1") + run("100")
    assert apart == ["2", "200"]
    assert run("1", "100") == apart


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_numbers_its_kernels_from_elsewhere() -> None:
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, str(next(FunctionIdentity._unique_ids)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert abs(int(os.read(reading, 64)) - next(FunctionIdentity._unique_ids)) > 2**20
