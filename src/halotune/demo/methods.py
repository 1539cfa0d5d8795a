"""The methods the demo compares: one rank each and the library's learning rate; all else is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.config import AdapterConfig
    from ..methods.registry import Kind, Method


@dataclass(frozen=True)
class Preset:
    """A kind of adapter as the demo runs it. The library is imported late: the command line lists these without torch."""

    title: str  # its name in tables
    r: int

    @property
    def _kind(self) -> tuple[Method, Kind]:
        from ..methods.registry import kinds

        return kinds()[self.title.upper()]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the configuration, beside its targets."""
        return dict(self._kind[1].fields(self.r))

    def configure(self, targets: str | list[str], modules_to_save: list[str]) -> AdapterConfig:
        """The configuration for these target modules, with these modules fully fine-tuned."""
        return self._kind[0].config(target_modules=targets, modules_to_save=modules_to_save, **self.options)

    @property
    def learning_rate(self) -> float:
        """The library's default, which was measured here: the peak of the schedule."""
        from .. import DEFAULT_LEARNING_RATES

        return DEFAULT_LEARNING_RATES[self.title.upper()]


PRESETS = Preset("HRA", 8), Preset("LoHa", 8), Preset("Bone", 32), Preset("BAT", 32), Preset("LoRA", 8)
METHODS = {preset.title.lower(): preset for preset in PRESETS}
