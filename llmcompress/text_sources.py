"""Where texts come from: bundled names, text files, JSONL, Parquet, data sets of the `datasets` library.

A source is written NAME or NAME=WEIGHT. NAME is, in this order: a bundled name (`default` is all of them,
which share its weight), a file or folder, or `org/name[:config[:split]]`. A file called like a bundled name
is `./code`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmcompress import calibration_data
from llmcompress.documents import Document, TextError, document_of
from llmcompress.errors import nearest, shown

LARGEST = 1 << 30  # bytes of text read from one file
HEAVIEST = 1e6  # weight
SEPARATOR = "---8<---"  # a line of its own between the documents of a bundled text
JSONL_NAMES = {"dialogue"}  # bundled names whose text is JSONL
DATASET = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^:]*(:.+)?)?")
FILES = {".txt", ".raw", ".md", ".jsonl", ".ndjson", ".json", ".parquet"}  # a missing one is no data set


def weighed_sources(sources: Sequence[str], share: bool = True) -> dict[str, float]:
    """The weight of each source, `default` taken apart; a source that comes twice has the sum of its weights.

    The parts of `default` share its weight, or, without `share`, have it each. Raises TextError for a weight that is not a number above 0 and for no sources at all.
    """
    weights: dict[str, float] = {}
    for source in sources:
        name, weight = _split_weight(source)
        parts = tuple(calibration_data.NAMES) if name == "default" else (name,)
        for part in parts:
            weights[part] = weights.get(part, 0.0) + weight / (len(parts) if share else 1)
    if not weights:
        raise TextError("no source of text is named; 'default' is the bundled texts")
    return weights


def _split_weight(source: str) -> tuple[str, float]:
    name, equals, number = source.rpartition("=")
    if not equals or os.path.exists(source):
        return source, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= HEAVIEST:
        raise TextError(f"{source}: the weight {shown(number)} is not a number above 0, at most {HEAVIEST:g}")
    return name, weight


def read_documents(name: str, pick: Callable[[int], Iterable[int]] = range) -> list[Document]:
    """The documents of a source, in its own order, without those of white space alone.

    Of a data set of the `datasets` library, which may be larger than memory, only the rows that `pick` names,
    given their number, are read. A text file is one document, as it stands.
    Raises TextError, naming file and line, for what cannot be read and for a source without documents.
    """
    try:
        found = [document for document in _documents(name, pick) if not _blank(document)]
    except OSError as error:
        raise TextError(f"{name}: cannot be read ({error.strerror})") from error
    if not found:
        raise TextError(f"{name}: no text in it; is it the right source?")
    return found


def _blank(document: Document) -> bool:
    return isinstance(document, str) and not document.strip()


def _documents(name: str, pick: Callable[[int], Iterable[int]]) -> Iterable[Document]:
    if name in calibration_data.NAMES:
        return _bundled(name)
    if os.path.exists(name):
        return _data_set(name, pick) if os.path.isdir(name) else _file(Path(name))
    if DATASET.fullmatch(name) and Path(name).suffix.lower() not in FILES:
        return _data_set(name, pick)
    known = (*calibration_data.NAMES, "default")
    raise TextError(
        f"{shown(name)}: no such file{nearest(name, known)}; give a file, org/name[:config[:split]] "
        f"or one of {', '.join(known)}"
    )


def _bundled(name: str) -> Iterable[Document]:
    text = calibration_data.read(name)
    if name in JSONL_NAMES:
        return _jsonl(text, name)
    return (part.strip("\n") for part in re.split(rf"^{re.escape(SEPARATOR)}$", text, flags=re.MULTILINE))


def _file(path: Path) -> Iterable[Document]:
    if not path.is_file():
        raise TextError(f"{path}: not a file; give a text, JSONL or Parquet file")
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise TextError(f"{path}: {size} bytes, the limit is {LARGEST}; give a part of it")
    text = _decoded(path.read_bytes(), path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        return _list(text, str(path))
    return _jsonl(text, str(path)) if path.suffix.lower() in {".jsonl", ".ndjson", ".json"} else [text]


def _decoded(data: bytes, path: Path) -> str:
    """The text in `data`, its line ends kept and a byte order mark left out."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise TextError(f"{path}: line {data.count(10, 0, nul) + 1}: a NUL byte; is it a text file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"{path}: line {line}: not UTF-8 (byte {error.start}); convert it to UTF-8") from None


def _jsonl(text: str, where: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON string
        if line.strip():
            at = f"{where}: line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TextError(f"{at}: not valid JSON ({shown(str(error))}); one object a line") from None
            yield document_of(record, at)


def _list(text: str, where: str) -> Iterator[Document]:
    """The documents of a whole file that is one list of records."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not valid JSON ({shown(str(error))})") from None
    return (document_of(record, f"{where}: record {number}") for number, record in enumerate(records, 1))


def _parquet(path: Path) -> Iterator[Document]:
    parquet = _imported("pyarrow.parquet", str(path))
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if size > LARGEST:
                raise TextError(f"{path}: {size} bytes unpacked, the limit is {LARGEST}; give a part of it")
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield document_of(record, f"{path}: row {row}")
    except TextError:
        raise
    except Exception as error:  # pyarrow's errors share no parent that the other libraries lack
        raise TextError(f"{path}: not readable as Parquet ({shown(str(error))}), after row {row}") from error


def _data_set(name: str, pick: Callable[[int], Iterable[int]]) -> Iterator[Document]:
    datasets = _imported("datasets", name)
    path, config, split = (name, "", "") if os.path.isdir(name) else (*name.split(":", 2), "", "")[:3]
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the hub, the disk, the builder: too many kinds to list
        reason = shown(str(error).split("\n")[0])
        raise TextError(
            f"{name}: `datasets` cannot load it ({reason}); is it org/name[:config[:split]]?"
        ) from error
    for row in pick(len(rows)):
        yield document_of(rows[row], f"{name}: row {row + 1}")


def _imported(module: str, where: str) -> Any:
    """An optional library, imported when a source needs it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.partition(".")[0]
        raise TextError(f"{where}: needs {package}: pip install 'llmcompress[calibrate]'") from None
