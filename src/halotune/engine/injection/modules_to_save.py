"""Fully fine-tuned modules, beside the adapters (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ...core.errors import HalotuneError
from ...core.wrapper import PerAdapter


class ModulesToSaveWrapper(PerAdapter):
    """A module with one trained copy per adapter; without an active one, the original."""

    _wraps, _holds = "original_module", "modules_to_save"

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()

    def add(self, name: str) -> None:
        """A copy of the original; its parameters are kept in fp32 or better only where the original's are."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    @property
    def current(self) -> nn.Module:
        """The module that runs."""
        own = [n for n in self.active_adapters if n in self.modules_to_save] if self.enabled else []
        return self.modules_to_save[own[0]] if own else self.original_module

    def _stand_in(self) -> nn.Module:
        return self.current

    def check(self, names: list[str], path: str) -> None:
        own = [n for n in names if n in self.modules_to_save]
        if len(own) > 1:
            raise HalotuneError(
                f"{path}: {', '.join(own)} each hold a trained copy of this module, and only one can run. Activate one of them."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows
        if rows is None:
            return self.current(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise HalotuneError(
                f"adapter_names: {type(self.original_module).__name__}, fully fine-tuned, is called with more than one input, "
                "which cannot be split by sample. Run the adapters one at a time."
            )
        return rows.run(args[0], lambda name, x: self._of(name)(x))

    def _of(self, name: str) -> nn.Module:
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module
