"""Parts of a model: called alone, in any order, under checkpoints of any kind, with other passes in between."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .cases import (
    adapted,
    assert_agree,
    assert_same,
    change,
    directly,
    every_method,
    every_method_and_sped_up,
    inner,
    sample,
    square_sum,
    step,
    trained,
)

# A reentrant checkpoint says so of inputs that need no gradient, transformers 5 that its own method has a new name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

aten = torch.ops.aten
keep_products = partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default, aten.tanh.default])
once = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)


def nested(block, x: Tensor) -> Tensor:
    return once(lambda x: once(block, once(torch.tanh, x)) - torch.tanh(x), x)


def nested_directly(block, x: Tensor) -> Tensor:
    return block(torch.tanh(x)) - torch.tanh(x)


def on_cpu(block, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return block(x)


# How the adapted model runs a block, and what the reference does instead.
RUNS = {
    "directly": (directly, directly),
    "checkpoint": (once, directly),
    "reentrant": (reentrant, directly),
    "selective": (partial(once, context_fn=keep_products), directly),
    "nested": (nested, nested_directly),
    "save_on_cpu": (on_cpu, directly),
}
every_run = pytest.mark.parametrize("run", RUNS)


def model_with(method: str, run: str):
    model, reference = adapted(method)
    inner(model).run, reference.plain.run = RUNS[run]
    return model, reference


@every_run
@every_method_and_sped_up
def test_blocks_under_checkpoints(method, run):
    model, reference = model_with(method, run)
    assert_agree(model, reference, sample())


@every_run
@every_method_and_sped_up
def test_a_part_alone_after_a_step_of_the_whole(method, run):
    """As embedding trainers do: the language model, then its inner model."""
    model, reference = adapted(method)
    leaves, x = [*trained(model), x := sample()], x
    ours, theirs = RUNS[run]
    for _ in range(2):
        model(x).sum().backward()
    change(model)
    want = step(lambda: theirs(reference.part("blocks.1"), x), leaves)
    for _ in range(2):
        assert_same(step(lambda: ours(inner(model).blocks[1], x), leaves), want)
        with torch.no_grad():
            assert_same([inner(model).blocks[1](x)], [reference.part("blocks.1")(x)])
    assert_agree(model, reference, x, passes=1)


@every_run
@every_method
def test_the_whole_and_parts_in_one_loss(method, run):
    """The order of the blocks changes, one runs twice, one alone."""
    model, reference = model_with(method, run)
    x = sample()
    leaves = [*trained(model), x]
    ours, theirs = RUNS[run]

    def loss(whole, run, blocks):
        y = whole(x)
        z = run(blocks[0], run(blocks[1], run(blocks[1], x)))
        return torch.stack([square_sum(y), square_sum(z - y), run(blocks[0], y).sum()])

    parts = [reference.part("blocks.0"), reference.part("blocks.1")]
    want = step(lambda: loss(reference, theirs, parts), leaves)
    for _ in range(2):
        assert_same(step(lambda: loss(model, ours, inner(model).blocks), leaves), want)


def again(model, x):
    with torch.no_grad():
        return model(x)


def in_eval_mode(model, x):
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train()
    return y


def under_inference_mode(model, x):
    with torch.inference_mode():
        y = model(x)
    return y.clone()


def one_block(model, x):
    with torch.no_grad():
        return inner(model).blocks[1](x)


def without_adapters(model, x):
    with torch.no_grad(), model.disable_adapter():
        return model(x)


def with_gradients(model, x):
    return model(x).detach()


BETWEEN = [again, in_eval_mode, under_inference_mode, one_block, without_adapters, with_gradients]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
@every_method
def test_another_pass_between_forward_and_backward(method, between):
    """A sample for the log, a teacher's answer."""
    for run in ("directly", "checkpoint", "selective"):
        model, reference = model_with(method, run)
        x, z = sample(), sample(3, 12, seed=2, requires_grad=False)
        leaves = [*trained(model), x]

        def both(x=x, z=z, model=model):
            y = model(x)
            between(model, z)
            return y

        want = step(lambda reference=reference, x=x: reference(x), leaves)
        for _ in range(2):
            assert_same(step(both, leaves), want)


@every_method
def test_a_language_model_that_generates_between_forward_and_backward(method, language_model):
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    model, reference = adapted(method, lambda: language_model, targets)
    ids = torch.arange(1, 11).view(2, 5)
    model.train()
    leaves = trained(model)

    def logits(model, between=lambda: None):
        y = model(ids).logits
        between()
        return y

    want = step(lambda: logits(reference), leaves)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(2):
        generate = partial(model.generate, ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert_same(step(lambda generate=generate: logits(model, generate), leaves), want, tolerance=1e-7)
