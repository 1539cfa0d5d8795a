"""Modules that wrap others."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

# accelerate and diffusers hang these on a module that they hook; another module's hook is none of this one's.
HOOKS = frozenset({"_hf_hook", "_old_forward", "_diffusers_hook"})


class Wrapper(nn.Module):
    """A module around a submodule, `_wraps`: attributes that it lacks are the submodule's."""

    _wraps: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        own = nn.Module.__getattr__  # not super(): a subclass may have a second base, which looks further itself
        try:
            return own(self, name)
        except AttributeError:
            if name == self._wraps or name in HOOKS or name.startswith("__"):
                raise
            return getattr(own(self, self._wraps), name)


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
