"""The tokens with a role: which begins a text, which ends it, and whether they are added to every text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmcompress.converters.tokenizer_files import TokenizerFiles

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

# Texts by which llama.cpp finds tokens that end a turn, whatever the metadata says.
_ENDS_KNOWN = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> [EOT] [EOS] "
    "<|end_of_text|> <end_of_utterance> <eos> <turn|> <｜end▁of▁sentence｜>".split()
)


@dataclass(frozen=True)
class SpecialTokens:
    """`ids` by the names of KEYS."""

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...]


def find_special_tokens(
    files: TokenizerFiles, config: dict[str, Any], ids: dict[str, int], size: int, add_bos: bool
) -> SpecialTokens:
    """Looks in tokenizer_config.json, special_tokens_map.json, tokenizer.json's template, generation_config.json and
    config.json, in this order. `ids` maps token texts to ids, `size` is the number of tokens, and `add_bos` what
    holds where no file says whether a text begins with the bos token."""
    notes: list[str] = []
    found = _by_text(files, ids)
    first, last = _template(files)
    _take_template(found, ids, first, last, notes)
    for role in ("bos", "eos", "unk", "sep", "pad", "mask"):
        for source in (config, config.get("text_config") or {}, files.generation_config):
            _take_number(found, role, source.get(f"{role}_token_id"), size)
    _take_other_ends(found, files.generation_config, config, ids, size, notes)
    if "eos" not in found:
        notes.append("no file names the eos token: llama.cpp takes its own default for this kind of tokenizer")
    return SpecialTokens(
        found,
        _adds(files, "bos", first, found, add_bos, notes),
        _adds(files, "eos", last, found, False, notes),
        tuple(notes),
    )


def _by_text(files: TokenizerFiles, ids: dict[str, int]) -> dict[str, int]:
    found = {}
    for role in KEYS:
        for source in (files.config, files.special_tokens_map):
            entry = source.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text in ids:
                found.setdefault(role, ids[text])
    unknown = files.model.get("unk_id")
    if type(unknown) is not int:
        unknown = ids.get(files.model.get("unk_token"))
    if unknown is not None:
        found.setdefault("unk", unknown)
    if files.sentencepiece and not files.json:
        for role in ("bos", "eos", "unk", "pad"):
            number = getattr(files.sentencepiece, f"{role}_id")
            if number >= 0:
                found.setdefault(role, number)
    return found


def _template(files: TokenizerFiles) -> tuple[list[str] | None, list[str] | None]:
    """The tokens that tokenizer.json puts before and after a text; None where there is no tokenizer.json."""
    kinds = {part.get("type"): part for part in files.parts("post_processor")}
    for kind in ("RobertaProcessing", "BertProcessing"):
        if kind in kinds:
            return [str(kinds[kind]["cls"][0])], [str(kinds[kind]["sep"][0])]
    if "TemplateProcessing" not in kinds:
        return ([], []) if files.json else (None, None)
    template = kinds["TemplateProcessing"]
    steps = [step for step in template.get("single") or [] if isinstance(step, dict)]
    texts = [step["SpecialToken"].get("id") if "SpecialToken" in step else None for step in steps]
    at = texts.index(None) if None in texts else len(texts)
    return [str(t) for t in texts[:at]], [str(t) for t in texts[at + 1 :]]


def _take_template(found: dict, ids: dict, first: list | None, last: list | None, notes: list[str]) -> None:
    """The template's first and last token are what is added, whatever role the config gives them."""
    for role, tokens in (("bos", first), ("eos", last)):
        if not tokens:
            continue
        if len(tokens) > 1:
            notes.append(f"tokenizer.json adds {len(tokens)} {role} tokens ({' '.join(tokens)}), llama.cpp only one")
        number = ids.get(tokens[0] if role == "bos" else tokens[-1])
        if number is None or found.get(role) == number:
            continue
        if role in found:
            notes.append(f"{role} is id {number}, which tokenizer.json adds, not {found[role]} of tokenizer_config.json")
            if role == "eos":
                found.setdefault("eot", found["eos"])
        found[role] = number


def _take_number(found: dict[str, int], role: str, value: Any, size: int) -> None:
    number = value[0] if isinstance(value, list) and value else value
    if type(number) is int and 0 <= number < size:
        found.setdefault(role, number)


def _take_other_ends(
    found: dict[str, int], generation: dict, config: dict, ids: dict[str, int], size: int, notes: list[str]
) -> None:
    """Ids that end generation besides eos: llama.cpp knows some by their text, and takes eot and eom besides."""
    ends = [number for source in (generation, config) for number in _numbers(source.get("eos_token_id"), size)]
    if "eos" in found and ends and found["eos"] not in ends:
        notes.append(f"eos is id {found['eos']} by the tokenizer, {ends} by generation_config.json or config.json")
    texts = {number: text for text, number in ids.items() if number in ends}
    for number in dict.fromkeys(ends):
        if number in found.values() or texts.get(number) in _ENDS_KNOWN:
            continue
        role = next((role for role in ("eot", "eom") if role not in found), None)
        if role is None:
            notes.append(f"id {number} ends generation too, which GGUF has no room to say")
        else:
            found[role] = number


def _numbers(value: Any, size: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and 0 <= number < size]


def _adds(
    files: TokenizerFiles, role: str, template: list[str] | None, found: dict[str, int], default: bool, notes: list[str]
) -> bool:
    """Whether transformers adds the token: an explicit flag rebuilds the template, so it goes first."""
    said = files.config.get(f"add_{role}_token")
    if isinstance(said, bool):
        answer = said
        if template is not None and said != bool(template):
            notes.append(f"add_{role}_token is {said} by tokenizer_config.json, though tokenizer.json's template differs")
    else:
        answer = bool(template) if template is not None else default
    if answer and role not in found:
        notes.append(f"add_{role}_token is true, but no file names the {role} token: not added")
        return False
    return answer
