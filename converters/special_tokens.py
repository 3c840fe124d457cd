"""The tokens with a role: which begins a text, which ends it, and whether they are added to every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmcompress.converters import rwkv_world
from llmcompress.converters.tokenizer_files import TokenizerFiles, configs_of

# Role as Hugging Face names it -> GGUF's key, after gguf-py's constants (the misspelling is the format's).
KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "prefix": "fim_pre_token_id",
    "suffix": "fim_suf_token_id",
    "middle": "fim_mid_token_id",
}
_IN_CONFIG = ("bos", "eos", "unk", "sep", "pad", "mask")
_ENDS = ("eos", "eot", "eom")
_IN_SENTENCEPIECE = ("bos", "eos", "unk", "pad")

# Texts by which llama.cpp knows that a token ends generation, whatever the metadata says.
_KNOWN_ENDS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> "
    "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <｜end▁of▁sentence｜>".split()
)


@dataclass(frozen=True)
class SpecialTokens:
    """`ids` by the names of KEYS; `extra` are special tokens without a role."""

    ids: dict[str, int]
    extra: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_sep: bool | None  # None: not to be said
    notes: tuple[str, ...]


def find_special_tokens(
    files: TokenizerFiles, config: dict[str, Any], ids: dict[str, int], size: int, algorithm: str
) -> SpecialTokens:
    """Looks in tokenizer_config.json, special_tokens_map.json, the tokenizer itself, config.json and
    generation_config.json, in this order.

    `ids` maps token texts to ids, `size` is the number of tokens, `algorithm` llama.cpp's.
    """
    if algorithm == "rwkv":
        roles = {"bos": rwkv_world.ENDS, "eos": rwkv_world.ENDS, "eot": rwkv_world.PAUSE}
        return SpecialTokens(
            {role: ids[text] for role, text in roles.items() if text in ids}, (), False, False, None, ()
        )
    notes: list[str] = []
    first, last = _template(files)
    found = _named(files, ids)
    end = "sep" if algorithm == "bert" else "eos"
    if end == "sep" and (begins := _text(files.config.get("cls_token"))) in ids:
        found.setdefault("bos", ids[begins])
    _take_template(found, ids, {"bos": first, end: last}, notes)
    for role in _IN_CONFIG:
        for source in (*configs_of(config), files.generation_config):
            for id in _numbers(source.get(f"{role}_token_id"), size)[:1]:
                found.setdefault(role, id)
    _take_other_ends(found, [files.generation_config, *configs_of(config)], ids, size, notes)
    if end not in found:
        notes.append(
            f"no file names the {end} token: llama.cpp takes its own default for this kind of tokenizer"
        )
    add_bos = _adds(files, "bos", first, found, algorithm == "llama", notes)
    adds_end = _adds(files, end, last, found, False, notes)
    add_eos, add_sep = (False, adds_end) if end == "sep" else (adds_end, None)
    if end == "sep" and not (add_bos and add_sep):
        notes.append("llama.cpp puts a token before and after every text, which this tokenizer does not")
    return SpecialTokens(found, _extra(files, ids), add_bos, add_eos, add_sep, tuple(notes))


def _text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _named(files: TokenizerFiles, ids: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for role in KEYS:
        for source in (files.config, files.special_tokens_map):
            text = _text(source.get(f"{role}_token"))
            if text in ids:
                found.setdefault(role, ids[text])
    text = _text(files.model.get("unk_token"))
    for id in [ids[text]] if text in ids else _numbers(files.model.get("unk_id"), len(ids)):
        found.setdefault("unk", id)
    if files.json is None and files.sentencepiece is not None:
        for role in _IN_SENTENCEPIECE:
            for id in _numbers(getattr(files.sentencepiece, f"{role}_id"), len(ids)):
                found.setdefault(role, id)
    return found


def _extra(files: TokenizerFiles, ids: dict[str, int]) -> tuple[int, ...]:
    lists = [files.config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    texts = [_text(entry) for entries in lists if isinstance(entries, list) for entry in entries]
    return tuple(ids[text] for text in texts if text in ids)


def _template(files: TokenizerFiles) -> tuple[list[str] | None, list[str] | None]:
    """The tokens that tokenizer.json puts before and after a text; None where there is no tokenizer.json."""
    if files.json is None:
        return None, None
    steps = {step.get("type"): step for step in files.parts("post_processor")}
    for kind in ("RobertaProcessing", "BertProcessing"):
        if kind in steps:
            return [_first(steps[kind].get("cls"))], [_first(steps[kind].get("sep"))]
    single = steps.get("TemplateProcessing", {}).get("single")
    pieces = single if isinstance(single, list) else []
    texts = [
        _first(piece.get("SpecialToken")) if isinstance(piece, dict) and "SpecialToken" in piece else None
        for piece in pieces
    ]
    text_at = texts.index(None) if None in texts else len(texts)
    return [text for text in texts[:text_at] if text], [text for text in texts[text_at:] if text]


def _first(token: Any) -> str:
    """The text of a token written `["<s>", 0]` or `{"id": "<s>", ...}`."""
    if isinstance(token, list) and token:
        return str(token[0])
    return str(token.get("id")) if isinstance(token, dict) else str(token)


def _take_template(
    found: dict[str, int], ids: dict[str, int], added: dict[str, list[str] | None], notes: list[str]
) -> None:
    """What tokenizer.json adds counts, whatever role tokenizer_config.json gives that token."""
    for role, tokens in added.items():
        if not tokens:
            continue
        if len(tokens) > 1:
            notes.append(
                f"tokenizer.json adds {len(tokens)} tokens where llama.cpp adds one: {' '.join(tokens)}"
            )
        id = ids.get(tokens[0] if role == "bos" else tokens[-1])
        if id is None or found.get(role) == id:
            continue
        if role in found:
            notes.append(
                f"{role} is id {id}, which tokenizer.json adds, not {found[role]} of tokenizer_config.json"
            )
            if role == "eos":
                found.setdefault("eot", found["eos"])
        found[role] = id


def _take_other_ends(
    found: dict[str, int], sources: list[dict], ids: dict[str, int], size: int, notes: list[str]
) -> None:
    """Ids that end generation besides eos: llama.cpp knows some by their text, others as eot or eom."""
    ends = list(dict.fromkeys(id for source in sources for id in _numbers(source.get("eos_token_id"), size)))
    if ends and found["eos"] not in ends:
        notes.append(
            f"eos is id {found['eos']} by the tokenizer, {ends} by config.json or generation_config.json"
        )
    texts = {id: text for text, id in ids.items() if id in ends}
    for id in ends:
        if texts.get(id) in _KNOWN_ENDS or id in (found.get(role) for role in _ENDS):
            continue
        role = next((role for role in _ENDS if role not in found), None)
        if role is None:
            notes.append(f"id {id} ends generation too, which GGUF has no key left to say")
        else:
            found[role] = id


def _numbers(value: Any, size: int) -> list[int]:
    """The token ids in a value that may be one, a list of them, or anything else."""
    values = value if isinstance(value, list) else [value]
    return [id for id in values if type(id) is int and 0 <= id < size]


def _adds(
    files: TokenizerFiles,
    role: str,
    added: list[str] | None,
    found: dict[str, int],
    default: bool,
    notes: list[str],
) -> bool:
    """Whether transformers adds the token: where there is a tokenizer.json, version 5 asks nothing else."""
    said = files.config.get(f"add_{role}_token")
    answer = bool(added) if added is not None else said if isinstance(said, bool) else default
    if isinstance(said, bool) and answer != said:
        notes.append(f"add_{role}_token is {answer} by tokenizer.json, {said} by tokenizer_config.json")
    if answer and role not in found:
        notes.append(f"add_{role}_token is true, but no file names the {role} token: none is added")
        return False
    return answer
