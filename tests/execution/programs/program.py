"""A program, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTH, NARROW = 12, 8
PREFIX = "base_model.model."
Plan = tuple[Any, ...]
Instruction = tuple[Any, ...]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "gpt2": lambda: Conv1D(WIDTH, WIDTH),
    "conv1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "up": lambda: nn.Linear(WIDTH, NARROW),
    "down": lambda: nn.Linear(NARROW, WIDTH),
}


@dataclass(frozen=True)
class Program:
    """What a seed makes.

    Attributes:
        layers: path -> kind.
        alias: a layer that the model holds under the name "alias", too; or "".
        adapters: name -> method, and the paths that it adapts.
    """

    seed: int
    half: bool
    layers: dict[str, str]
    alias: str
    adapters: dict[str, tuple[str, tuple[str, ...]]]
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {'float32 and autocast' if self.half else 'float64'}"]
        lines += [f"  {path}: {kind}" for path, kind in self.layers.items()]
        lines += [f"  alias: {self.alias}"] if self.alias else []
        lines += [f"  adapter {name}: {method} on {', '.join(paths)}" for name, (method, paths) in self.adapters.items()]
        return "\n".join([*lines, *(f"{i:3}. {readable(instruction)}" for i, instruction in enumerate(self.instructions))])


def readable(value: Any) -> str:
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return "[" + "; ".join(map(readable, value)) + "]"
        return " ".join(map(readable, value)) if value else "[]"
    if isinstance(value, dict):
        return ", ".join(f"{k}={readable(v)}" for k, v in value.items() if v)
    return str(value)
