"""Modules that wrap others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .rows import MIXED, Rows

# accelerate and diffusers hang these on a module that they hook; another module's hook is none of this one's.
HOOKS = frozenset({"_hf_hook", "_old_forward", "_diffusers_hook"})


class Wrapper(nn.Module):
    """A module around a submodule, `_wraps`: attributes that it lacks are the submodule's."""

    _wraps: ClassVar[str]
    _holds: ClassVar[str] = ""

    def __getattr__(self, name: str) -> Any:
        own = nn.Module.__getattr__  # not super(): a subclass may have a second base, which looks further itself
        try:
            return own(self, name)
        except AttributeError:
            if name in (self._wraps, self._holds) or name in HOOKS or name.startswith("__"):
                raise
            return getattr(self._stand_in(), name)

    def _stand_in(self) -> nn.Module:
        """Whose attributes are taken for its own."""
        return nn.Module.__getattr__(self, self._wraps)  # type: ignore[return-value]


class PerAdapter(Wrapper):
    """A wrapper with a module of its own for each adapter, by name, in the dictionary `_holds`."""

    def __init__(self) -> None:
        super().__init__()
        self.active_adapters: list[str] = []
        self.enabled = True

    @property
    def wrapped(self) -> nn.Module:
        return self._modules[self._wraps]  # type: ignore[return-value]

    @property
    def by_name(self) -> nn.ModuleDict:
        """What it has of each adapter."""
        return self._modules[self._holds]  # type: ignore[return-value]

    @property
    def rows(self) -> Rows | None:
        """How to split the batch, inside a call with `adapter_names` in this thread."""
        return MIXED.rows.get(self)

    def remove(self, name: str) -> None:
        if name in self.by_name:
            del self.by_name[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]


class ParameterView(nn.Module):
    """A parameter of the module that a wrapper holds, as a layer. It stays where it is, with one name in the state dict."""

    def __init__(self, owner: Wrapper, weight_name: str) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # no submodule
        self.weight_name = weight_name

    @property
    def module(self) -> Any:
        """The module that has the parameter."""
        return self.__dict__["owner"].base_layer

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.weight_name)

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        setattr(self.module, self.weight_name, value)
