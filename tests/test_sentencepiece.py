from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import sentencepiece
from llmcompress.converters.sentencepiece import read_sentencepiece
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, train_gemma

from llmcompress.errors import LlmcompressError, TokenizerError


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    return train_gemma(tmp_path_factory.mktemp("gemma"))


def test_the_reader_of_tokenizer_model(shared) -> None:
    sources = [*(shared / "tokenizers").glob("*/*.model*"), *(shared / "models").glob("*/tokenizer.model")]
    assert len(sources) >= 7
    for source in sources:
        ours, theirs = read_sentencepiece(source), sentencepiece.SentencePieceProcessor(str(source))
        ids = range(theirs.vocab_size())
        assert ours.pieces == [theirs.id_to_piece(id) for id in ids]
        assert ours.scores == [theirs.get_score(id) for id in ids]
        for kind, says in {
            2: theirs.is_unknown,
            3: theirs.is_control,
            5: theirs.is_unused,
            6: theirs.is_byte,
        }.items():
            assert [t == kind for t in ours.types] == [says(id) for id in ids]
        assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (
            *(theirs.unk_id(), theirs.bos_id()),
            *(theirs.eos_id(), theirs.pad_id()),
        )


def test_a_broken_tokenizer_model_is_refused(gemma, tmp_path) -> None:
    whole = (gemma / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.5 else whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read_vocabulary(tmp_path, config(1220))
        except LlmcompressError:
            refused += 1
    assert refused > 100
    for data in (b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" + b"\xff" * 20, b"\x0a\x05\x0a\x03\xff\xfe\xfd"):
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: not a SentencePiece model"):
            read_vocabulary(tmp_path, config(1220))


def test_scores_that_are_no_numbers_are_refused(tmp_path) -> None:
    piece = b"\x0a\x01a\x15" + struct.pack("<f", float("nan"))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x02")
    with pytest.raises(TokenizerError, match="score is no number"):
        read_vocabulary(tmp_path, config(4))
