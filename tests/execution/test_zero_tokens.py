"""Inputs without a single token, as experts get that nobody chose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .cases import adapted, assert_same, every_method_and_sped_up, linear, sample, step, trained


class Fan(nn.Module):
    """Layers of one input, of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = linear(), linear(12, 24), linear(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.mark.parametrize("size", [(0, 12), (2, 0, 12), (0, 5, 12)], ids=str)
@every_method_and_sped_up
def test_no_tokens(method, size):
    model, reference = adapted(method, Fan, ["q", "k", "v"])
    for requires_grad in (True, False):
        x = sample(*size, requires_grad=requires_grad)
        leaves = [*trained(model), *([x] if requires_grad else [])]
        want = step(lambda x=x: reference(x), leaves)
        for _ in range(2):
            assert_same(step(lambda x=x: model(x), leaves), want, none_is_zero=True)
            with torch.no_grad():
                assert model(x).shape == want[0].shape  # type: ignore[union-attr]
        z = sample(4, 12)
        assert_same(step(lambda z=z: model(z), leaves[:1]), step(lambda z=z: reference(z), leaves[:1]))


class Experts(nn.Module):
    """Every row goes through one of four."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = linear(12, 4)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": linear(12, 16), "down": linear(16, 12)}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == i)[:, 0]
            y = y.index_add(0, rows, expert["down"](torch.tanh(expert["up"](x[rows]))))  # type: ignore[index]
        return y


@every_method_and_sped_up
def test_experts_without_tokens(method):
    model, reference = adapted(method, Experts, ["up", "down"])
    for rows in (1, 3, 1, 0):
        x = sample(rows, 12)
        leaves = [*trained(model), x]
        want = step(lambda x=x: reference(x), leaves)
        assert_same(step(lambda x=x: model(x), leaves), want, none_is_zero=True)
