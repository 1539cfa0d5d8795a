"""What is kept between passes without gradients gives way to every write that can be seen, and to all where nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .cases import adapted, adapter_parameters, assert_same, every_method, sample


def in_place(parameters: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for p in parameters:
            p.mul_(0.5)


def new_data(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        p.data = p.data * 0.5


def through_a_vector(parameters: Iterable[Tensor]) -> None:
    parameters = list(parameters)
    vector_to_parameters(parameters_to_vector(parameters).detach() * 0.5, parameters)


def in_data(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        p.data.mul_(0.5)


def by_numpy(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        array = p.detach().numpy()
        array *= 0.5


SEEN = [in_place, new_data, through_a_vector]
UNSEEN = [in_data, by_numpy]  # torch records no write: where weights are kept, the documentation says so
CELLS = [*((0, write) for write in SEEN + UNSEEN), *((1, write) for write in SEEN)]


@pytest.mark.parametrize("what", ["base", "adapters"])
@pytest.mark.parametrize(("gib", "write"), CELLS, ids=lambda v: v.__name__ if callable(v) else f"{v}gib")
@every_method
def test_the_next_pass_sees_a_write(method, gib, write, what):
    model, reference = adapted(method)
    model.eval()
    model.cache_weights(gib=gib)
    x = sample(requires_grad=False)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    if what == "base":
        write([p for name, p in model.named_parameters() if "base_layer" in name.split(".")])
        write(list(reference.plain.parameters()))
    else:
        write(adapter_parameters(model).values())
    with torch.no_grad():
        want = reference(x)
        for _ in range(3):
            assert_same([model(x)], [want])


@every_method
def test_a_base_that_is_replaced(method):
    """Another parameter, another module; with weights kept and without."""
    for gib in (0, 1):
        model, reference = adapted(method)
        model.eval()
        model.cache_weights(gib=gib)
        x = sample(requires_grad=False)
        with torch.no_grad():
            for _ in range(3):
                model(x)
            layer, plain = model.get_base_model().blocks[0].q, reference.plain.get_submodule("blocks.0.q")
            for attribute in ("weight", "bias"):
                value = torch.randn_like(getattr(plain, attribute))
                setattr(plain, attribute, nn.Parameter(value))
                setattr(layer.base_layer, attribute, nn.Parameter(value.clone()))
                for _ in range(2):
                    assert_same([model(x)], [reference(x)])
