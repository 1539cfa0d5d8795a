"""Running a program on both machines, and comparing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import halotune

from ..cases import METHODS, adapter_parameters, assert_same, randomize
from .machines import AdaptedMachine, Base, Interruption, Machine, PlainMachine, Turns
from .program import WIDTH, Plan, Program, readable


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
