"""Batches whose samples go through different adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import HalotuneError

BASE = "__base__"  # this sample goes through the base alone


@dataclass(frozen=True)
class Rows:
    """Which adapter each sample of a batch uses; `"__base__"` for none."""

    names: tuple[str, ...]

    def groups(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Each name with the rows of `x` that it has. Samples may have become several rows each (beams, flat tokens)."""
        repeats, rest = divmod(x.shape[0], len(self.names))
        if rest or not repeats:
            raise HalotuneError(
                f"adapter_names: {len(self.names)} names, but a layer got {x.shape[0]} rows, which is no multiple. Give one "
                "name per sample of the batch."
            )
        return [
            (name, torch.tensor([i for i in range(x.shape[0]) if self.names[i // repeats] == name], device=x.device))
            for name in dict.fromkeys(self.names)
        ]

    def run(self, x: Tensor, call: Callable[[str, Tensor], Tensor]) -> Tensor:
        """`call(name, rows)` for every name, put together again."""
        groups = self.groups(x)
        if len(groups) == 1:
            return call(groups[0][0], x)
        parts = [call(name, x.index_select(0, index)) for name, index in groups]
        order = torch.argsort(torch.cat([index for _, index in groups]))
        return torch.cat(parts).index_select(0, order)
