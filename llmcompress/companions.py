"""The files beside a checkpoint's weights that another one made of it needs, too."""

from __future__ import annotations

import shutil
from pathlib import Path

# What lies beside the weights and is copied: tokenizer, generation config, chat template and the model's own code; not what
# describes these very weights.
COMPANIONS = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
NOT_COPIED = {"config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "adapter_config.json",
              "finetune.json", "prune.json"}  # fmt: skip


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights: tokenizer, chat template, licence and the like."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in COMPANIONS or file.name.upper().startswith("LICENSE")
        listed = file.name.endswith(".index.json") or file.name in NOT_COPIED
        if wanted and not listed and file.is_file():
            shutil.copyfile(file, folder / file.name)
