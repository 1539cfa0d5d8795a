"""Two machines that follow plans: with adapters in the model, and by the definitions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from ..cases import METHODS, adapter_parameters, leaf_of
from .program import KINDS, PREFIX, Instruction, Plan, Program


class Interruption(KeyboardInterrupt):
    """What no `except Exception` sees."""


class Base(nn.Module):
    """Layers in submodules, run by whoever calls it."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for path, kind in program.layers.items():
            group, name = path.split(".")
            if not hasattr(self, group):
                self.add_module(group, nn.ModuleDict())
            getattr(self, group)[name] = KINDS[kind]()
        if program.alias:
            self.alias = self.get_submodule(program.alias)

    def forward(self, x: Tensor, run: Callable[[Tensor], Any]) -> Any:
        return run(x)


class Machine:
    """Follows plans. What can be changed is kept here, for both machines alike.

    Attributes:
        model: the adapted model, which owns the adapters' parameters; the machines share them.
        off: the layers whose adapters are disabled.
        replaced: other parameters are used instead of the model's own.
        values: those, where it is up to the machine.
        merged: the merged adapters.
        direct: checkpoints are left out: what they would recompute is different by then.
        writes: parameters may be written in a pass: it has no backward, which would be refused.
    """

    def __init__(self, program: Program, model: Any) -> None:
        self.program, self.model = program, model
        self.dtype = torch.float32 if program.half else torch.float64
        self.active: tuple[str, ...] = ("a",)
        self.scales = dict.fromkeys(program.adapters, 1.0)
        self.off: set[str] = set()
        self.replaced = False
        self.values: dict[str, Tensor] | None = None
        self.merged: tuple[str, ...] = ()
        self.direct = 0
        self.writes = False

    def call(self, path: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def call_on_rows(self, path: str, x: Tensor) -> Tensor:
        """A layer on `(batch, tokens, channels)`."""
        path = self.program.alias if path == "alias" and isinstance(self, PlainMachine) else path
        kind = self.program.layers[self.program.alias if path == "alias" else path]
        return self.call(path, x.mT).mT.contiguous() if kind == "conv1d" else self.call(path, x)

    def checkpoint(self, kind: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        raise NotImplementedError

    def follow(self, plan: Plan, x: Tensor) -> Tensor:
        for name, *arguments in plan:
            x = getattr(self, f"do_{name}")(x, *arguments)
        return x

    # -- the steps of a plan

    def do_layer(self, x: Tensor, path: str) -> Tensor:
        return torch.tanh(self.call_on_rows(path, x))

    def do_together(self, x: Tensor, *paths: str) -> Tensor:
        """Layers of one input."""
        return torch.tanh(torch.stack([self.call_on_rows(path, x) for path in paths]).sum(0))

    def do_mlp(self, x: Tensor) -> Tensor:
        return x + self.call_on_rows("mlp.down", torch.tanh(self.call_on_rows("mlp.up", x)))

    def do_written(self, x: Tensor, path: str) -> Tensor:
        """The output is written in place."""
        y = self.call_on_rows(path, x)
        y += x
        return y.tanh_()

    def do_unused(self, x: Tensor, path: str) -> Tensor:
        self.call_on_rows(path, x)
        return x.clone()  # a reentrant checkpoint without gradients gives back x itself, gradients and all

    def do_residual(self, x: Tensor, plan: Plan) -> Tensor:
        return x + self.follow(plan, x)

    def do_detached(self, x: Tensor, plan: Plan) -> Tensor:
        return x + self.follow(plan, x).detach()

    def do_no_grad(self, x: Tensor, plan: Plan) -> Tensor:
        with torch.no_grad():
            y = self.follow(plan, x)
        return x + y

    def do_checkpoint(self, x: Tensor, kind: str, plan: Plan) -> Tensor:
        return self.follow(plan, x) if self.direct else self.checkpoint(kind, partial(self.follow, plan), x)

    def do_while(self, x: Tensor, change: Instruction, plan: Plan) -> Tensor:
        """Something is changed, and changed back."""
        cast = torch.is_autocast_enabled("cpu")  # autocast keeps what it has cast
        if change[0] in ("write_adapters", "write_base") and (cast or not self.writes):
            return self.follow(plan, x)
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        back = self.change(*change)
        self.direct += 1
        try:
            return self.follow(plan, x)
        finally:
            self.direct -= 1
            if back is not None:
                self.change(*back)
                for p, flag in trained:  # a checkpoint before this finds in backward what it found in forward
                    p.requires_grad_(flag)

    def do_autocast(self, x: Tensor, on: bool, plan: Plan) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return self.follow(plan, x.to(self.dtype)).to(x.dtype)

    # -- what can be changed

    def change(self, name: str, *arguments: Any) -> Instruction | None:
        """Returns what undoes it; None where it was not done, as while adapters are merged."""
        of_parameters = name in ("write_adapters", "train_adapter")
        if (self.merged and not of_parameters) or (self.replaced and (of_parameters or name == "active")):
            return None
        return getattr(self, f"set_{name}")(*arguments)

    def set_scale(self, adapter: str, scale: float) -> Instruction:
        old, self.scales[adapter] = self.scales[adapter], scale
        return "scale", adapter, old

    def set_active(self, *names: str) -> Instruction:
        old, self.active = self.active, names
        return "active", *old

    def set_enabled(self, path: str, on: bool) -> Instruction:
        old = path not in self.off
        (self.off.discard if on else self.off.add)(path)
        return "enabled", path, old

    def set_train_adapter(self, name: str, path: str, on: bool) -> Instruction | None:
        parameters = self.parameters(name, path).values()
        old = [p.requires_grad for p in parameters]
        for p in parameters:
            p.requires_grad_(on)
        return ("train_adapter", name, path, old[0]) if old else None

    def set_write_adapters(self, factor: float) -> Instruction:
        with torch.no_grad():
            for p in adapter_parameters(self.model).values():
                p.mul_(factor)
        return "write_adapters", 1 / factor

    def set_write_base(self, path: str, factor: float) -> Instruction:
        with torch.no_grad():
            for p in self.base(path).parameters():
                p.mul_(factor)
        return "write_base", path, 1 / factor

    def set_train_base(self, path: str, on: bool) -> Instruction:
        old = self.base(path).weight.requires_grad
        self.base(path).requires_grad_(on)
        return "train_base", path, old

    def base(self, path: str) -> Any:
        raise NotImplementedError

    def parameters(self, name: str, path: str) -> dict[str, Tensor]:
        """Of one adapter on one layer, by their names in PEFT's files."""
        start = f"{PREFIX}{path}.adapters.{name}."
        named = self.model.named_parameters() if self.values is None else self.values.items()
        return {str(leaf_of(key)): p for key, p in named if key.startswith(start)}


class PlainMachine(Machine):
    """The definition."""

    def __init__(self, program: Program, model: Any, plain: Base) -> None:
        super().__init__(program, model)
        self.plain = plain
        self.merged_weights: dict[str, Tensor] = {}

    def base(self, path: str) -> Any:
        return self.plain.get_submodule(path)

    def call(self, path: str, x: Tensor) -> Tensor:
        layer = self.base(path)
        W = self.merged_weights.get(path, matrix(layer))
        if path not in self.off:
            W = self.adapted(path, W, [name for name in self.active if name not in self.merged])
        weight = W.t() if isinstance(layer, Conv1D) else W.reshape(layer.weight.shape)
        return functional_call(layer, {"weight": weight}, (x,))

    def adapted(self, path: str, W: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            method, paths = self.program.adapters[name]
            scale = self.scales[name]
            if path in paths and scale:
                defined = METHODS[method].define(W, **self.parameters(name, path))
                W = defined if scale == 1 else W + scale * (defined - W)
        return W

    def checkpoint(self, kind: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # A reentrant one cuts off what comes of an input without gradients.
        with torch.no_grad() if kind == "reentrant" and not x.requires_grad else nullcontext():
            return run(x)

    def set_active(self, *names: str) -> Instruction:
        for name, (_, paths) in self.program.adapters.items():
            for path in paths:
                self.set_train_adapter(name, path, name in names)
        return super().set_active(*names)

    @torch.no_grad()
    def merge(self, names: tuple[str, ...]) -> None:
        self.merged_weights = {p: self.adapted(p, matrix(self.base(p)), names).clone() for p in self.program.layers}
        self.merged = names

    def unmerge(self) -> None:
        self.merged_weights, self.merged = {}, ()


def matrix(layer: Any) -> Tensor:
    return layer.weight.t() if isinstance(layer, Conv1D) else layer.weight.flatten(1)


aten = torch.ops.aten
CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "plain": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default, aten.tanh.default]),
    ),
}


