"""Tasks of lm-evaluation-harness, for which a model is in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcompress.errors import LlmcompressError, nearest, shown


class Harness:
    """Tasks by name, where `*` stands for anything: the harness's own, or those of the YAML files in `folder`.

    Raises LlmcompressError where the harness is not installed, or a task is unknown or cannot be loaded.
    """

    def __init__(self, tasks: Sequence[str], folder: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise LlmcompressError(
                "--tasks: lm-evaluation-harness is not installed; pip install 'lm_eval[hf]'"
            ) from None
        if folder and not Path(folder).is_dir():
            raise LlmcompressError(
                f"--tasks-path {folder}: no such folder; give one with tasks as YAML files"
            )
        self._manager = TaskManager(include_path=folder, include_defaults=folder is None)
        for task in tasks:
            if not self._manager.match_tasks([task]):
                known = self._manager.all_tasks
                where = folder or "lm-evaluation-harness"
                raise LlmcompressError(
                    f"--tasks {task}: none of {len(known)} in {where}{nearest(task, known)}"
                )
        self._names = self._manager.match_tasks(list(tasks))
        try:
            self._manager.load(
                self._names
            )  # a data set that is not there is found out now, not when all is run
        except Exception as error:  # of YAML, of data sets, of the hub: too many kinds to list
            reason = shown(str(error).split("\n")[0])
            raise LlmcompressError(f"--tasks {','.join(tasks)}: cannot be loaded: {reason}") from error

    def scores(self, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """What the harness reports of a transformers model, by task: `acc,none`, `acc_stderr,none` and so on."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer), tasks=self._names, task_manager=self._manager
        )
        return {task: _numbers(scores) for task, scores in found["results"].items()}


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}
