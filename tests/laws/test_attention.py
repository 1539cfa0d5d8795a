"""The laws on `torch.nn.MultiheadAttention`, whose projections are adapted as weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from halotune import PeftModel
from halotune.engine.injection.modules import adapted_layers

from .cases import VARIANTS, Variant, relative, train, trained_parameters, wrap

KINDS = {"packed": {}, "separate": {"kdim": 9, "vdim": 12}}

GRID = pytest.mark.parametrize(
    ("variant", "kind"),
    [pytest.param(v, k, id=f"{v.name}/{k}") for v in VARIANTS if not v.needs_kernel for k in KINDS],
)


class Attending(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = nn.MultiheadAttention(15, 3, batch_first=True, dtype=torch.float64, **KINDS[kind])

    def forward(self, q, k, v):
        return self.layer(q, k, v, need_weights=False)[0]


def inputs(kind, *, requires_grad=False):
    sizes = (4, 15), (5, KINDS[kind].get("kdim", 15)), (5, KINDS[kind].get("vdim", 15))
    return [torch.randn(2, *size, dtype=torch.float64, requires_grad=requires_grad) for size in sizes]


def adapted(variant: Variant, kind: str):
    """A plain model, and one of the same weights with a trained adapter."""
    plain = Attending(kind).requires_grad_(False)
    model = wrap(copy.deepcopy(plain), variant.config)
    for layer in adapted_layers(model).values():
        train(layer.adapters)
    return plain, model


def merged_weights(plain, model):
    """`weight(W)` of every projection, under the names of the plain model."""
    weights = {}
    for path, layer in adapted_layers(model).items():
        projection = path.rpartition(".")[-1]
        name = "layer.out_proj.weight" if projection == "out_proj" else f"layer.{projection}_weight"
        weights[name] = layer.adapters["default"].weight(plain.get_parameter(name))
    return weights


@GRID
def test_output_and_gradients_are_those_of_the_definition(variant, kind):
    plain, model = adapted(variant, kind)
    weights = merged_weights(plain, model)
    assert len(weights) == (2 if kind == "packed" else 4)
    given = inputs(kind, requires_grad=True)
    expected = functional_call(plain, weights, tuple(given))
    assert relative(expected, plain(*given)) > 1e-3
    found = model(*given)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = [*given, *trained_parameters(model)]
    probe = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, probe), torch.autograd.grad(expected, wanted, probe), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@GRID
@torch.no_grad()
def test_merged_saved_and_unloaded(variant, kind, tmp_path):
    plain, model = adapted(variant, kind)
    model.eval()  # torch's fused path
    given = inputs(kind)
    expected = functional_call(plain, merged_weights(plain, model), tuple(given))
    torch.testing.assert_close(model(*given), expected, rtol=1e-10, atol=1e-10)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(loaded(*given), expected, rtol=1e-10, atol=1e-10)

    model.merge_adapter()
    torch.testing.assert_close(model(*given), expected, rtol=1e-10, atol=1e-10)
    bare = model.unload()
    assert bare.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in bare.state_dict().items())
