from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, copy_sample, read_json


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


@pytest.mark.parametrize("where", ["files", "list", "string", "json"])
def test_chat_templates_are_those_of_transformers(sample, where: str) -> None:
    (sample / "chat_template.jinja").unlink()
    settings = read_json(sample / "tokenizer_config.json")
    if where == "files":
        (sample / "chat_template.jinja").write_text("one")
        (sample / "additional_chat_templates").mkdir()
        (sample / "additional_chat_templates" / "tool_use.jinja").write_text("two")
    elif where == "list":
        named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
        settings["chat_template"] = named
    elif where == "string":
        settings["chat_template"] = "one"
    else:
        (sample / "chat_template.json").write_text(json.dumps({"chat_template": "one"}))
    (sample / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = read_vocabulary(sample, config(4096))
    metadata = vocabulary.metadata()
    assert metadata["tokenizer.chat_template"].value == "one"
    if where in ("files", "list"):
        assert metadata["tokenizer.chat_template.tool_use"].value == "two"
        assert metadata["tokenizer.chat_templates"].value == ["tool_use"]
    if where != "json":  # which transformers leaves to processors
        theirs = transformers.AutoTokenizer.from_pretrained(sample).chat_template
        assert vocabulary.chat_templates == (theirs if isinstance(theirs, dict) else {"default": theirs})
