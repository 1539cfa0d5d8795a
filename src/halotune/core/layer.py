"""A layer with adapters on it: composition, scale, merge and restore. It knows no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .base import Base, base_for
from .errors import HalotuneError
from .operator import Adapted, Operator
from .precision import exact_dtype


@dataclass(frozen=True)
class MergeRecord:
    """What one merge did to one weight.

    Attributes:
        delta: `‖W' − W‖ / ‖W‖`, before rounding.
        lost: `‖round(W') − W'‖ / ‖W' − W‖`: the share of the delta lost to the dtype of the base.
        changed: the share of the weights whose stored value changed.
    """

    delta: float
    lost: float
    changed: float


class AdaptedLayer(nn.Module):
    """`base_layer` with named adapters. The active ones compose as functions, in order: `W -> F2(F1(W))`.

    Where `merged_adapters` is not empty the stored weight holds those already, and a snapshot of the original is kept.
    """

    def __init__(self, base_layer: nn.Module, name: str = "") -> None:
        super().__init__()
        self._kind = type(base_for(base_layer, name))
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.enabled = True
        self._original: tuple[nn.Parameter, Tensor | None] | None = None

    @property
    def base(self) -> Base:
        """The base layer as a linear operator."""
        return self._kind(self.base_layer)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def operator(self) -> Operator:
        """The base with the adapters that are active and not merged yet."""
        op: Operator = self.base
        if self.enabled:
            for name in self.active_adapters:
                if name in self.adapters and name not in self.merged_adapters:
                    op = Adapted(op, self.adapters[name], self.scales[name])  # type: ignore[arg-type]
        return op

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise HalotuneError(
                f"{type(self.base_layer).__name__}: an adapted layer takes its input alone; got "
                f"{len(args)} more arguments and {sorted(kwargs)}. Leave this layer out with exclude_modules."
            )
        return self.operator()(x)

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        self.scales[name] = 1.0

    def remove(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        if name in self.adapters:
            del self.adapters[name], self.scales[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]

    # -- merging

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """The weight with these adapters applied in order, in fp32 or better; nothing is written."""
        W = self.base.weight().detach()
        W = W.to(exact_dtype(W.dtype))
        for name in names:
            adapted = self.adapters[name].weight(W)  # type: ignore[operator]
            W = adapted if self.scales[name] == 1.0 else torch.lerp(W, adapted, self.scales[name])
        return W

    @torch.no_grad()
    def merge(self, names: list[str], *, keep: bool = True, untie: bool = False) -> MergeRecord:
        """Write the adapters into the stored weight.

        Args:
            names: adapters of this layer that are not merged yet, in the order in which they apply.
            keep: hold a snapshot for `unmerge`.
            untie: write to a parameter of this layer's own; the tied one stays as it is.
        """
        base = self.base
        before, after = base.weight().detach(), self.merged_weight(names)
        if keep and self._original is None:
            self._original = base.parameter, None if untie else base.snapshot()
        before = before.clone()
        if untie:
            stored = base.parameter
            self.base_layer.weight = nn.Parameter(stored.detach().clone(), requires_grad=stored.requires_grad)
        self.base.write(after)
        self.merged_adapters = [*self.merged_adapters, *names]
        return _record(before, after, self.base.weight().detach())

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._original is not None:
            parameter, snapshot = self._original
            if snapshot is None:
                self.base_layer.weight = parameter
            else:
                self.base.restore(snapshot)
            self._original = None
        self.merged_adapters = []

    # -- the layer stands in its base's place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        return f"active={self.active_adapters}, merged={self.merged_adapters}" if self.adapters else ""


def _record(before: Tensor, after: Tensor, stored: Tensor) -> MergeRecord:
    before, rounded = before.to(after.dtype), stored.to(after.dtype)
    delta = (after - before).norm()
    lost = (rounded - after).norm() / delta if delta > 0 else delta
    size = before.norm()
    return MergeRecord(
        delta=float(delta / size) if size > 0 else float(delta),
        lost=float(lost),
        changed=float((rounded != before).float().mean()),
    )
