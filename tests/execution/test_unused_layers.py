"""A layer that did not run, or whose output no loss used, has no gradient, and no optimizer moves it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cases import adapted, assert_same, every_method, every_method_and_sped_up, inner, linear, sample, step, trained


class Branches(nn.Module):
    """`take` says how b runs. All layers have one shape: what they need may be computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()
        self.take = "b"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.take == "b":
            x = x + torch.tanh(self.b(x))
        if self.take == "detached":
            x = x + self.b(x).detach()
        if self.take == "without gradients":
            with torch.no_grad():
                x = x + self.b(x)
        if self.take == "unused":
            self.b(x)
        if self.take == "checkpointed without b":
            return checkpoint(self.c, x, use_reentrant=False)  # type: ignore[return-value]
        return self.c(x)


WAYS = ["left out", "detached", "without gradients", "unused", "checkpointed without b"]


@pytest.mark.parametrize("way", WAYS)
@every_method_and_sped_up
def test_no_gradient(method, way):
    model, reference = adapted(method, Branches, ["a", "b", "c"])
    leaves, unused = trained(model), [p for p in inner(model).b.parameters() if p.requires_grad]
    for _ in range(2):
        for take in ("b", way, way):
            inner(model).take = take
            reference.plain.take = take.replace("checkpointed without b", "left out")
            want = step(lambda: reference(sample()), leaves)
            got = step(lambda: model(sample()), leaves)
            assert all((p.grad is None) == (take != "b") for p in unused)
            assert_same(got, want)


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@every_method
def test_optimizers_leave_it(method, optimizer):
    model, _ = adapted(method, Branches, ["a", "b", "c"])
    opt, unused = OPTIMIZERS[optimizer](trained(model)), [p for p in inner(model).b.parameters() if p.requires_grad]
    for i in range(6):
        inner(model).take = "b" if i < 3 else "left out"
        before = [p.detach().clone() for p in unused]
        opt.zero_grad(set_to_none=True)
        model(sample()).square().mean().backward()
        opt.step()
        assert all(torch.equal(a, b) != (i < 3) for a, b in zip(before, unused, strict=True))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@every_method_and_sped_up
def test_a_head_that_the_loss_does_not_use(method):
    model, reference = adapted(method, Heads, ["first", "second"])
    leaves, x = trained(model), sample()
    for head in (0, 1, 1, 0):
        want = step(lambda: reference(x), leaves, lambda y, head=head: y[head].square().sum())
        got = step(lambda: model(x), leaves, lambda y, head=head: y[head].square().sum())
        assert sum(t is None for t in got) == len(leaves) // 2
        assert_same(got, want)
