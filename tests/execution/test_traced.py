"""torch.jit.trace and torch.compile, of whole models and of blocks, before and after ordinary passes."""

from __future__ import annotations

import io

import pytest
import torch

from .cases import (
    adapted,
    assert_agree,
    assert_same,
    change,
    every_method,
    every_method_and_sped_up,
    inner,
    sample,
    step,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),
    # torch's own compiler does both:
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize("warm", [0, 2])
@every_method_and_sped_up
def test_traced_checked_saved_and_loaded(method, warm):
    model, reference = adapted(method)
    model.eval()
    x, z = sample(2, 12, requires_grad=False), sample(5, 12, seed=3, requires_grad=False)
    for _ in range(warm):
        model(x)
    traced = torch.jit.trace(model, x)  # with gradients on, and checked by tracing again
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for run in (traced, torch.jit.load(file), model):
        assert_same([run(z)], [reference(z)])
    with torch.no_grad():
        assert_same([torch.jit.trace(model, x)(z)], [reference(z)])


def whole(model) -> None:
    inner(model).compile(backend="eager", fullgraph=True)


def blocks(model) -> None:
    for block in inner(model).blocks:
        block.compile(backend="eager", fullgraph=True)


def one_block(model) -> None:
    inner(model).blocks[1].compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("part", [whole, blocks, one_block], ids=lambda part: part.__name__)
@every_method
def test_compiled(method, part):
    """In one graph, with gradients and without, after passes that were not compiled, and after parameters changed."""
    torch.compiler.reset()
    model, reference = adapted(method)
    x = sample()
    model(x).sum().backward()
    part(model)
    assert_agree(model, reference, x, passes=2)
    change(model)
    assert_agree(model, reference, x, passes=1)


@every_method
def test_compiled_from_outside(method):
    torch.compiler.reset()
    model, reference = adapted(method)
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), sample()
    leaves = [*trained(model), x]
    want = step(lambda: reference(x), leaves)
    for _ in range(2):
        assert_same(step(lambda: compiled(x), leaves), want)
        assert_same(step(lambda: model(x), leaves), want)
