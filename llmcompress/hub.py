"""From what the user typed to a directory: a local one, or a snapshot from the Hugging Face hub.

Snapshots lie in huggingface_hub's own cache, `.../models--ORG--NAME/snapshots/COMMIT`, and are shared with
every other program that uses it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from llmcompress.errors import CheckpointError, nearest

_HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>.+))?")

_TEXTS = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "README.md", "LICENSE*"]
# Other copies of the weights: folders of other formats, and Mistral's own layout beside Hugging Face's.
_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*"]

_log = logging.getLogger(__name__)


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory of `model`; where it came from is told by `origin`.

    `model` is a directory, `org/name`, or `org/name@revision`. Downloads what is not cached. With
    HF_HUB_OFFLINE set, or when the hub cannot be reached, the cached snapshot is used.
    Raises CheckpointError."""
    path = Path(model).expanduser()
    if not model:
        raise CheckpointError("no model is named; give a directory or a hub id (org/name)")
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: a file; give the model's directory, {path.parent}")
    match = _HUB_ID.fullmatch(model)
    if not match:
        raise CheckpointError(f"{model}: no such directory, and not a hub id (org/name){_neighbour(path)}")
    return _snapshot(match["repository"], revision or match["revision"], path)


def origin(directory: Path) -> tuple[str | None, str | None]:
    """`("org/name", commit)` of a snapshot in the hub's cache, `(None, None)` of any other directory."""
    folder = directory.resolve()
    owner, _, name = folder.parent.parent.name.removeprefix("models--").partition("--")
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--") or not name:
        return None, None
    return f"{owner}/{name}", folder.name


def _neighbour(path: Path) -> str:
    """A hint at the directory that lies where the first missing part of `path` was looked for."""
    while path != path.parent and not path.parent.is_dir():
        path = path.parent
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [sibling.name for sibling in path.parent.iterdir() if sibling.is_dir()])


def _snapshot(repository: str, revision: str | None, path: Path) -> Path:
    # A third of a second of imports, which only a hub id should pay for.
    from huggingface_hub import HfApi, constants, errors

    shown = f"{repository}@{revision}" if revision else repository
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    try:
        if not offline:
            offline = _unreachable(repository, revision, HfApi())
            if offline:
                _log.warning("%s: %s; looking in the cache", shown, offline)
        return _download(repository, revision, bool(offline))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{shown}: a gated model; accept its licence on https://huggingface.co/{repository}, "
            "then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{shown}: no such directory, and no such model on the hub, or a private one; check its name, or "
            f"`hf auth login`{_neighbour(path)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        what = f"no revision {revision!r} on the hub"
        raise CheckpointError(f"{repository}: {what}; give a branch, a tag or a commit") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{shown}: no such directory, not in the hub's cache, and {offline or 'its download broke off'}; "
            f"try again when the hub can be reached{_neighbour(path)}"
        ) from error
    except (errors.HTTPError, ValueError, OSError) as error:
        raise CheckpointError(f"{shown}: cannot be fetched from the hub: {_first_line(error)}") from error


def _unreachable(repository: str, revision: str | None, api) -> str | None:
    """Why the hub cannot answer for `repository`, None when it does. Its refusals are raised."""
    from huggingface_hub import errors

    try:
        api.repo_info(repository, revision=revision, timeout=10)
        return None
    except errors.HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code != 429:
            raise
        return f"the hub answers {error.response.status_code}"
    except (errors.HTTPError, OSError) as error:
        return f"the hub cannot be reached ({_first_line(error)})"


def _download(repository: str, revision: str | None, offline: bool) -> Path:
    """The snapshot with its texts and weights, a model's or an adapter's: safetensors, or where there are none, PyTorch's
    files."""
    directory = _fetch(repository, revision, offline, ["*.safetensors"])
    if not any(directory.glob("*.safetensors")):
        directory = _fetch(repository, revision, offline, ["pytorch_model*.bin", "adapter_model.bin"])
    return directory


def _fetch(repository: str, revision: str | None, offline: bool, weights: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, local_files_only=offline, allow_patterns=_TEXTS + weights,
                ignore_patterns=_COPIES,
            )
        )  # fmt: skip
    except errors.LocalEntryNotFoundError as error:
        # A snapshot that another program filled only in part; whether the part is enough shows on opening.
        partial = getattr(error, "snapshot_path", None)
        if not offline or partial is None:
            raise
        return Path(partial)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
