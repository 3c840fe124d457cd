"""From a clean clone to a running job: makes a virtual environment, installs, and does what is asked.

    python3 tools/fresh.py example          # the main job, on the small real model in examples/
    python3 tools/fresh.py tests [ARGS]     # the test suite; ARGS go to pytest

Needs nothing but Python and pip. The environment lies in .venv (tests: .venv-tests) and is made once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"  # named exactly and first, so that a CPU build is taken where there is one
AUTO_GPTQ = "auto-gptq==0.7.1"  # the last; archived


def environment(folder: str, requirements: list[list[str]]) -> Path:
    """The Python of a virtual environment in which each list of pip arguments has been installed, in order."""
    home = ROOT / folder
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = home / "installed-for"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr(requirements).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {home}", flush=True)
    venv.create(home, with_pip=True, clear=True)
    for arguments in requirements:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True, cwd=ROOT)
    stamp.write_text(wanted)
    return python


def example() -> int:
    """Quantize the example model and say where the file is and what runs it."""
    python = environment(".venv", [["-e", "."]])
    model, out = ROOT / "examples" / "sample-llama-6m", ROOT / "out" / "sample-llama-6m-Q4_K_M.gguf"
    code = subprocess.run(
        [python, "-m", "llmcompress", "quantize", model, "-o", out, "--type", "Q4_K_M"]
    ).returncode
    if code == 0:
        print(
            f"\nThe GGUF lies in {out}\nRun it with llama.cpp:\n  llama-cli -m {out} -p 'Once upon a time' -n 64"
        )
        print(f"Look inside with:\n  {python} -m llmcompress inspect {out}")
    return code


def tests(arguments: list[str]) -> int:
    python = environment(".venv-tests", [[TORCH], ["-e", ".[dev]"]])
    install_auto_gptq(python)
    workers = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]  # a later -n among the arguments counts
    return subprocess.run(
        [python, "-m", "pytest", *workers, *(arguments or ["-q"])],
        cwd=ROOT,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},  # threads that wait leave the cores to other tests
    ).returncode


def install_auto_gptq(python: Path) -> None:
    """Beside the environment's packages, where tests/auto_gptq_peer.py looks: its own package `tests` would hide ours.

    Without what it names as needed: the tests need none of it. Its CUDA kernels are not built."""
    folder = python.parent.parent / "auto-gptq"
    if folder.exists():
        return
    part = folder.with_name("auto-gptq.part")
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        part,
    ]
    if subprocess.run([*command, AUTO_GPTQ], env={**os.environ, "BUILD_CUDA_EXT": "0"}).returncode:
        print(
            f"{AUTO_GPTQ} cannot be installed; the tests that read our files with it are skipped", flush=True
        )
    else:
        part.rename(folder)


def main() -> int:
    job, *arguments = sys.argv[1:] or ["help"]
    if job == "example" and not arguments:
        return example()
    if job == "tests":
        return tests(arguments)
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
