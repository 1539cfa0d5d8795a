"""What sharding makes the preparation of factors cost: `python -m tests.distributed.costs`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halotune.core import adapter as adapters
from halotune.core.layer import AdaptedLayer

from .cases import METHODS, adapted, batch, llama
from .launch import spawn
from .test_fsdp2 import sharded


def launches(model: Any, given: dict[str, torch.Tensor]) -> tuple[int, int]:
    """How often factors are prepared, and operations, in forward and backward of one step."""
    from torch.profiler import ProfilerActivity, profile

    model(**given).loss.backward()  # what is looked up once
    calls = 0
    prepare = adapters.Adapter.prepares

    def counted(self: Any, dtype: torch.dtype) -> Any:
        made = prepare(self, dtype)
        make = made.make

        def make_counted(*stacked: torch.Tensor) -> Any:
            nonlocal calls
            calls += 1
            return make(*stacked)

        made.make = make_counted
        return made

    adapters.Adapter.prepares = counted  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(**given).loss.backward()
    adapters.Adapter.prepares = prepare  # type: ignore[method-assign]
    names = [e.name for e in profiled.events() if e.name.startswith("aten::") and e.cpu_parent is not None]
    return calls, len(names)


def measure(rank: int, method: str, ways: list[str]) -> dict[str, Any]:
    import halotune.engine.forward.prepare as forward

    out: dict[str, Any] = {}
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    for way in ways:
        model: Any = adapted(method, llama(**sizes))
        if way != "one":
            model = sharded(model, way.removesuffix("-alone"))
        group = forward.ForwardPass._group_unit
        if way.endswith("-alone"):
            forward.ForwardPass._group_unit = lambda self, adapter: None  # type: ignore[method-assign]
        out[way] = launches(model, batch(0))
        forward.ForwardPass._group_unit = group  # type: ignore[method-assign]
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    out["layers"] = len(layers)
    return out


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    for method in METHODS:
        print(
            method, spawn(2, measure, method, ["one", "root", "adapters-block", "block", "block-alone", "layer"])[0], flush=True
        )