class AdaptedMachine(Machine):
    """The adapted model."""

    turns: Turns | None = None

    def call(self, path: str, x: Tensor) -> Tensor:
        if self.turns is not None:
            self.turns.next()
        return self.model.get_base_model().get_submodule(path)(x)

    def base(self, path: str) -> Any:
        layer = self.model.get_base_model().get_submodule(path)
        return getattr(layer, "base_layer", layer)

    def checkpoint(self, kind: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if kind == "selective" and torch.is_autocast_enabled("cpu"):
            kind = "plain"  # what autocast has cast already is not cast again: other operations than in the recomputation
        return CHECKPOINTS[kind](run, x)

    def set_scale(self, adapter: str, scale: float) -> Instruction:
        self.model.set_scale(adapter, scale)
        return super().set_scale(adapter, scale)

    def set_active(self, *names: str) -> Instruction:
        self.model.set_adapter(list(names))
        return super().set_active(*names)

    def set_enabled(self, path: str, on: bool) -> Instruction:
        layer = self.model.get_base_model().get_submodule(path)
        if hasattr(layer, "enable_adapters"):
            layer.enable_adapters(on)
        return super().set_enabled(path, on)


class Turns:
    """Threads that call layers by turns: each goes on to its next call when all others have gone on to theirs."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count)

    def next(self) -> None:
        try:
            self.barrier.wait(0.5)  # a lock may keep the others out
        except threading.BrokenBarrierError:
            pass

    def leave(self) -> None:
        self.barrier.abort()
