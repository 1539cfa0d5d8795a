"""Random programs: a small model, and instructions that run it and change it in any order, against the definitions.

`python -m tests.execution.programs --count 10000 --seed 7` runs many. One that fails is shrunk and printed.

A program is data: tuples of names, numbers and tuples. Its passes are *plans*, which call layers one after another, side by
side, under checkpoints, while something is changed. `AdaptedMachine` runs a plan on the adapted model, `PlainMachine` on the
model without adapters, where the weight of every layer is W' by `definitions` at the time of the call.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import halotune

from .cases import METHODS, adapter_parameters, assert_same, leaf_of, randomize

WIDTH, NARROW = 12, 8
PREFIX = "base_model.model."
Plan = tuple[Any, ...]
Instruction = tuple[Any, ...]

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "gpt2": lambda: Conv1D(WIDTH, WIDTH),
    "conv1d": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "up": lambda: nn.Linear(WIDTH, NARROW),
    "down": lambda: nn.Linear(NARROW, WIDTH),
}


@dataclass(frozen=True)
class Program:
    """What a seed makes.

    Attributes:
        layers: path -> kind.
        alias: a layer that the model holds under the name "alias", too; or "".
        adapters: name -> method, and the paths that it adapts.
    """

    seed: int
    half: bool
    layers: dict[str, str]
    alias: str
    adapters: dict[str, tuple[str, tuple[str, ...]]]
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {'float32 and autocast' if self.half else 'float64'}"]
        lines += [f"  {path}: {kind}" for path, kind in self.layers.items()]
        lines += [f"  alias: {self.alias}"] if self.alias else []
        lines += [f"  adapter {name}: {method} on {', '.join(paths)}" for name, (method, paths) in self.adapters.items()]
        return "\n".join([*lines, *(f"{i:3}. {readable(instruction)}" for i, instruction in enumerate(self.instructions))])


def readable(value: Any) -> str:
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return "[" + "; ".join(map(readable, value)) + "]"
        return " ".join(map(readable, value)) if value else "[]"
    if isinstance(value, dict):
        return ", ".join(f"{k}={readable(v)}" for k, v in value.items() if v)
    return str(value)


# -- the two machines


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


# -- running a program


class Run:
    """A program on both machines: every instruction is a method."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rng = torch.Generator().manual_seed(program.seed)
        self.dtype = torch.float32 if program.half else torch.float64
        torch.manual_seed(program.seed)
        plain = Base(program).to(self.dtype).requires_grad_(False)
        base: Any = copy.deepcopy(plain)
        for name, (method, paths) in program.adapters.items():
            config = METHODS[method].configure(list(paths))
            base = halotune.get_peft_model(base, config, name) if name == "a" else base
            if name != "a":
                base.add_adapter(name, config)
            randomize(base.to(self.dtype), name, seed=program.seed, std=0.15 if program.half else 0.3)
        self.plain = PlainMachine(program, base, plain)
        self.adapted = AdaptedMachine(program, base)

    @property
    def model(self) -> Any:
        return self.adapted.model

    def run(self) -> None:
        for name, *arguments in self.program.instructions:
            getattr(self, name)(*arguments)

    def sample(self, rows: int) -> Tensor:
        return torch.randn(rows, 3, WIDTH, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def leaves(self, machine: Machine) -> list[Tensor]:
        """Everything that may have a gradient, in the same order for both machines."""
        bases = [p for path in self.program.layers for p in machine.base(path).parameters()]
        return [*adapter_parameters(self.model).values(), *bases]

    # -- passes

    def machines(self) -> Iterator[Machine]:
        """One after the other, each with the flags that the adapters' parameters, which they share, have now."""
        flags = [(p, p.requires_grad) for p in adapter_parameters(self.model).values()]
        for machine in (self.plain, self.adapted):
            for p, flag in flags:
                p.requires_grad_(flag)
            yield machine

    def train(self, plans: tuple[Plan, ...], rows: int, how: dict[str, Any]) -> None:
        """Forward, and a backward for every plan; the gradients add to those that are there."""
        x = self.sample(rows)
        start = [p.grad for p in self.leaves(self.plain)]
        results = []
        for machine in self.machines():
            leaves = [*self.leaves(machine), x.clone().requires_grad_(how.get("input", True))]
            for p, g in zip(leaves, [*start, None], strict=True):
                p.grad = None if g is None or how.get("zero") else g.clone()
            machine.direct += bool(how.get("again"))
            with self.autocast(how):
                ys = self.forward(machine, plans, leaves[-1], how)
            machine.direct -= bool(how.get("again"))
            if machine is self.adapted and how.get("between"):
                self.between(how["between"], rows)
            for y in ys:
                if y.requires_grad:
                    loss = y.float().square().sum() if self.program.half else y.square().sum()
                    if how.get("again"):
                        loss.backward(retain_graph=True)
                    loss.backward()
            results.append([*(y.detach() for y in ys), *(None if p.grad is None else p.grad.clone() for p in leaves)])
        self.compare(results[1], results[0], rows, how, plans)
        for p, q in zip(self.leaves(self.plain), self.leaves(self.adapted), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()

    def evaluate(self, mode: str, plans: tuple[Plan, ...], rows: int, how: dict[str, Any]) -> None:
        x = self.sample(rows)
        for _ in range(how.get("times", 1)):
            results = []
            for machine in self.machines():
                machine.writes = True
                with torch.inference_mode() if mode == "inference" else torch.no_grad(), self.autocast(how):
                    results.append([y.clone() for y in self.forward(machine, plans, x, how)])
                machine.writes = False
            self.compare(results[1], results[0], rows, how, plans)

    def forward(self, machine: Machine, plans: tuple[Plan, ...], x: Tensor, how: dict[str, Any]) -> list[Tensor]:
        """By the model, by its parts alone, or by the model with other parameters."""

        def run(x: Tensor) -> list[Tensor]:
            return [machine.follow(plan, x) for plan in plans]

        # torch's functional_call leaves the values in a module that has two names.
        if how.get("functional") and not machine.merged and not self.program.alias:
            values = {name: p + 0.05 for name, p in adapter_parameters(self.model).items()}
            machine.direct, machine.replaced = machine.direct + 1, True
            try:
                if machine is self.adapted:
                    return functional_call(self.model, values, (x, run))
                machine.values = values
                return run(x)
            finally:
                machine.values = None
                machine.direct, machine.replaced = machine.direct - 1, False
        if how.get("parts") or machine is self.plain:
            return run(x)
        return self.model(x, run)

    def between(self, plan: Plan, rows: int) -> None:
        """A pass of the model between forward and backward."""
        with torch.no_grad():
            self.forward(self.adapted, (plan,), self.sample(rows), {})

    def interrupted(self, path: str, plan: Plan, grad: bool) -> None:
        """A hook on a layer raises."""

        def raises(*args: Any) -> None:
            raise Interruption

        handle = self.model.get_base_model().get_submodule(path).register_forward_pre_hook(raises)
        try:
            with torch.set_grad_enabled(grad):
                self.forward(self.adapted, (plan,), self.sample(2), {})
        except Interruption:
            pass
        finally:
            handle.remove()

    def threads(self, plans: tuple[Plan, ...], grads: tuple[bool, ...]) -> None:
        """A pass of each plan, in threads that take turns layer by layer."""
        xs = [self.sample(2) for _ in plans]
        out: dict[int, Any] = {}

        def work(machine: Machine, i: int) -> list[Tensor | None]:
            parameters = [p for p in self.leaves(machine) if p.requires_grad]
            with torch.set_grad_enabled(grads[i]):
                (y,) = self.forward(machine, (plans[i],), xs[i], {})
            if not (grads[i] and y.requires_grad and parameters):
                return [y.detach()]
            return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)]

        def in_thread(i: int) -> None:
            try:
                out[i] = work(self.adapted, i)
            except Exception as e:
                out[i] = e
            turns.leave()

        self.plain.direct += 1
        want = [work(self.plain, i) for i in range(len(plans))]
        self.plain.direct -= 1
        turns = self.adapted.turns = Turns(len(plans))
        self.adapted.direct += 1
        running = [threading.Thread(target=in_thread, args=(i,), daemon=True) for i in range(len(plans))]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(10)
        self.adapted.turns = None
        self.adapted.direct -= 1
        for i, expected in enumerate(want):
            if isinstance(out[i], Exception):
                raise out[i]
            self.compare(out[i], expected, 2, {}, plans)

    def autocast(self, how: dict[str, Any]) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if how.get("autocast") else nullcontext()

    def compare(self, got: Sequence[Any], want: Sequence[Any], rows: int, how: dict[str, Any], plans: Any) -> None:
        if not self.program.half:
            assert_same(got, want, 1e-8, none_is_zero=rows == 0)
        elif how.get("autocast") or "autocast" in readable(plans):
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None) or not rows, "a gradient where there is none, or none where there is one"
                if a is not None and b is not None:
                    a, b = a.double(), b.double()
                    largest = max(float(t.norm()) for t in want if t is not None)
                    error, size = float((a - b).norm()), float(b.norm())
                    assert error <= 0.25 * size + 0.02 * largest, f"an error of {error:.3g} in a norm of {size:.3g}"
        else:
            assert_same(got, want, 2e-3, none_is_zero=rows == 0)

    # -- changes between passes

    def change(self, name: str, *arguments: Any) -> None:
        self.plain.change(name, *arguments)
        if name != "write_adapters":  # the machines share them
            self.adapted.change(name, *arguments)

    def step(self) -> None:
        """Of an optimizer."""
        parameters = [p for p in adapter_parameters(self.model).values() if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.optim.SGD([{"params": parameters}] if parameters else [nn.Parameter(torch.zeros(1))], lr=0.1).step()

    def zero_grad(self) -> None:
        for machine in (self.plain, self.adapted):
            for p in self.leaves(machine):
                p.grad = None

    def mode(self, train: bool) -> None:
        self.model.train(train)

    def cache(self, gib: float) -> None:
        self.model.cache_weights(gib=gib)

    def copied(self) -> None:
        """The model goes on as its own copy."""
        self.plain.model = self.adapted.model = copy.deepcopy(self.model)
        self.zero_grad()

    def merge(self, count: int) -> None:
        names = self.plain.active[:count]  # in another order the model refuses
        trained = any(p.requires_grad for path in self.program.layers for p in self.plain.base(path).parameters())
        if not (self.plain.merged or self.plain.off or trained):
            self.call_all()  # what no pass has called is not merged
            self.model.merge_adapter(list(names))
            self.plain.merge(names)
            self.adapted.merged = names

    def call_all(self) -> None:
        paths = [path for path in self.program.layers if not path.startswith("mlp.")]
        with torch.no_grad():
            self.model(self.sample(1), lambda x: self.adapted.follow((("together", *paths), ("mlp",)), x))

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.plain.unmerge()
        self.adapted.merged = ()


# -- making programs


class Maker:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed

    def some(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def program(self) -> Program:
        half = self.chance(0.15)
        kinds = ["linear", "linear", "linear", "linear without bias", "gpt2", "conv1d"]
        self.layers = {f"{self.some('x', 'y')}.l{i}": self.rng.choice(kinds) for i in range(self.rng.randint(3, 5))}
        self.layers |= {"mlp.up": "up", "mlp.down": "down"}
        alias = self.some(*self.layers) if self.chance(0.3) else ""
        alias = "" if alias.startswith("mlp") else alias
        self.paths = [p for p in self.layers if not p.startswith("mlp")] + (["alias"] if alias else [])
        adapted = tuple(p for p in self.layers if self.chance(0.8)) or (next(iter(self.layers)),)
        few = tuple(p for p in adapted if self.chance(0.6)) or adapted
        self.adapters = {"a": (self.some(*METHODS), adapted)}
        if self.chance(0.6):
            self.adapters["b"] = (self.some(*METHODS), few)
        instructions = tuple(self.instruction(half) for _ in range(self.rng.randint(4, 12)))
        return Program(self.seed, half, self.layers, alias, self.adapters, instructions)

    def plan(self, depth: int = 2) -> Plan:
        return tuple(self.one_step(depth) for _ in range(self.rng.randint(1, 3)))

    def one_step(self, depth: int) -> Instruction:
        path = self.some(*self.paths)
        simple = [
            ("layer", path),
            ("layer", path),
            ("together", *self.rng.choices(self.paths, k=self.rng.randint(2, 3))),
            ("mlp",),
            ("written", path),
            ("unused", path),
        ]
        if depth == 0 or self.chance(0.5):
            return self.rng.choice(simple)
        plan = self.plan(depth - 1)
        nested = [
            ("residual", plan),
            ("detached", plan),
            ("no_grad", plan),
            ("checkpoint", kind := self.some(*CHECKPOINTS), without_checkpoints(plan, selective=kind == "selective")),
            ("checkpoint", "plain", without_checkpoints(plan, keep="plain")),
            ("while", self.a_change(inside=True), plan),
            ("while", self.a_change(inside=True), plan),
            ("autocast", self.chance(0.7), plan),
        ]
        return self.rng.choice(nested)

    def a_change(self, inside: bool = False) -> Instruction:
        path, adapter = self.some(*self.layers), self.some(*self.adapters)
        names = self.rng.sample(list(self.adapters), self.rng.randint(1, len(self.adapters)))
        changes = [
            ("scale", adapter, self.some(0.0, 0.5, -0.7, 1.0, 2.0)),
            ("active", *names),
            ("enabled", path, self.chance(0.4)),
            ("train_adapter", adapter, path, self.chance(0.5)),
            ("write_adapters", self.some(0.5, 2.0)),
            ("write_base", path, self.some(0.5, 2.0)),
        ]
        return self.rng.choice(changes if inside else [*changes, ("train_base", path, self.chance(0.5))])

    def instruction(self, half: bool) -> Instruction:
        chance = self.chance
        plans = tuple(self.plan() for _ in range(2 if chance(0.2) else 1))
        rows = 0 if chance(0.05) else self.rng.randint(1, 2)
        how = {
            "parts": chance(0.25),
            "functional": chance(0.1),
            "autocast": chance(0.5 if half else 0.15),
        }
        training = {
            **how,
            "zero": chance(0.6),
            "again": chance(0.1),
            "input": chance(0.7),
            "between": self.plan(1) if chance(0.2) else (),
        }
        what = self.rng.random()
        if what < 0.35:
            return "train", plans, rows, training
        if what < 0.5:
            return "evaluate", self.some("no_grad", "inference"), plans, rows, {**how, "times": self.rng.randint(1, 3)}
        if what < 0.75:
            return "change", *self.a_change()
        if what < 0.79 and not half:
            return "threads", (without_changes(self.plan(1)), without_changes(self.plan(1))), (chance(0.5), chance(0.5))
        return self.some(
            ("step",),
            ("step",),
            ("zero_grad",),
            ("mode", chance(0.5)),
            ("cache", self.some(0.0, 1.0)),
            ("copied",),
            ("interrupted", self.some(*self.paths), self.plan(), chance(0.5)),
            ("interrupted", self.some(*self.paths), self.plan(), chance(0.5)),
            ("merge", self.some(1, 2)),
            ("unmerge",),
        )


def without_checkpoints(plan: Plan, keep: str = "", selective: bool = False) -> Plan:
    """What may run under a checkpoint: only plain ones nest, what autograd needs stays, as do outputs that were stored."""
    out: list[Any] = []
    for name, *arguments in plan:
        inside = [without_checkpoints(a, keep, selective) if is_plan(a) else a for a in arguments]
        if (name == "checkpoint" and arguments[0] != keep) or (name == "while" and arguments[0][0] not in ("scale", "enabled")):
            out.extend(inside[1])
        else:
            out.append(("layer" if name == "written" and selective else name, *inside))
    return tuple(out)


def without_changes(plan: Plan) -> Plan:
    """What may run in a thread beside others."""
    return tuple(("residual", step[2]) if step[0] == "while" else step for step in plan)  # of depth 1


NESTED = {"residual", "detached", "no_grad", "checkpoint", "while", "autocast"}


def is_plan(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], tuple)


def make(seed: int) -> Program:
    return Maker(seed).program()


# -- failing and shrinking


def failure(program: Program) -> Exception | None:
    """What goes wrong; None where nothing does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", ".*not called in the first pass|Idle in the first pass")  # programs leave layers out
        try:
            Run(program).run()
        except Exception as e:
            return e
    return None


def smaller(value: Any) -> Iterator[Any]:
    """A program's instructions, or a plan, with something left out: much of it first."""
    if is_plan(value):
        for count in {max(len(value) // 2, 1): 0, 1: 0}:
            yield from (value[:i] + value[i + count :] for i in range(0, len(value), count) if len(value) > count)
        for i, step in enumerate(value):  # a nested plan without what is around it
            yield from (value[:i] + plan + value[i + 1 :] for plan in step[1:] if is_plan(plan) and step[0] in NESTED)
    for i, part in enumerate(value):
        if isinstance(part, dict):
            for key in (key for key in part if part[key]):
                yield (*value[:i], {**part, key: type(part[key])()}, *value[i + 1 :])
        if isinstance(part, tuple):
            yield from ((*value[:i], less, *value[i + 1 :]) for less in smaller(part))


def shrunk(program: Program, seconds: float = 20.0) -> Program:
    """Without whatever it also fails without."""
    end, found = time.monotonic() + seconds, True
    while found and time.monotonic() < end:
        found = False
        for instructions in smaller(program.instructions):
            less = replace(program, instructions=instructions)
            if failure(less) is not None:
                program, found = less, True
                break
            if time.monotonic() > end:
                break
    return program


def check(seed: int) -> str | None:
    """Nothing, or what a failing program is and says."""
    program = make(seed)
    if failure(program) is None:
        return None
    program = shrunk(program)
    error = failure(program)
    return f"{program}\n{type(error).__name__}: {error}"


@contextmanager
def eager_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, help="of the first; else a fresh one")
    parser.add_argument("--show", action="store_true", help="print the programs instead of running them")
    parser.add_argument("--stop", type=int, default=10, help="after so many that fail")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    wrong = 0
    for seed in range(start, start + arguments.count):
        if arguments.show:
            print(make(seed))
        elif message := check(seed):
            wrong += 1
            print(message, flush=True)
            if wrong == arguments.stop:
                break
    print(f"seeds {start} to {seed}: {wrong} failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
