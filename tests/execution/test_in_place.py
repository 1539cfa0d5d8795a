"""Outputs of adapted layers may be written in place, in training too, as those of the layers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .cases import ALL, METHODS, WIDTH, adapted, assert_agree, linear, sample


def relu_(y: Tensor, x: Tensor) -> Tensor:
    return torch.relu_(y)


def add_the_input(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


def divide(y: Tensor, x: Tensor) -> Tensor:
    y /= 2
    return y


def write_a_slice(y: Tensor, x: Tensor) -> Tensor:
    y[..., :2] = 0
    return y


def masked_fill_(y: Tensor, x: Tensor) -> Tensor:
    return y.masked_fill_(x < 0, 0.1)


def write_a_view(y: Tensor, x: Tensor) -> Tensor:
    y.view(-1)[::3].mul_(2)
    return y


WAYS = [relu_, add_the_input, divide, write_a_slice, masked_fill_, write_a_view]
LAYERS = {
    "linear": (linear, (2, 5, WIDTH)),
    "gpt2": (lambda: Conv1D(WIDTH, WIDTH), (2, 5, WIDTH)),
    "conv1d": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), (2, WIDTH, 5)),
}


class Written(nn.Module):
    """Layers of one input, and one behind them; two of the outputs are written."""

    def __init__(self, layer, way) -> None:
        super().__init__()
        self.q, self.k, self.o = layer(), layer(), layer()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return self.way(self.o(self.way(q, x) * torch.tanh(k)), x)


CELLS = [(method, kind) for method in ALL for kind in LAYERS if kind == "linear" or method in METHODS]


@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_outputs_are_written_in_place(method, kind):
    layer, size = LAYERS[kind]
    model, reference = adapted(method, lambda: Written(layer, relu_), ["q", "k", "o"])
    for way in WAYS:
        model.get_base_model().way = reference.plain.way = way
        assert_agree(model, reference, sample(*size), passes=2)
        assert_agree(model, reference, sample(*size, requires_grad=False), passes=1)
