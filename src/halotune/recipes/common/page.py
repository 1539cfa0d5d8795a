"""A run's own page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def write_page(runs: Sequence[Path], output: Path) -> None:
    """The page of these runs; none where `halotune[report]` is not installed."""
    if find_spec("halotune.report.page") and find_spec("bokeh"):
        import_module("halotune.report.page").write_page(list(runs), output)
