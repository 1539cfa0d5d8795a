"""A pass that was broken off leaves nothing behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from halotune import get_peft_model_state_dict, set_peft_model_state_dict
from halotune.core.layer import AdaptedLayer

from .cases import adapted, assert_agree, assert_same, change, every_method, every_method_and_sped_up, inner, randomize, sample


class Interruption(KeyboardInterrupt):
    """What no `except Exception` sees."""


def interrupt(*args) -> None:
    raise Interruption


def in_forward(model, x) -> None:
    handle = inner(model).blocks[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(Interruption):
            model(x)
    finally:
        handle.remove()


def in_a_layer(model, x) -> None:
    handle = inner(model).blocks[1].k.register_forward_hook(interrupt)
    try:
        with pytest.raises(Interruption):
            model(x)
    finally:
        handle.remove()


def without_gradients(model, x) -> None:
    with torch.no_grad():
        in_forward(model, x)


def in_backward(model, x) -> None:
    y = model(x)
    handles = [p.register_hook(interrupt) for p in inner(model).blocks[0].parameters() if p.requires_grad]
    try:
        with pytest.raises(Interruption):
            y.sum().backward()
    finally:
        for handle in handles:
            handle.remove()


def of_a_wrong_size(model, x) -> None:
    with pytest.raises(RuntimeError):
        model(x[..., :5])


WAYS = [in_forward, in_a_layer, without_gradients, in_backward, of_a_wrong_size]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
@every_method_and_sped_up
def test_later_passes_are_right(method, way):
    model, reference = adapted(method)
    x = sample()
    for passes in (0, 2):  # the first pass is broken off, or a later one
        for _ in range(passes):
            model(x).sum().backward()
        way(model, x)
        change(model)
        part = reference.part("blocks.1")
        assert_same([inner(model).blocks[1](x)], [part(x)])
        assert_agree(model, reference, x, passes=1)


@every_way
@every_method
def test_loading_merging_and_copying_after_it(method, way):
    model, reference = adapted(method)
    x = sample()
    best = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    want = reference(x).detach()
    randomize(model, seed=2)
    model(x).sum().backward()
    way(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same([again(x)], [reference(x)])
        randomize(again, seed=3)
    assert_same([model(x)], [reference(x)])
    way(model, x)
    set_peft_model_state_dict(model, best)
    assert_same([model.merge_and_unload()(x)], [want])


@every_method
def test_what_a_failed_backward_computed_again_is_dropped(method):
    model, _ = adapted(method)
    inner(model).run = lambda block, x: checkpoint(block, x, use_reentrant=False)
    in_backward(model, sample())
    prepared = [slot.prepared for slot in slots(model) if slot.prepared is not None]
    assert prepared
    with torch.no_grad():
        model(sample())
    assert not any(p.factors or p.adapted is not None for p in prepared)


def slots(model):
    return [a.slot for layer in model.modules() if isinstance(layer, AdaptedLayer) for a in layer.adapters.values()]
