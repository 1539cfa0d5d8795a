"""Layers by the name of their module."""

from __future__ import annotations

from collections.abc import Sequence

from ..report.grid import split
from .figures import Figures


def modules(layers: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Layers by the name of their module."""
    out: dict[str, list[Figures]] = {}
    where = split([layer.path for layer in layers])
    for layer in layers:
        out.setdefault(where[layer.path][1], []).append(layer)
    return out
