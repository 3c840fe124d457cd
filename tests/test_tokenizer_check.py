from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from llmcompress.converters import tokenizer_check
from llmcompress.converters.tokenizer import read_vocabulary
from llmcompress.converters.tokenizer_check import bundled_texts, check_tokenizer, fuzz_texts
from tokenizer_material import config, copy_sample, hf_tokenizer, read_json
from typer.testing import CliRunner
from vocabulary_file import write_vocabulary

from llmcompress import llama_tokenizer
from llmcompress.cli import app
from llmcompress.errors import GGUFError, TokenizerError

SAMPLE = "sample-llama-6m"


@pytest.fixture
def sample(root: Path, tmp_path: Path) -> Path:
    return copy_sample(root, tmp_path)


def written(folder: Path, rows: int = 4096, **changes: object) -> Path:
    metadata = read_vocabulary(folder, config(rows), **changes).metadata()
    write_vocabulary(metadata, folder / "vocabulary.gguf")
    return folder / "vocabulary.gguf"


def test_the_sample_agrees_everywhere(sample: Path) -> None:
    report = check_tokenizer(written(sample), sample)
    assert [(kind.texts, kind.differ) for kind in report.kinds] == [("bundled texts", 0), ("fuzz", 0)]
    assert [kind.compared for kind in report.kinds] == [len(bundled_texts()), tokenizer_check.FUZZ]
    assert report.added is None and report.tokenizer == sample / "tokenizer.json"


@pytest.mark.slow
def test_another_pre_tokenizer_is_seen_and_shown(sample: Path) -> None:
    file = written(sample, pre="gpt-2")
    tokenizer = hf_tokenizer(sample)
    texts = fuzz_texts(tokenizer_check.FUZZ)
    ours = llama_tokenizer.ids_of(file, texts)
    differ = [
        text for text, ids in zip(texts, ours) if ids != tokenizer.encode(text, add_special_tokens=False).ids
    ]
    assert len(differ) > 100
    done = CliRunner().invoke(app, ["inspect", str(file), "--tokenizer", str(sample), "--json"])
    kinds = json.loads(done.stdout)["kinds"]
    assert kinds[1]["differ"] == len(differ) and [one["text"] for one in kinds[1]["first"]] == differ[:5]
    shown = CliRunner().invoke(app, ["inspect", str(file), "--tokenizer", str(sample)])
    assert (
        f"fuzz: {len(differ)} of 2000 have other ids in llama.cpp ({len(differ) / 2000:.2%})" in shown.stdout
    )
    assert f"fuzz: {differ[0]!r}: from token" in shown.stdout


def test_what_is_put_before_a_text(sample: Path) -> None:
    file = written(sample)
    tokenizer = read_json(sample / "tokenizer.json")
    tokenizer["post_processor"] = None
    (sample / "tokenizer.json").write_text(json.dumps(tokenizer))
    added = check_tokenizer(file, sample).added
    assert added and len(added.llama_cpp) == len(added.tokenizer) + 1 == 2


@pytest.mark.slow
def test_a_sentencepiece_model_alone(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "tokenizers" / "llama-2" / "tokenizer.model", tmp_path)
    report = check_tokenizer(written(tmp_path, 32000), tmp_path)
    assert report.tokenizer == tmp_path / "tokenizer.model" and report.added is None
    assert [kind.differ for kind in report.kinds] == [0, 0]


@pytest.mark.slow
def test_vocab_json_and_merges_are_read_by_transformers(shared: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "tokenizers" / "gpt2" / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    report = check_tokenizer(written(tmp_path, 50257), tmp_path)
    assert [kind.differ for kind in report.kinds] == [0, 0]


@pytest.mark.slow
def test_files_that_llama_cpp_refuses_or_ends_at(sample: Path, tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(
        GGUFError, match=r"broken\.gguf: llama\.cpp's tokenizer ended with 1: .*does not load"
    ):
        check_tokenizer(broken, sample)
    metadata = read_vocabulary(sample, config(4096)).metadata()
    metadata["tokenizer.ggml.tokens"].value[7] = metadata["tokenizer.ggml.tokens"].value[
        8
    ]  # which it aborts on
    write_vocabulary(metadata, broken)
    with pytest.raises(GGUFError, match=r"llama\.cpp's tokenizer ended with -6"):
        check_tokenizer(broken, sample)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(llama_tokenizer, "library", llama_tokenizer.library.__wrapped__)
    with pytest.raises(GGUFError, match="pip install xllamacpp"):
        check_tokenizer(broken, sample)


def test_folders_without_a_tokenizer_that_can_be_run(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        check_tokenizer(written(sample), tmp_path / "empty")
