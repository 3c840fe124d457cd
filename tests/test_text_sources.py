"""Every kind of source, and what is wrong with it, named by file and line."""

from __future__ import annotations

import builtins
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress import calibration_data
from llmcompress.documents import Conversation, TextError, document_of
from llmcompress.text_sources import read_documents, weighed_sources

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["text", "messages", "conversations", "prompt", "input", "output", "role", "content"]
            ),
            inner,
            max_size=4,
        )
    ),
)


def plain(document: str | Conversation) -> str:
    return document if isinstance(document, str) else document.plain


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".md", ".tex", ""])
def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes("\ufeffone\r\n\r\n---8<---\ntwo é\n".encode())
    assert read_documents(str(file)) == ["one\r\n\r\n---8<---\ntwo é\n"]


@pytest.mark.parametrize(
    "record, text",
    [
        ({"text": "a", "id": 1}, "a"),
        ({"content": "a", "text": None}, "a"),
        ({"prompt": "a", "completion": " b"}, "a b"),
        ({"prompt": "a", "response": "b"}, "a\nb"),
        ({"instruction": "a", "input": "", "output": "b"}, "a\nb"),
        ({"instruction": "a", "input": "x", "output": "b"}, "a\n\nx\nb"),
        ({"input": "a", "output": "b"}, "a\nb"),
        ({"question": "a", "answer": "b"}, "a\nb"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "x", "value": "b"}]}, "user: a\n\nx: b"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "user: a"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "assistant: "),
    ],
)  # fmt: skip
def test_records(record: dict, text: str) -> None:
    assert plain(document_of(record, "here")) == text


def test_a_json_file_may_be_one_list_of_records(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n {"text": "a"},\n {"prompt": "b", "completion": "c"}\n]\n')
    assert [plain(document) for document in read_documents(str(file))] == ["a", "b\nc"]
    file.write_text('[{"text": "a"}, 5]')
    with pytest.raises(TextError, match="record 2: 5, not an object"):
        read_documents(str(file))
    file.write_text("[" * 100_000)
    with pytest.raises(TextError, match="not valid JSON"):
        read_documents(str(file))


