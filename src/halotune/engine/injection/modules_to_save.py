"""Fully fine-tuned modules, beside the adapters (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ...core.errors import HalotuneError
from ...core.rows import MIXED, Rows
from ...core.wrapper import HOOKS


class ModulesToSaveWrapper(nn.Module):
    """A module with one trained copy per adapter; without an active one, the original."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.enabled = True

    def add(self, name: str) -> None:
        """A copy of the original; its parameters are kept in fp32 or better only where the original's are."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def remove(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]

    @property
    def rows(self) -> Rows | None:
        """How to split the batch, inside a call with `adapter_names` in this thread."""
        return MIXED.rows.get(self)

    @property
    def current(self) -> nn.Module:
        """The module that runs."""
        own = [n for n in self.active_adapters if n in self.modules_to_save] if self.enabled else []
        return self.modules_to_save[own[0]] if own else self.original_module

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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save") or name in HOOKS or name.startswith("__"):
                raise
            return getattr(self.current, name)
