"""Checkpoints where W' is rounded stochastically: what runs again is what ran, and dropout drops the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cases import Attention, Net, adapted, directly, every_method, inner, sample, square_sum, step, trained


class Dropped(nn.Module):
    """A block with dropout behind every part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dropout = Attention(), Attention(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.second(self.dropout(self.first(x))))


class DroppedNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropped() for _ in range(2))


def without_reentry(block, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def with_reentry(block, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def the_whole(model, run, x: Tensor) -> Tensor:
    inner(model).run = run
    return model(x)


def a_checkpoint_around_the_model(model, run, x: Tensor) -> Tensor:
    return run(model, x)


def a_block_alone(model, run, x: Tensor) -> Tensor:
    return run(inner(model).blocks[0], x)


PARTS = [the_whole, a_checkpoint_around_the_model, a_block_alone]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("form", ["auto", "weights"])
@every_method
def test_as_without_a_checkpoint(method, form, part):
    model, _ = adapted(method, DroppedNet, dtype=torch.bfloat16, std=0.05)
    model.set_adapter_form(form)
    x = sample(dtype=torch.bfloat16)

    def gradients(run, y=part) -> list[Tensor | None]:
        torch.manual_seed(3)
        return step(lambda: y(model, run, x), [*trained(model), x], lambda y: square_sum(y.float()))

    gradients(directly, the_whole)  # a pass of the whole before, which a block alone has nothing to do with
    want, got = gradients(directly), gradients(without_reentry)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    if part is a_block_alone:  # it draws where it runs: without gradients, nothing
        return
    dx = gradients(with_reentry)[1 + len(trained(model))]  # run first without gradients, W' is rounded to nearest there
    assert float((dx - want[-1]).norm() / want[-1].norm()) < 0.1  # another mask gives 0.5 and more


@every_method
def test_every_pass_draws_anew(method):
    model, _ = adapted(method, dtype=torch.bfloat16, std=0.05)
    model.set_adapter_form("weights")
    x = sample(dtype=torch.bfloat16, requires_grad=False)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    third = model(x)
    torch.manual_seed(0)
    assert torch.equal(third, model(x))
