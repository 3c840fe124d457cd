"""The real huggingface_hub against a small hub of our own on 127.0.0.1.

huggingface_hub reads its settings once, when it is imported, so each setting needs a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmcompress import hub
from llmcompress.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLAIN = [
    "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md",
    "LICENSE", "model.safetensors.index.json", "model-00001-of-00001.safetensors",
]  # fmt: skip
PICKLED = ["config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]
ADAPTER = ["adapter_config.json", "adapter_model.bin"]
# What a model's repository also holds, and nobody should wait for.
COPIES = [
    "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "original/consolidated.00.pth",
    "tf_model.h5", "model.Q4_0.gguf", "training_args.bin", "image.png",
]  # fmt: skip
REPOSITORIES = {
    "open/plain": PLAIN + COPIES,
    "open/other": PLAIN,
    "open/pickled": PICKLED + ["training_args.bin"],
    "open/adapter": ADAPTER + ["training_args.bin"],
    "gated/weights": ["config.json", "model.safetensors"],
}


def content(path: str) -> bytes:
    return f'{{"path": "{path}"}}'.encode()


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: same paths, codes and headers."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            repository, _, rest = path.removeprefix("/api/models/").partition("/")
            name, _, rest = rest.partition("/")
            self.api(f"{repository}/{name}", rest)
        else:
            repository, _, rest = path[1:].partition("/resolve/")
            self.file(repository, rest.partition("/")[2])

    do_HEAD = do_GET

    def api(self, repository: str, rest: str) -> None:
        if repository == "busy/model":
            self.answer(503)
        elif repository == "gated/hidden":
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif repository not in REPOSITORIES:
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif rest.startswith("tree/"):
            blob = {"type": "file", "oid": "0" * 40}
            files = [{**blob, "path": path, "size": len(content(path))} for path in REPOSITORIES[repository]]
            self.answer(200, {}, json.dumps(files).encode())
        elif rest in ("", "revision/main", "revision/v1.0", f"revision/{COMMIT}"):
            self.answer(200, {}, json.dumps({"id": repository, "sha": COMMIT}).encode())
        else:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})

    def file(self, repository: str, path: str) -> None:
        if repository.startswith("gated/"):
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(200, {"ETag": f'"{path.replace("/", "-")}"', "X-Repo-Commit": COMMIT}, content(path))

    def answer(self, code: int, headers: dict[str, str] = {}, body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


RESOLVE = """
import json, logging, sys
from llmcompress import hub
from llmcompress.errors import CheckpointError
notes = []
class Notes(logging.Handler):
    def emit(self, record):
        notes.append(record.getMessage())
logging.getLogger("llmcompress").addHandler(Notes())
answers = {}
for model in sys.argv[1:]:
    notes.clear()
    try:
        answers[model] = {"directory": str(hub.resolve(model)), "notes": list(notes)}
    except CheckpointError as error:
        answers[model] = {"error": str(error), "notes": list(notes)}
