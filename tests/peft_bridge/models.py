"""Live models of the released peft, and what several tests do with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halotune
from halotune.integrations.peft_bridge.layer import FastLayer

from ..interop.models import base, randomize

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers")

# transformers 5 has new names for checkpointing, which peft does not know. Whatever else peft warns of is an error here.
calm = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

QV = ["q_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

LLAMA: dict[str, Any] = {
    "hra": lambda **kwargs: peft.HRAConfig(**{"r": 4, "target_modules": QV, **kwargs}),
    "loha": lambda **kwargs: peft.LoHaConfig(**{"r": 3, "alpha": 5, "target_modules": QV, **kwargs}),
    "miss": lambda **kwargs: peft.MissConfig(**{"r": 4, "target_modules": QV, **kwargs}),
    "oft": lambda **kwargs: peft.OFTConfig(**{"oft_block_size": 4, "target_modules": QV, **kwargs}),
    "bat": lambda **kwargs: peft.MissConfig(**{"r": 8, "init_weights": "bat", "target_modules": QV, **kwargs}),
}
every = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in LLAMA.items()])
# peft's OFT has an order of its own for several active adapters
in_order = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in LLAMA.items() if name != "oft"])


def live(config: Any, kind: str | nn.Module = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A live model of peft's in eval mode, away from its start."""
    model = kind if isinstance(kind, nn.Module) else base(kind, dtype)
    return randomize(peft.get_peft_model(model, config), seed).eval()


def two(config: Any, dtype: torch.dtype = torch.float32, **second: Any) -> Any:
    """The same with two adapters, "default" (active) and "b"."""
    model = live(config(), dtype=dtype)
    model.add_adapter("b", config(**second))
    model.set_adapter("b")
    randomize(model, seed=1)
    model.set_adapter("default")
    return model.eval()


def pair(model: Any) -> tuple[Any, Any]:
    """A copy as peft left it, and the model itself, fast."""
    return copy.deepcopy(model), halotune.speed_up(model)


def fast_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FastLayer)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(t, b[name]) for name, t in a.items())


class Single(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)
