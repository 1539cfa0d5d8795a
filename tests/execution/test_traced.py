"""torch.jit.trace and torch.compile, of whole models and of blocks, before and after ordinary passes."""

from __future__ import annotations

import io

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

from .cases import (
    METHODS,
    Attention,
    Net,
    adapted,
    assert_agree,
    assert_same,
    change,
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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes may be compared; torch checks what it traced
@pytest.mark.parametrize("before", [True, False], ids=["after-a-pass", "first"])
@every_method_and_sped_up
def test_traced_checked_saved_and_loaded(method, before):
    model, reference = adapted(method, lambda: Net(1))
    model.eval()
    x, z = sample(2, 12, requires_grad=False), sample(5, 12, seed=3, requires_grad=False)
    if before:
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


def wrapper(model) -> None:
    model.compile(backend="eager", fullgraph=True)


# Tracing takes seconds: every method as whole blocks, the other parts with one method of each kind.
CELLS = [*((method, blocks) for method in METHODS if method != "hra-gs"), ("hra", whole), ("bat", whole), ("lora", wrapper)]


@pytest.mark.parametrize(("method", "part"), CELLS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_compiled(method, part):
    """In one graph, after a pass that was not compiled, with gradients and without, and after parameters changed."""
    torch.compiler.reset()
    model, reference = adapted(method, lambda: Net(1))
    x = sample()
    leaves = [*trained(model), x]
    model(x).sum().backward()
    part(model)
    for _ in range(2):
        want = step(lambda: reference(x), leaves)
        assert_same(step(lambda: model(x), leaves), want)
        change(model)
    with torch.no_grad():
        assert_same([model(x)], [reference(x)])


def test_one_block_of_two_is_compiled():
    torch.compiler.reset()
    model, reference = adapted("hra")
    inner(model).blocks[1].compile(backend="eager", fullgraph=True)
    assert_agree(model, reference, sample(), passes=2)


def as_transformers_does(model) -> None:
    for block in inner(model).blocks:
        block.gradient_checkpointing = True
    inner(model).run = lambda block, x: checkpoint(block, x, use_reentrant=False)


def by_wrappers(model) -> None:
    apply_activation_checkpointing(inner(model), check_fn=lambda module: isinstance(module, Attention))


@pytest.mark.parametrize("put", [as_transformers_does, by_wrappers], ids=lambda put: put.__name__)
@pytest.mark.parametrize("method", ["hra", "lora"])
def test_checkpoints_around_compiled_blocks(method, put):
    """The compiler decides what to keep for backward; that must be the same when a block runs again."""
    torch.compiler.reset()
    model, reference = adapted(method)
    leaves = [*trained(model), x := sample()]
    want = step(lambda: reference(x), leaves)
    for block in inner(model).blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    put(model)
    for _ in range(2):
        assert_same(step(lambda: model(x), leaves), want)
