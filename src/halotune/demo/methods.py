"""The methods the demo compares: one rank each and the library's learning rate; all else is the same for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.config import AdapterConfig


@dataclass(frozen=True)
class Preset:
    """A method as the demo runs it.

    Args:
        title: its name in tables.
        config: the name of its configuration class in `halotune`.
        options: arguments of the configuration, beside its targets.
    """

    title: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def configure(self, targets: str | Collection[str], modules_to_save: list[str]) -> AdapterConfig:
        """The configuration for these target modules, with these modules fully fine-tuned."""
        import halotune  # here, so that the command line can list the methods without importing torch

        return getattr(halotune, self.config)(target_modules=targets, modules_to_save=modules_to_save, **self.options)

    @property
    def learning_rate(self) -> float:
        """The library's default, which was measured here: the peak of the schedule."""
        from .. import DEFAULT_LEARNING_RATES

        return DEFAULT_LEARNING_RATES[self.title.upper()]


METHODS: dict[str, Preset] = {
    "hra": Preset("HRA", "HRAConfig", {"r": 8}),
    "loha": Preset("LoHa", "LoHaConfig", {"r": 8, "alpha": 8}),
    "bone": Preset("Bone", "BoneConfig", {"r": 32}),
    "bat": Preset("BAT", "BoneConfig", {"r": 32, "init_weights": "bat"}),
    "lora": Preset("LoRA", "LoraConfig", {"r": 8, "lora_alpha": 8}),
}
