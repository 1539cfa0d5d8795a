"""The methods the demo compares: one rank each and the library's learning rate; all else is the same for all."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.config import AdapterConfig


@dataclass(frozen=True)
class Method:
    """A method as the demo runs it.

    Args:
        title: its name in tables.
        config: the name of its configuration class in `halotune`.
        options: arguments of the configuration, beside its targets.
    """

    title: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    def configure(self, targets: str | Collection[str], whole: list[str]) -> AdapterConfig:
        """The configuration for these target modules, with the modules `whole` trained and saved whole."""
        import halotune  # here, so that the command line can list the methods without importing torch

        return getattr(halotune, self.config)(target_modules=targets, modules_to_save=whole, **self.options)

    @property
    def learning_rate(self) -> float:
        """The library's default, which was measured here: the peak of the schedule."""
        from .. import DEFAULT_LEARNING_RATES

        return DEFAULT_LEARNING_RATES[self.title.upper()]


METHODS: dict[str, Method] = {
    "hra": Method("HRA", "HRAConfig", {"r": 8}),
    "loha": Method("LoHa", "LoHaConfig", {"r": 8, "alpha": 8}),
    "bone": Method("Bone", "BoneConfig", {"r": 32}),
    "bat": Method("BAT", "BoneConfig", {"r": 32, "init_weights": "bat"}),
    "lora": Method("LoRA", "LoraConfig", {"r": 8, "lora_alpha": 8}),
}