def test_jsonl_skips_empty_lines_and_texts_and_keeps_unicode_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b"}\r\n\n{"text": " "}\n{"text": "c"}', newline="")
    assert read_documents(str(file)) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no text in it"),
        (b" \n\n", "no text in it"),
        (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2: .*not an object"),
        (b'{"text": "a"}\n\n"b"\n', "line 3: .*not an object"),
        (b'{"body": "a"}\n', r"line 1: no text in the keys \['body'\]; known are text, content, messages"),
        (b'{"prompt": "a"}\n', "line 1: no text in the keys"),
        (b'{"text": 5}\n', "line 1: text: 5 is not text"),
        (b'{"text": "a\\u0000"}\n', "line 1: text: a NUL character at 1"),
        (b'{"text": "a\\ud800"}\n', r"line 1: text: half of a surrogate pair, \\ud800"),
        (b'{"text": "a"}\n{"text": "\0"}\n', "line 2: a NUL byte"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b"1" * 5000, "line 1: not valid JSON"),
        (b'{"messages": []}', "messages: .* is not a list of messages"),
        (b'{"messages": ["a"]}', "messages: message 1: 'a', not an object"),
        (b'{"messages": [{"content": "a"}]}', "message 1: the role is None"),
        (b'{"messages": [{"role": "user"}]}', "message 1: content: None is not text"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a part that is not text"),
        (b'{"prompt": 1, "completion": "b"}', "line 1: prompt: 1 is not text"),
        (b'{"prompt": [1], "completion": "b"}', "line 1: prompt and completion: message 1: 1, not an object"),
        (b'{"prompt": "a", "completion": ["b"]}', r"line 1: completion: \['b'\] is not text"),
    ],
)  # fmt: skip
def test_hostile_jsonl(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(data)
    with pytest.raises(TextError, match=message) as caught:
        read_documents(str(file))
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@given(JSON)
def test_any_record_is_a_document_or_a_one_line_error(record: object) -> None:
    try:
        document = document_of(record, "here")
    except TextError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
    else:
        plain(document).encode()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no text in it"),
        (b"\xef\xbb\xbf\n", "no text in it"),
        (b"a\nb\0", "line 2: a NUL byte"),
        (b"a\n\nb\xe9", r"line 3: not UTF-8 \(byte 4\)"),
        ("a".encode("utf-16"), "line 1: a NUL byte"),
    ],
)
def test_hostile_texts(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    with pytest.raises(TextError, match=message):
        read_documents(str(file))


def test_too_large_and_not_a_file(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large.txt", tmp_path / "pipe"
    with large.open("wb") as file:
        file.truncate((1 << 30) + 1)
    os.mkfifo(pipe)
    with pytest.raises(TextError, match=f"{(1 << 30) + 1} bytes, the limit is {1 << 30}"):
        read_documents(str(large))
    with pytest.raises(TextError, match="not a file"):
        read_documents(str(pipe))


NOTHING = ["nothing-here", "a/b.jsonl", "a\0b", "x" * 5000, "", "../up/down", "./down", "a b/c"]


@pytest.mark.parametrize("name", NOTHING)
def test_a_name_that_is_nothing(name: str) -> None:
    with pytest.raises(TextError, match="no such file") as caught:
        read_documents(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_bundled_name_nearly_right() -> None:
    with pytest.raises(TextError, match="did you mean 'prose'"):
        read_documents("pros")


@pytest.mark.parametrize("name", calibration_data.NAMES)
def test_bundled_texts_have_documents(name: str) -> None:
    documents = read_documents(name)
    assert len(documents) > 1
    assert all(isinstance(document, Conversation) == (name == "dialogue") for document in documents)
    assert not any("---8<---" in plain(document) for document in documents)


def test_weights(tmp_path: Path) -> None:
    (odd := tmp_path / "a=2").write_text("x")
    names = calibration_data.NAMES
    assert weighed_sources(["prose=2", "x.txt"]) == {"prose": 2, "x.txt": 1}
    assert weighed_sources(["default=3"]) == pytest.approx({name: 3 / len(names) for name in names})
    assert weighed_sources(["prose", "default"])["prose"] == pytest.approx(1 + 1 / len(names))
    assert weighed_sources([str(odd), f"{odd}=0.5"]) == {str(odd): 1.5}


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "1e7", "two", ""])
def test_weights_that_are_none(number: str) -> None:
    with pytest.raises(TextError, match=rf"prose={number}: the weight '{number}' is not a number above 0"):
        weighed_sources([f"prose={number}"])
    with pytest.raises(TextError, match="no source of text"):
        weighed_sources([])


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts, chats = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "content": [None, "x", None]}), texts)
    assert read_documents(str(texts)) == ["one", "x", "two"]
    parquet.write_table(arrow.table({"messages": [[{"role": "user", "content": "Hi"}]]}), chats)
    assert [plain(document) for document in read_documents(str(chats))] == ["user: Hi"]
    parquet.write_table(arrow.table({"text": [b"a"]}), chats)
    with pytest.raises(TextError, match="row 1: text: b'a' is not text"):
        read_documents(str(chats))


def test_hostile_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [f"text {number}" for number in range(1000)]}), file)
    whole = bytearray(file.read_bytes())
    chance = random.Random(0)
    for data in [b"", b"PAR1", whole[:-20], *(bytearray(whole) for _ in range(30))]:
        if len(data) == len(whole):
            for at in chance.sample(range(len(data)), 20):
                data[at] ^= 0xFF
        file.write_bytes(data)
        try:
            read_documents(str(file))  # a flipped bit in a text is still a text
        except TextError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("org/name", "datasets")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, name: str, package: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"x")
    real = builtins.__import__

    def without(module: str, *rest: object, **more: object) -> object:
        if module.partition(".")[0] == package:
            raise ModuleNotFoundError(module)
        return real(module, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TextError, match=rf"{name}: needs {package}: pip install 'llmcompress\[calibrate\]'"):
        read_documents(name)


@pytest.mark.slow
def test_a_data_set_of_the_datasets_library(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"{split} {number}"}) + "\n" for number in range(9)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    assert read_documents("org/name") == [f"train {number}" for number in range(9)]
    assert read_documents("org/name::test", lambda rows: [rows - 1, 0]) == ["test 8", "test 0"]
    assert read_documents("org/name:default:train[:2]") == ["train 0", "train 1"]
    with pytest.raises(TextError, match="org/name::none: `datasets` cannot load it") as caught:
        read_documents("org/name::none")
    assert "\n" not in str(caught.value)
    with pytest.raises(TextError, match="org/other: `datasets` cannot load it"):
        read_documents("org/other")


def test_reading_texts_imports_no_optional_library() -> None:
    code = "import sys, llmcompress.token_rows as t; t.read_documents('prose'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pyarrow", "datasets"} & set(done.stdout.split())
