"""Making a program of a seed."""

from __future__ import annotations

import random
from typing import Any

from ..cases import METHODS
from .machines import CHECKPOINTS
from .program import Instruction, Plan, Program


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
