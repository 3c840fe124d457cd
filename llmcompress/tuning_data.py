"""Documents to training examples: token ids and which of them the model shall learn to write.

Special tokens come once: a chat template writes its own, and what the tokenizer puts around a text is added where
the text lacks it. A text longer than an example is cut into consecutive examples; a conversation longer than one
loses its end, and is left out where no answer is left. Nothing is lost in silence: every case is counted in a note.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmcompress.answers import AnsweredText, answered_texts, whole_texts
from llmcompress.documents import TextError
from llmcompress.errors import shown
from llmcompress.text_sources import read_documents, weighed_sources
from llmcompress.token_stream import Tokenise

MOST_VALIDATED = 1000  # examples held out where a fraction is asked for
LOSSES = ("answers", "all")


@dataclass(frozen=True)
class Example:
    """Token ids, int32 `(n,)`, and the ones to be learned, bool `(n,)`, of which the first is none: nothing comes
    before it."""

    ids: np.ndarray
    learned: np.ndarray

    def key(self) -> bytes:
        return self.ids.tobytes() + self.learned.tobytes()


@dataclass(frozen=True)
class TuningData:
    """What to train on, what to measure by, and what the user should know."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    sources: tuple[str, ...]
    sha256: str  # of all examples in order
    notes: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Examples, tokens and learned tokens of both parts."""
        counts = {}
        for name, part in (("train", self.train), ("validation", self.validation)):
            counts |= {
                f"{name}_examples": len(part),
                f"{name}_tokens": sum(len(example.ids) for example in part),
                f"{name}_learned_tokens": sum(int(example.learned.sum()) for example in part),
            }
        return counts


class ExampleReader:
    """Reads sources into examples of at most `length` tokens, and keeps count of what did not fit.

    `tokenizer` is a fast tokenizer of transformers; `loss` is "answers", or "all" for every token; with `plain` no chat
    template is used. Raises TextError.
    """

    def __init__(self, tokenizer: Any, length: int, loss: str, plain: bool) -> None:
        if loss not in LOSSES:
            raise TextError(f"--loss {loss}: is none of {', '.join(LOSSES)}")
        if length < 2:
            raise TextError(f"--max-length {length}: an example needs at least 2 tokens")
        if not getattr(tokenizer, "is_fast", False):
            raise TextError(
                "the tokenizer does not say where its tokens lie in a text; save it as tokenizer.json"
            )
        self.tokenise, self.length, self.plain = Tokenise(tokenizer), length, plain
        self.texts = answered_texts if loss == "answers" else whole_texts
        self.notes: list[str] = []

    def read(self, source: str) -> list[Example]:
        """The examples of one source. Raises TextError where there are none."""
        return [example for own in self.read_together(source) for example in own]

    def read_together(self, source: str) -> list[list[Example]]:
        """The examples of one source, those of a conversation together; a text's pieces are each by themselves.

        Raises TextError where there are none.
        """
        refusals: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        examples: list[list[Example]] = []
        for document in read_documents(source):
            own: list[Example] = []
            for text in self.texts(document, self.tokenise.tokenizer, self.plain, refusals):
                own += self._examples(text, isinstance(document, str), lost)
            examples += [[example] for example in own] if isinstance(document, str) else [own] * bool(own)
        lost.update({f"left out: {reason}": count for reason, count in refusals.items()})
        notes = [f"{source}: {count} conversations {what}" for what, count in lost.items()]
        if not examples:
            raise TextError(f"{source}: nothing to learn in it" + (f" ({'; '.join(notes)})" if notes else ""))
        self.notes += notes
        return examples

    def _examples(self, text: AnsweredText, divide: bool, lost: Counter[str]) -> list[Example]:
        ids, learned = self._tokens(text)
        if divide:
            pieces = [slice(at, at + self.length) for at in range(0, len(ids), self.length)]
        else:
            pieces = [slice(0, self.length)]
            if len(ids) > self.length:
                what = "cut to" if learned[1 : self.length].any() else "left out: no answer in the first"
                lost[f"{what} {self.length} tokens"] += 1
            elif not learned[1:].any():
                lost["left out: no answer of an assistant in them"] += 1
        examples = []
        for piece in pieces:
            part = learned[piece].copy()
            part[:1] = False
            if part.any():
                examples.append(Example(ids[piece], part))
        return examples

    def _tokens(self, text: AnsweredText) -> tuple[np.ndarray, np.ndarray]:
        """Ids and what is learned of them: tokens that reach into a span, and the end of a text whose end is."""
        given = self.tokenise.tokenizer(
            text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = given["input_ids"]
        offsets = np.array(given["offset_mapping"], np.int64).reshape(-1, 2)
        learned = np.zeros(len(ids), bool)
        for start, end in text.spans:
            learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        begins, ends = self.tokenise.around(ids, text.text)
        if not text.ends and _stops(ids, self.tokenise.tokenizer):
            ends = []
        to_the_end = bool(text.spans) and text.spans[-1][1] == len(text.text)
        learned = np.concatenate([np.zeros(len(begins), bool), learned, np.full(len(ends), to_the_end)])
        return np.array([*begins, *ids, *ends], np.int32), learned


def _stops(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether a template's text ends with a special token, white space behind it aside: then it says its end itself."""
    special = set(tokenizer.added_tokens_decoder)
    for token in reversed(ids[-4:]):
        if token in special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def tuning_data(reader: ExampleReader, sources: Sequence[str], validation: str, seed: int = 0) -> TuningData:
    """Examples of `sources`, each NAME or NAME=WEIGHT (see text_sources.py): a weight of 2 shows an example twice in an
    epoch, one of 0.5 half of them, drawn once.

    `validation` is a source of its own, or the fraction of the examples to hold out, 0 for none; examples that are
    the same, or of one conversation, stay together, so that none is trained on and measured by. Raises TextError.
    """
    weights = weighed_sources(sources, share=False)
    together = {name: reader.read_together(name) for name in weights}
    found = {name: [example for own in part for example in own] for name, part in together.items()}
    fraction = _fraction(validation)
    if fraction is None:
        measured = reader.read(validation)
        held = {example.key() for example in measured}
    else:
        held = _held_out([own for part in together.values() for own in part], fraction, seed)
        measured = list({e.key(): e for part in found.values() for e in part if e.key() in held}.values())
    train = []
    for name, weight in weights.items():
        kept = [example for example in found[name] if example.key() not in held]
        if fraction is None and len(kept) < len(found[name]):
            twice = len(found[name]) - len(kept)
            reader.notes.append(f"{name}: {twice} examples are in {validation}, too: not trained on")
        train += _repeated(kept, weight, random.Random(f"{seed} {name}"))
    if not train:
        raise TextError(f"{', '.join(weights)}: no example is left to train on; hold out less")
    digest = _digest([*train, *measured])
    return TuningData(tuple(train), tuple(measured), tuple(sources), digest, tuple(reader.notes))


