"""Records of runs: JSON documents with the number of their format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import write_atomically


def json_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    text = json_text(record) + "\n"
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_record(file: Path, format: int) -> dict[str, Any] | None:
    """The record in a file; None where there is none, or none of this format."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == format else None