print(json.dumps(answers))
"""


def resolve(cache: Path, endpoint: str, offline: bool, *models: str) -> dict[str, dict[str, Any]]:
    """What `hub.resolve` says to each of `models`, in a new process with these settings."""
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }  # fmt: skip
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", RESOLVE, *models]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "gone" / "model-7b").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def online(cache) -> Iterator[dict[str, dict[str, Any]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield resolve(
            cache, f"http://127.0.0.1:{server.server_port}", False,
            "open/plain", "open/plain@v1.0", f"open/plain@{COMMIT}", "open/plain@nope", "open/pickled",
            "open/adapter", "gone/model", "gated/hidden", "gated/weights", "busy/model", "bad--id/x", "gone/model-7b",
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def offline(cache, online) -> dict[str, dict[str, Any]]:
    models = ("open/plain", "open/plain@v1.0", "open/pickled", "open/other")
    return resolve(cache, "http://127.0.0.1:9", True, *models)


@pytest.fixture(scope="module")
def unreachable(cache, online) -> dict[str, dict[str, Any]]:
    return resolve(cache, "http://127.0.0.1:9", False, "open/plain", "open/pickled", "open/other")


def files(answer: dict[str, Any]) -> set[str]:
    directory = Path(answer["directory"])
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_download_takes_what_is_needed_and_no_other_copy(online):
    answer = online["open/plain"]
    assert files(answer) == set(PLAIN) and not answer["notes"]
    assert (Path(answer["directory"]) / "config.json").read_bytes() == content("config.json")
    assert hub.origin(Path(answer["directory"])) == ("open/plain", COMMIT)


def test_pickles_are_fetched_only_where_there_is_nothing_better(online):
    assert files(online["open/pickled"]) == set(PICKLED)
    assert files(online["open/adapter"]) == set(ADAPTER)


def test_a_tag_and_a_commit_name_the_same_snapshot(online):
    tag, commit = online["open/plain@v1.0"], online[f"open/plain@{COMMIT}"]
    assert tag["directory"] == commit["directory"] == online["open/plain"]["directory"]


REFUSALS = {
    "open/plain@nope": r"open/plain: no revision 'nope' on the hub; give a branch",
    "gone/model": r"gone/model: no such directory, and no such model on the hub, or a private one.*"
    r"`hf auth login`; did you mean 'model-7b'\?",
    "gated/hidden": r"gated/hidden: a gated model; accept its licence on https://huggingface.co/gated/hidden",
    "gated/weights": r"gated/weights: a gated model; accept its licence",
    "busy/model": r"busy/model: no such directory, not in .* cache, and the hub answers 503; try again",
    "bad--id/x": r"bad--id/x: cannot be fetched from the hub: ",
}


@pytest.mark.parametrize("model, message", REFUSALS.items())
def test_refusals_of_the_hub(online, model, message):
    error = online[model]["error"]
    assert re.match(message, error), error
    assert "\n" not in error


def test_a_local_directory_comes_before_the_hub(online):
    assert online["gone/model-7b"]["directory"] == "gone/model-7b"


def test_offline_uses_the_cache_quietly(offline, online):
    for model in ("open/plain", "open/plain@v1.0", "open/pickled"):
        assert offline[model] == online[model]


def test_offline_and_not_in_the_cache(offline):
    expected = "open/other: no such directory, not in the hub's cache, and HF_HUB_OFFLINE is set; try again"
    assert offline["open/other"]["error"].startswith(expected)


def test_an_unreachable_hub_falls_back_to_the_cache_and_says_so(unreachable, online):
    for model in ("open/plain", "open/pickled"):
        assert unreachable[model]["directory"] == online[model]["directory"]
        (note,) = unreachable[model]["notes"]
        assert note.startswith(f"{model}: the hub cannot be reached (")
        assert note.endswith("; looking in the cache")


def test_an_unreachable_hub_and_nothing_in_the_cache(unreachable):
    assert re.match(
        r"open/other: no such directory, not in the hub's cache, and the hub cannot be reached \(.+\); try",
        unreachable["open/other"]["error"],
    )


def test_a_snapshot_that_another_program_filled_in_part(cache, online):
    """transformers fetches file by file and leaves out the README; it is the weights that count."""
    (Path(online["open/plain"]["directory"]) / "README.md").unlink()
    answer = resolve(cache, "http://127.0.0.1:9", True, "open/plain")["open/plain"]
    assert files(answer) == set(PLAIN) - {"README.md"}


@pytest.mark.parametrize(
    "model, message",
    [
        ("./tiny-lama", r"./tiny-lama: no such directory, and not a hub id .*; did you mean 'tiny-llama'\?"),
        ("tiny-lama", r"did you mean 'tiny-llama'\?"),
        ("models/tiny/lama", r"no such directory, and not a hub id \(org/name\)"),
        ("weights.gguf", "weights.gguf: a file; give the model's directory"),
    ],
)
def test_typing_errors(tmp_path, monkeypatch, model, message):
    (tmp_path / "tiny-llama").mkdir()
    (tmp_path / "weights.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        hub.resolve(model)


@pytest.mark.parametrize("folder", ["x", "snapshots/abc", "models--x/snapshots/abc", "models--a--b/refs/abc"])
def test_directories_that_are_no_snapshot(tmp_path, folder):
    assert hub.origin(tmp_path / folder) == (None, None)


def test_a_snapshot_tells_its_origin(tmp_path):
    assert hub.origin(tmp_path / "models--org--a--b" / "snapshots" / COMMIT) == ("org/a--b", COMMIT)
