"""The model card: short, and nothing in it that was not known when the adapter was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.config import AdapterConfig
from ...core.files import write_atomically
from ...methods.registry import method_of

CARD_NAME = "README.md"
LIBRARY = "peft"  # what the hub calls the format


def _tags(config: AdapterConfig) -> list[str]:
    return ["halotune", str(method_of(config.peft_type).peft_type).lower()]


def card_text(config: AdapterConfig, parameters: int) -> str:
    method = method_of(config.peft_type).peft_type
    base = config.base_model_name_or_path
    field, size = config.size
    targets = config.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    lines = [
        "---",
        f"library_name: {LIBRARY}",
        *([f"base_model: {base}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in _tags(config)),
        "---",
        "",
        f"# {method} adapter" + (f" for {base}" if base else ""),
        "",
        f"- Method: {method}, {field} = {size}",
        f"- Adapted modules: {shown}",
        *([f"- Fully fine-tuned modules: {', '.join(config.modules_to_save)}"] if config.modules_to_save else []),
        f"- Numbers stored: {parameters:,}",
        "",
        "What it was trained on, and how good it is, is for its author to add.",
        "",
        "```python",
        "from halotune import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def write_card(file: Path, config: AdapterConfig, parameters: int) -> None:
    """Write the card, unless there is one: it may be its author's."""
    if not file.exists():
        write_atomically(file, lambda path: path.write_text(card_text(config, parameters), encoding="utf-8"))


def mark_card(file: Path, config: AdapterConfig) -> None:
    """Enter library, base model and tags into the front matter of a card that someone else wrote."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(file)
    data: Any = card.data
    data.library_name = LIBRARY
    data.base_model = data.base_model or config.base_model_name_or_path
    data.tags = list(dict.fromkeys([*(data.tags or []), *_tags(config)]))
    write_atomically(file, lambda path: path.write_text(str(card), encoding="utf-8"))
