"""`torch.nn.MultiheadAttention`: its projections are parameters or are read as such, so they are adapted as weights.

The fused attention kernels take the projections' weights and never call a linear layer. So `AdaptedAttention` hands them
`W' = weight(W)`: exact by definition, for every method; it builds W' in each call, which is small beside the attention
of a few hundred tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import LinearLike, register_base
from .errors import HalotuneError
from .layer import AdaptedLayer
from .operator import WeightShape
from .wrapper import ParameterView, Wrapper


class Projection(ParameterView):
    """One input projection of an attention module."""

    bias = None  # the attention module adds it

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class ProjectionBase(LinearLike):
    """The view of a `Projection` as a linear operator."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, Projection)

    @property
    def shape(self) -> WeightShape:  # type: ignore[override]
        return WeightShape(*self.module.weight.shape)


register_base(ProjectionBase)


def projection_names(attention: nn.MultiheadAttention) -> dict[str, str]:
    """Name of an input projection -> name of its parameter."""
    if attention.in_proj_weight is not None:
        return {"in_proj": "in_proj_weight"}
    return {f"{i}_proj": f"{i}_proj_weight" for i in "qkv"}


class AdaptedAttention(Wrapper):
    """Attention with adapters on its projections: `in_proj` (or `q_proj`, `k_proj`, `v_proj`) here, `out_proj` in the base."""

    _wraps = "base_layer"

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._qkv_same_embed_dim = False  # torch's fused encoder layer asks; it would read the base's weights
        for name, weight_name in projection_names(base_layer).items():
            setattr(self, name, Projection(self, weight_name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers: dict[str, AdaptedLayer] = {
            str(m.base_layer.weight_name): m for m in self.children() if isinstance(m, AdaptedLayer)
        }
        if isinstance(self.base_layer.out_proj, AdaptedLayer):
            layers["out_proj.base_layer.weight"] = self.base_layer.out_proj
        if any(layer.rows is not None for layer in layers.values()):
            raise HalotuneError(
                "adapter_names: the projections of torch.nn.MultiheadAttention are adapted as weights, which all samples "
                "share. Run the adapters one at a time."
            )
        weights = {name: layer.operator().weight() for name, layer in layers.items()}
        if not weights:
            return self.base_layer(*args, **kwargs)
        out_proj = self.base_layer.out_proj
        if not isinstance(out_proj, AdaptedLayer) or type(self.base_layer).forward is nn.MultiheadAttention.forward:
            return torch.func.functional_call(self.base_layer, weights, args, kwargs)
        enabled, out_proj.enabled = out_proj.enabled, False  # a forward of its own may call it, with W' in its place already
        try:
            return torch.func.functional_call(self.base_layer, weights, args, kwargs)
        finally:
            out_proj.enabled = enabled
