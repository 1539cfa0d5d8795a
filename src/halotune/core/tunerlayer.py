"""The names by which diffusers and transformers drive a layer with adapters: those of PEFT's `BaseTunerLayer`."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class TunerLayer(nn.Module):
    """A layer with named adapters, each with a scale. Integrations register it with `BaseTunerLayer`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("adapters",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    cast_input_dtype_enabled = False  # parameters meet the input in its own dtype

    base_layer: nn.Module
    adapters: nn.ModuleDict
    scales: dict[str, float]
    active_adapters: list[str]
    enabled: bool

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return not self.enabled

    @property
    def r(self) -> dict[str, int]:
        """Name -> rank."""
        return {n: a.rank for n, a in self.adapters.items()}  # type: ignore[misc]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these of its adapters the active ones, in this order; exactly they are trained (unless `inference_mode`)."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.active_adapters = [n for n in names if n in self.adapters]
        for n, adapter in self.adapters.items():
            adapter.requires_grad_(n in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for n in self.active_adapters:
            self.set_scale(n, self.scales[n] * scale)  # type: ignore[operator]

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets the scale of the active adapters to 1."""
        for n in self.active_adapters:
            self.set_scale(n, 1.0 if scale is None else self.scales[n] / scale)  # type: ignore[operator]

    def delete_adapter(self, adapter_name: str) -> None:
        self.remove(adapter_name)  # type: ignore[operator]
