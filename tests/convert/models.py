"""Small models, adapters on them, and files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Layers(nn.Module):
    """Every kind of layer that LyCORIS knows; names with `_` in them, and one that ends like another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, k, groups=g) for k, g in (((3, 1), 1), (1, 1), (1, 2)))
        self.time = nn.Conv1d(8, 6, 3, padding=1)
        self.block_0 = nn.ModuleDict({"to_q": nn.Linear(6, 10), "proj": nn.Linear(10, 6, bias=False)})
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x).tanh()
        for layer in self.down:
            x = layer(x).tanh()
        x = self.time(x.flatten(2)).mT
        return self.proj(x + self.block_0["proj"](self.block_0["to_q"](x).tanh()))

    @staticmethod
    def sample() -> Tensor:
        return torch.randn(2, 3, 6, 5)


def same(a: dict[str, Tensor] | Path, b: dict[str, Tensor] | Path) -> bool:
    """The same keys, dtypes and bits."""
    a, b = (load_file(t) if isinstance(t, Path) else t for t in (a, b))
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return all(a[k].dtype == t.dtype and a[k].shape == t.shape and torch.equal(a[k], t) for k, t in b.items())


@torch.no_grad()
def randomize(module: nn.Module, std: float = 0.3) -> nn.Module:
    for p in module.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=std)
    return module
