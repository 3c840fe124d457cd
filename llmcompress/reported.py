"""How a command ends when something is wrong: one line, and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from llmcompress.errors import LlmcompressError

_RUN = "running a model needs pip install 'llmcompress[calibrate]', fine-tuning one 'llmcompress[finetune]'"
EXTRAS = (
    "torch", "transformers", "greenlet", "accelerate", "jinja2", "pyarrow", "datasets", "peft", "bitsandbytes",
    "matplotlib",
)  # fmt: skip


def reported(command: Callable) -> Callable:
    """Errors of ours become one line and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LlmcompressError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            typer.echo(f"error: {error.name} is not installed; {_RUN}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("stopped: the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        except OSError as error:
            if error.filename is not None:  # a file's error has become one of ours: this is a bug
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader of our output, such as head, has seen enough
                raise typer.Exit(0) from None
            typer.echo(f"error: standard output cannot be written: {error.strerror}", err=True)
            raise typer.Exit(2) from None

    return wrapped
