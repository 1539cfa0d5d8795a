"""Who is compared: halotune, peft and lycoris-lora under one small interface, and the bare frozen model."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

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
    def on(self, base: nn.Module, targets: Sequence[str]) -> Iterator[nn.Module]:
        """Inside, `base` has this adapter, with small random values; afterwards it is as it was."""
        with restored(base), quiet():
            model = LIBRARIES[self.library].wrap(base, self, targets)
            try:
                fill(model)
                yield model
            finally:
                LIBRARIES[self.library].unload(model)


class Library(ABC):
    """What a benchmark asks of a library. A model is what `wrap` returned: it is called like its base."""

    methods: tuple[str, ...] = ()

    @abstractmethod
    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> nn.Module: ...

    def cache(self, model: Any, gib: float) -> None:  # noqa: B027
        """Let the model keep adapted weights between passes, where the library can."""

    @abstractmethod
    def unload(self, model: nn.Module) -> None: ...

    @abstractmethod
    def merge(self, model: nn.Module) -> None: ...

    @abstractmethod
    def unmerge(self, model: nn.Module) -> None: ...

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None: ...

    @abstractmethod
    def load(self, base: nn.Module, folder: Path) -> nn.Module: ...


class Frozen(Library):
    """No adapter: what an adapted model cannot be faster than."""

    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> nn.Module:
        return base

    def unload(self, model: nn.Module) -> None: ...

    def merge(self, model: nn.Module) -> None:
        raise Unavailable("has no adapter to merge")

    unmerge = merge

    def save(self, model: nn.Module, folder: Path) -> None:
        raise Unavailable("has no adapter to load")

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        raise Unavailable("has no adapter to load")


class PeftApi(Library):
    """halotune and peft, which have one API."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.methods = tuple(name.lower() for name in kinds())

    @property
    def api(self) -> Any:
        return imported(self.package)

    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> nn.Module:
        method, kind = kinds()[contender.method.upper()]
        named = [m.config.__name__ for m in (method, *map(method_of, method.aliases))]
        config = next((getattr(self.api, name) for name in named if hasattr(self.api, name)), None)
        if config is None:
            raise Unavailable(f"has no {named[0]}")
        return self.api.get_peft_model(base, config(target_modules=list(targets), **kind.fields(contender.r)))

    def cache(self, model: Any, gib: float) -> None:
        if self.package == "halotune":
            model.cache_weights(gib)

    def unload(self, model: Any) -> None:
        model.unload()

    def merge(self, model: Any) -> None:
        model.merge_adapter()

    def unmerge(self, model: Any) -> None:
        model.unmerge_adapter()

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        return self.api.PeftModel.from_pretrained(base, str(folder))


class Lycoris(Library):
    """lycoris-lora, which replaces the `forward` of the layers and keeps its parameters in a module of their own."""

    methods = tuple(name.lower() for name, (method, _) in kinds().items() if method.lycoris)
    FILE: ClassVar[str] = "lycoris.safetensors"

    class Model(nn.Module):
        """The base, with the network's parameters beside it."""

        def __init__(self, base: nn.Module, network: Any) -> None:
            super().__init__()
            self.base, self.network = base, network
            network.to(next(base.parameters()).device)
            network.apply_to()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base(*args, **kwargs)

    def wrap(self, base: nn.Module, contender: Contender, targets: Sequence[str]) -> nn.Module:
        network = imported("lycoris.wrapper").LycorisNetwork
        names = [f"{re.escape(name)}$" for name in targets]
        network.apply_preset({"target_module": [], "target_name": names, "exclude_name": [], "enable_conv": True})
        r = contender.r
        return self.Model(base, network(base, 1.0, r, r, r, r, network_module=contender.method, warn_on_unmatched=False))

    def unload(self, model: Any) -> None:
        model.network.restore()

    def merge(self, model: Any) -> None:
        model.network.onfly_merge()

    def unmerge(self, model: Any) -> None:
        model.network.onfly_restore()

    def save(self, model: Any, folder: Path) -> None:
        model.network.save_weights(str(folder / self.FILE), None, None)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        read = imported("lycoris.wrapper").create_lycoris_from_weights
        with torch.no_grad():  # its reader writes into parameters in place
            network, _ = read(1.0, str(folder / self.FILE), base)
        return self.Model(base, network)


def imported(module: str) -> Any:
    """The module, or `Unavailable` naming the package that lacks."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Unavailable(f"cannot be imported: {e}") from None


LIBRARIES: dict[str, Library] = {
    FROZEN: Frozen(),
    "ours": PeftApi(__name__.partition(".")[0]),
    "peft": PeftApi("peft"),
    "lycoris": Lycoris(),
}


def spelling() -> str:
    """How contenders are written."""
    every = [f"{name}:{{{','.join(library.methods)}}}-rN" for name, library in LIBRARIES.items() if library.methods]
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
