"""llama.cpp's file of log-probabilities: one it wrote, ones written here, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.logits_file import (
    LogitsFileError,
    LogitsReader,
    LogitsWriter,
    decode_rows,
    encode_rows,
    scored_positions,
)


@pytest.fixture
def golden(root: Path) -> Path:
    return root / "tests" / "golden" / "logits" / "stories260K.logits"


def header(n_ctx: int = 4, n_vocab: int = 5, chunks: int = 1) -> bytes:
    return struct.pack("<8sIii", b"_logits_", n_ctx, n_vocab, chunks)


TOKENS = struct.pack("<4i", 1, 2, 3, 4)
ROW = struct.pack("<ff6H", 1 / 65535, -2.0, 0, 1, 2, 3, 65535, 77)  # a vocabulary of 5, filled up
WHOLE = header() + TOKENS + ROW


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def random_logits(seed: int, rows: int, n_vocab: int, spread: float = 4.0) -> np.ndarray:
    return spread * np.random.default_rng(seed).standard_normal((rows, n_vocab), np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_bytes_by_hand(tmp_path):
    with LogitsReader(written(tmp_path / "a.logits", WHOLE)) as file:
        assert (file.n_ctx, file.n_vocab, file.rows_per_chunk) == (4, 5, 1)
        assert file.tokens.tolist() == [[1, 2, 3, 4]] and file.targets(0).tolist() == [4]
        (rows,) = file
    np.testing.assert_allclose(rows, [[-2, -2 + 1 / 65535, -2 + 2 / 65535, -2 + 3 / 65535, -1]], rtol=1e-7)
    assert rows.dtype == np.float32


def test_which_positions_have_rows():
    assert list(scored_positions(8)) == [4, 5, 6]
    assert list(scored_positions(7)) == [3, 4, 5]
    assert not scored_positions(2)


def test_a_row_is_encoded_as_llama_cpp_rounds():
    logits = np.array([[0, -1, -8, -16, -40, -np.inf, np.float32(-16 * 0.5 / 65535)]], np.float32)
    rows = encode_rows(logits)
    scale, least = rows[0, :4].view("<f4")
    total = np.log(np.exp(logits.astype(np.float64)).sum())
    assert scale == np.float32(16 / 65535) and least == pytest.approx(-16 - total, rel=1e-7)
    # half-way codes go to the even one: 32767.5 and 65534.5
    assert rows[0, 4:].tolist() == [65535, 61439, 32768, 0, 0, 0, 65534, 0]


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 1e-6, 1, 9, 1e4]))
def test_encoding_keeps_log_probabilities_to_half_a_code(seed, rows, n_vocab, spread):
    logits = random_logits(seed, rows, n_vocab, spread)
    exact = log_softmax(logits)
    kept = np.maximum(exact, exact.max(1, keepdims=True) - 16)
    np.testing.assert_allclose(decode_rows(encode_rows(logits), n_vocab), kept, rtol=1e-6, atol=0.000125)


def test_llama_cpps_own_file_is_written_again_to_the_byte(golden, tmp_path):
    """Log-probabilities are logits, too, but for rounding: codes and tokens come back, the floats nearly so."""
    copy = tmp_path / "copy.logits"
    with LogitsReader(golden) as file, LogitsWriter(copy, file.tokens, file.n_vocab, file.n_ctx) as writer:
        assert (file.n_ctx, file.n_vocab, file.tokens.shape) == (24, 512, (10, 24))
        for log_probs in file:
            assert log_probs.shape == (11, 512)
            assert np.exp(log_probs.astype(np.float64)).sum(1) == pytest.approx(1, abs=1e-3)
            writer.add(log_probs)
        first = 20 + file.tokens.nbytes
    ours, theirs = copy.read_bytes(), golden.read_bytes()
    assert len(ours) == len(theirs) and ours[:first] == theirs[:first]
    ours, theirs = (
        np.frombuffer(x, "<u2", offset=first).reshape(110, -1).astype(int) for x in (ours, theirs)
    )
    assert np.abs(ours[:, 4:] - theirs[:, 4:]).max() <= 1
    assert (ours[:, 4:] != theirs[:, 4:]).mean() < 0.01


@pytest.mark.parametrize("n_vocab", [6, 7])
def test_rows_may_come_in_any_portions(tmp_path, n_vocab):
    tokens = [np.arange(9) % n_vocab, np.arange(9)[::-1] % n_vocab]
    logits = random_logits(0, 2 * len(scored_positions(9)), n_vocab)
    path = tmp_path / "a.logits"
    with LogitsWriter(path, tokens, n_vocab, 9) as writer:
        for rows in (slice(0, 1), slice(1, 6), slice(6, None)):
            writer.add(logits[rows])
        assert not path.exists()
    with LogitsReader(path) as file:
        np.testing.assert_array_equal(file.tokens, tokens)
        np.testing.assert_array_equal(np.concatenate(list(file)), decode_rows(encode_rows(logits), n_vocab))
        np.testing.assert_array_equal(file.log_probs(1, 1, 2), file.log_probs(1)[1:3])
        with pytest.raises(IndexError):
            file.log_probs(1, 3, 2)
    assert list(tmp_path.iterdir()) == [path]


def test_an_incomplete_file_is_removed_and_an_older_one_stays(tmp_path):
    path = written(tmp_path / "a.logits", b"older")
    with pytest.raises(LogitsFileError, match="got 3 rows of logits for 4 predicted tokens"):
        with LogitsWriter(path, [np.zeros(9, int)], 6, 9) as writer:
            writer.add(random_logits(0, 3, 6))
    with pytest.raises(KeyboardInterrupt):
        with LogitsWriter(path, [np.zeros(9, int)], 6, 9) as writer:
            raise KeyboardInterrupt
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "a.logits"
    for tokens, n_ctx in (([np.zeros(8, int)], 9), ([], 9), ([np.zeros(2, int)], 2)):
        with pytest.raises(LogitsFileError, match=f"n_ctx = {n_ctx}"):
            LogitsWriter(path, tokens, 6, n_ctx)
    with pytest.raises(LogitsFileError, match="token 6 in a vocabulary of 6"):
        LogitsWriter(path, [np.full(9, 6)], 6, 9)
    nan, infinite = random_logits(0, 4, 6), random_logits(0, 4, 6)
    nan[2, 1], infinite[3, 0] = np.nan, np.inf
    wrong = [
        (random_logits(0, 5, 6), "row 5 of 4"),
        (random_logits(0, 4, 7), r"\(4, 7\) in a file for 6"),
        (nan, "the logits of row 2 are NaN"),
        (infinite, "the logits of row 3 are NaN or infinite"),
    ]
    for logits, message in wrong:
        with (
            pytest.raises(LogitsFileError, match=message),
            LogitsWriter(path, [np.zeros(9, int)], 6, 9) as file,
        ):
            file.add(logits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"GGUF" + WHOLE[4:], "starts with b'GGUFits_', not b'_logits_'"),
        (b"", "starts with b''"),
        (WHOLE[:15], "15 bytes, the header alone has 20"),
        (WHOLE[:-1], "take 56 bytes, the file has 55"),
        (WHOLE + b"\0", "take 56 bytes, the file has 57"),
        (header(chunks=2**31 - 1) + TOKENS + ROW, "the file has 56"),
        (header(n_ctx=2**32 - 1, n_vocab=2**31 - 1, chunks=2**31 - 1), "the file has 20"),
        (header(chunks=-1) + TOKENS + ROW, "-1 chunks of 4 tokens, a vocabulary of 5: one is too small"),
        (header(n_vocab=0) + TOKENS + ROW, "vocabulary of 0: one is too small"),
        (header(n_ctx=2) + TOKENS + ROW, "1 chunks of 2 tokens"),
        (header() + struct.pack("<4i", 1, 5, 3, 4) + ROW, "token 5 in a vocabulary of 5"),
        (header() + struct.pack("<4i", 1, -1, 3, 4) + ROW, "token -1 in a vocabulary of 5"),
    ],
    ids=range(12),
)
def test_damaged_headers(tmp_path, content, message):
    with pytest.raises(LogitsFileError, match=message):
        LogitsReader(written(tmp_path / "a.logits", content))


@pytest.mark.parametrize(
    "scale, least", [(np.nan, -1), (-1e-5, -1), (1e-5, np.nan), (1e-5, -np.inf), (1, -1), (np.inf, -np.inf)]
)
def test_damaged_rows(tmp_path, scale, least):
    content = header() + TOKENS + struct.pack("<ff", scale, least) + ROW[8:]
    with LogitsReader(written(tmp_path / "a.logits", content)) as file:
        with pytest.raises(LogitsFileError, match="row 0 has scale .* make it again"):
            list(file)


@given(data=st.data())
def test_no_bytes_cause_another_error(data, tmp_path_factory):
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path_factory.getbasetemp() / "fuzz.logits", bytes(content))
    try:
        with LogitsReader(path) as file:
            assert all(np.isfinite(rows).all() for rows in file)
    except LogitsFileError:
        pass


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LogitsFileError, match="a.logits: cannot be read: No such file"):
        LogitsReader(tmp_path / "a.logits")


def test_a_file_cut_short_while_it_is_read(tmp_path):
    path = written(tmp_path / "a.logits", WHOLE)
    with LogitsReader(path) as file:
        written(path, WHOLE[:-2])
        with pytest.raises(LogitsFileError, match="cut short"):
            list(file)
