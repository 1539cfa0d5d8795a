"""Weights that accelerate keeps on the CPU or on disk, with the module's own tensor on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any | None:
    """The hook that brings the module's weights to where it runs, or None."""
    hook = getattr(module, "_hf_hook", None)
    for h in getattr(hook, "hooks", [hook]):
        if getattr(h, "offload", False) and getattr(h, "weights_map", None) is not None:
            return h
    return None


class Overlay(Mapping[str, Tensor]):
    """A map of offloaded weights with one replaced; the original map is never written to."""

    def __init__(self, replaced: dict[str, Tensor], original: Mapping[str, Tensor]) -> None:
        self.replaced, self.original = replaced, original

    def __getitem__(self, key: str) -> Tensor:
        return self.replaced[key] if key in self.replaced else self.original[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.original)

    def __len__(self) -> int:
        return len(self.original)
