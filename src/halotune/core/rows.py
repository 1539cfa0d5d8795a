"""Batches whose samples go through different adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import HalotuneError

BASE = "__base__"  # this sample goes through the base alone


@dataclass
class Batch:
    """What the inputs of the running pass say.

    Attributes:
        model: that runs.
        rows: how many the batch has: samples, times beams.
        tokens: how many rows it may have with the tokens of each sample laid out one after the other.
    """

    model: Any
    rows: int
    tokens: set[int] = field(default_factory=set)

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take the sizes from the arguments of the model."""
        main = getattr(self.model, "main_input_name", "input_ids")
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
        names = (main, "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "inputs")
        inputs = [t for name in dict.fromkeys(names) if isinstance(t := kwargs.get(name), Tensor) and t.dim()]
        inputs = [*(t for t in args[:1] if isinstance(t, Tensor) and t.dim()), *inputs] or given[:1]
        if not inputs:
            return
        self.rows = inputs[0].shape[0]
        packed = any(t.is_floating_point() and t.dim() > 1 and t.shape[0] not in (1, self.rows) for t in given)
        self.tokens = set() if packed else {prod(leading(t)) for t in inputs}  # patches of images may be as many as tokens


@dataclass(frozen=True)
class Rows:
    """Which adapter each sample of a batch uses in one layer; `"__base__"` for none.

    Attributes:
        names: one per sample.
        batch: of the running pass.
        path: the layer.
        batch_first: what the modules around the layer say; "usual" where they say nothing, and it is the rule.
        is_convolution: its input has the batch, channels and sizes.
    """

    names: tuple[str, ...]
    batch: Batch
    path: str = "a layer"
    batch_first: bool | Literal["usual"] | None = None
    is_convolution: bool = False

    def _repeats(self, x: Tensor) -> int:
        """How many rows of x a sample has, where sizes prove it or the model says it."""
        sizes = x.shape[:1] if self.is_convolution else leading(x)
        rows = sizes[0] if sizes else 0
        repeats, rest = divmod(rows, len(self.names))
        if rest or not repeats:
            raise HalotuneError(
                f"adapter_names: {len(self.names)} names, but {self.path} got {rows} rows, which is no multiple. Give one "
                "name per sample of the batch."
            )
        flat = len(sizes) == 1 and not self.is_convolution
        if rows == self.batch.rows:
            if flat:  # not what an expert got of the tokens
                proven = "expert" not in self.path or self.batch.tokens <= {rows}
            else:
                proven = self.is_convolution or sizes[1] != rows or self.batch_first in (True, "usual")
        elif flat:
            proven = rows in self.batch.tokens and self.batch_first is not False
        else:
            proven = self.batch_first is True
        if not proven:
            remedy = "" if flat else "; or, where it is, set `batch_first = True` on a module around the layer"
            raise HalotuneError(
                f"adapter_names: {self.path} got an input {tuple(x.shape)} for a batch of {self.batch.rows}, and its sizes do "
                f"not prove that the first dimension is the batch. Run the adapters one at a time{remedy}."
            )
        return repeats

    def run(self, x: Tensor, call: Callable[[str, Tensor], Tensor]) -> Tensor:
        """`call(name, rows)` for every name, put together again. Samples may be several rows each (beams, flat tokens)."""
        if len(set(self.names)) == 1:
            return call(self.names[0], x)
        repeats, parts, order = self._repeats(x), [], []
        for name in dict.fromkeys(self.names):
            index = [i for i in range(x.shape[0]) if self.names[i // repeats] == name]
            parts.append(call(name, x.index_select(0, torch.tensor(index, device=x.device))))
            order += index
        return torch.cat(parts).index_select(0, torch.tensor(order, device=x.device).argsort())


class _Mixed(threading.local):
    """The batch of several adapters that this thread runs, and how each layer splits it."""

    batch: Batch | None = None
    rows: Mapping[Any, Rows] = MappingProxyType({})


MIXED = _Mixed()


def leading(x: Tensor) -> torch.Size:
    """All sizes but that of the features; ids have none."""
    return x.shape[:-1] if x.is_floating_point() else x.shape