def _held_out(conversations: Sequence[Sequence[Example]], fraction: float, seed: int) -> set[bytes]:
    """Keys of a drawn part of all distinct examples: whole conversations, and all that begin with the same example."""
    alike: dict[bytes, dict[bytes, None]] = {}
    for own in conversations:
        alike.setdefault(own[0].key(), {}).update(dict.fromkeys(example.key() for example in own))
    groups = list(alike.values())
    random.Random(f"{seed} held out").shuffle(groups)
    wanted = min(MOST_VALIDATED, round(fraction * len({key for group in groups for key in group})))
    held: set[bytes] = set()
    for group in groups:
        if len(held) >= wanted:
            break
        held |= group.keys()
    return held


def _fraction(validation: str) -> float | None:
    """The number that `validation` is, or None where it is a source."""
    try:
        fraction = float(validation)
    except ValueError:
        return None
    if not 0 <= fraction < 1:
        raise TextError(f"--validation {shown(validation)}: give a fraction from 0 to 1, or a file")
    return fraction


def _repeated(examples: list[Example], weight: float, chance: random.Random) -> list[Example]:
    """Each as often as `weight` says; of its fraction, a drawn part of the examples."""
    rest, whole = math.modf(weight)
    drawn = sorted(chance.sample(range(len(examples)), round(rest * len(examples))))
    return examples * int(whole) + [examples[at] for at in drawn]


def _digest(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(example.ids.astype("<i4").tobytes() + example.learned.tobytes())
    return digest.hexdigest()
