"""Replicas of a model, as `nn.DataParallel` makes them: their parameters are tensors computed from the model's."""

from __future__ import annotations

import gc
import threading
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from .cases import adapted, assert_same, every_method, every_method_and_sped_up, sample, step, switches, trained


def replicate(model: nn.Module, made: dict[nn.Module, Any] | None = None) -> Any:
    """`torch.nn.parallel.replicate` for one replica, with `clone` in place of a broadcast to another GPU."""
    made = {} if made is None else made
    if model not in made:
        made[model] = replica = model._replicate_for_data_parallel()  # type: ignore[operator]
        for name, child in model._modules.items():
            replica._modules[name] = None if child is None else replicate(child, made)
        for name, p in model._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p.clone())
    return made[model]


def in_threads(replicas: list[Any], inputs: list[Tensor]) -> Tensor:
    out: dict[int, Any] = {}

    def work(i: int) -> None:
        try:
            out[i] = replicas[i](inputs[i])
        except Exception as e:
            out[i] = e

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out.values():
        if isinstance(result, Exception):
            raise result
    return torch.cat([out[i] for i in range(len(replicas))])


def one_by_one(replicas: list[Any], inputs: list[Tensor]) -> Tensor:
    return torch.cat([replica(x) for replica, x in zip(replicas, inputs, strict=True)])


@pytest.mark.parametrize("run", [one_by_one, in_threads], ids=lambda run: run.__name__)
@pytest.mark.parametrize("inject", [False, True], ids=["wrapped", "injected"])
@every_method
def test_gradients_reach_the_models_parameters(method, inject, run):
    model, reference = adapted(method, inject=inject)
    leaves = [*trained(model), x := sample(6, 12)]
    want = step(lambda: reference(x), leaves)
    for warm in (0, 2):
        for _ in range(warm):
            model(x)
        got = step(lambda: run([replicate(model), replicate(model)], list(x.chunk(2))), leaves)
        assert_same(got, want)
    with torch.no_grad():
        assert_same([run([replicate(model), replicate(model)], list(x.chunk(2)))], want[:1])


@every_method_and_sped_up
def test_the_model_itself_afterwards(method):
    model, reference = adapted(method)
    leaves = [*trained(model), x := sample(6, 12)]
    one_by_one([replicate(model)], [x]).sum().backward()
    assert_same(step(lambda: model(x), leaves), step(lambda: reference(x), leaves))


def test_replicas_are_not_kept():
    """They hold copies of all weights, on a device of their own."""
    model, _ = adapted("hra")
    replica = replicate(model)
    replica(sample()).sum().backward()
    layer = ref(next(switches(replica)))
    del replica
    gc.collect()
    assert layer() is None
