"""Who is compared: halotune, peft and lycoris-lora under one small interface, and the bare frozen model."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from ..core.errors import HalotuneError
from ..methods.registry import kinds, method_of

FROZEN = "frozen"


class Unavailable(Exception):
    """This contender cannot do what is measured; the message says why, for its row of the table."""


@dataclass(frozen=True)
class Contender:
    """One adapter of one library, written `library:method-rRANK`; or `frozen`, the model without any."""

    library: str
    method: str = ""
    r: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        if text == FROZEN:
            return cls(FROZEN)
        found = re.fullmatch(r"(\w+):(\w+)-r([1-9]\d*)", text)
        known = found and found[1] in LIBRARIES and found[2] in LIBRARIES[found[1]].methods
        if not found or not known:
            raise HalotuneError(f"contenders: expected {spelling()}; got {text!r}. N is the rank, such as r8.")
        return cls(found[1], found[2], int(found[3]))

    def __str__(self) -> str:
        return FROZEN if self.library == FROZEN else f"{self.library}:{self.method}-r{self.r}"

    def with_rank(self, r: int) -> Self:
        return self if self.library == FROZEN else replace(self, r=r)

    @contextmanager
    def on(self, base: nn.Module, targets: Sequence[str]) -> Iterator[Any]:
        """Inside, `base` has this adapter, with small random values; afterwards it is as it was."""
        if self.library == FROZEN:
            yield base
            return
        with restored(base), quiet():
            model = self.wrap(base, targets)
            try:
                yield model
            finally:
                model.unload()

    def wrap(self, base: nn.Module, targets: Sequence[str]) -> Any:
        """`base` with this adapter, with small random values, for good."""
        if self.library == FROZEN:
            return base
        with quiet():
            model = LIBRARIES[self.library].wrap(base, self, targets)
            fill(model)
            return model


class PeftApi:
    """halotune and peft, which have one API."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.methods = tuple(name.lower() for name in kinds())

    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> Any:
        api = imported(self.package)
        method, kind = kinds()[contender.method.upper()]
        named = [m.config.__name__ for m in (method, *map(method_of, method.aliases))]
        config = next((getattr(api, name) for name in named if hasattr(api, name)), None)
        if config is None:
            raise Unavailable(f"has no {named[0]}")
        return api.get_peft_model(base, config(target_modules=list(targets), **kind.fields(contender.r)))

    def load(self, base: nn.Module, folder: str) -> Any:
        return imported(self.package).PeftModel.from_pretrained(base, folder)


class LycorisModel(nn.Module):
    """A base and lycoris-lora's network for it, with as much of PEFT's API as is measured."""

    FILE = "lycoris.safetensors"

    def __init__(self, base: nn.Module, network: Any) -> None:
        super().__init__()
        self.base, self.network = base, network
        network.to(next(base.parameters()).device)
        network.apply_to()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def unload(self) -> None:
        self.network.restore()

    def merge_adapter(self) -> None:
        self.network.onfly_merge()

    def unmerge_adapter(self) -> None:
        self.network.onfly_restore()

    def save_pretrained(self, folder: str) -> None:
        self.network.save_weights(f"{folder}/{self.FILE}", None, None)


class Lycoris:
    """lycoris-lora, which replaces the `forward` of the layers and keeps its parameters in a module of their own."""

    methods = tuple(name.lower() for name, (method, _) in kinds().items() if method.lycoris)

    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> LycorisModel:
        network = imported("lycoris.wrapper").LycorisNetwork
        names = [f"{re.escape(name)}$" for name in targets]
        network.apply_preset({"target_module": [], "target_name": names, "exclude_name": [], "enable_conv": True})
        r = contender.r
        return LycorisModel(base, network(base, 1.0, r, r, r, r, network_module=contender.method, warn_on_unmatched=False))

    def load(self, base: nn.Module, folder: str) -> LycorisModel:
        read = imported("lycoris.wrapper").create_lycoris_from_weights
        with torch.no_grad():  # its reader writes into parameters in place
            network, _ = read(1.0, f"{folder}/{LycorisModel.FILE}", base)
        return LycorisModel(base, network)


def imported(module: str) -> Any:
    """The module, or `Unavailable` naming the package that lacks."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Unavailable(f"cannot be imported: {e}") from None


LIBRARIES: dict[str, PeftApi | Lycoris] = {
    "ours": PeftApi(__name__.partition(".")[0]),
    "peft": PeftApi("peft"),
    "lycoris": Lycoris(),
}


def spelling() -> str:
    """How contenders are written."""
    every = [f"{name}:{{{','.join(library.methods)}}}-rN" for name, library in LIBRARIES.items()]
    return ", ".join([FROZEN, *every])


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Small random values in all that is trained: an adapter at its start would multiply by zeros."""
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(0.0, 0.01)


@contextmanager
def restored(base: nn.Module) -> Iterator[None]:
    """Afterwards `base` holds the modules that it held before, whatever a library left, and nothing is trained."""
    modules = {m: dict(m._modules) for m in base.modules()}
    attributes = set(base.__dict__)
    try:
        yield
    finally:
        for module, children in modules.items():
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
        for name in set(base.__dict__) - attributes:
            del base.__dict__[name]
        base.requires_grad_(False)


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings and chatter about wrapping are not what a benchmark is for."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
