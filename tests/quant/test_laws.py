"""What holds for every method on every quantized layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halotune import HalotuneError
from halotune.core.layer import AdaptedLayer

from ..laws.cases import arrays, make_adapter, relative, trained_parameters
from .cases import NEED_WEIGHT, ONE_EACH, OPAQUE, READABLE, VARIANTS, Case, grid, matrix, same, some, stored_tensors


def tolerance(case: Case) -> float:
    return 2e-5 if case.base.dtype == torch.float32 else 2e-2


def definition(layer: AdaptedLayer, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """In fp32: the layer with `weight(W)`, W being what its own kernel applies."""
    W = matrix(layer.base_layer)
    for name in names:
        W = W + layer.scales[name] * (layer.adapters[name].weight(W) - W)
    return F.linear(x.float(), W, layer.base_layer.bias.float())


def assert_gradients_agree(y, expected, inputs, limit):
    probe, inputs = torch.randn_like(expected), arrays(*inputs)
    ours = torch.autograd.grad(y, inputs, probe.to(y.dtype))
    for a, b in zip(ours, torch.autograd.grad(expected, inputs, probe), strict=True):
        assert relative(a, b) < limit


@grid()
def test_output_and_gradients_are_those_of_the_definition(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    expected = definition(layer, x, ["default"])
    assert relative(expected, layer.base_layer(x)) > 0.05  # it does something
    y = layer(x)
    assert y.dtype == case.base.dtype and relative(y, expected) < tolerance(case)
    assert_gradients_agree(y, expected, [x, *trained_parameters(layer)], 3 * tolerance(case))


@grid()
@torch.no_grad()
def test_eval_mode(case: Case):
    """Where kernels may round activations, or rearrange the weight; and again afterwards."""
    layer, x = case.layer(), case.input()
    expected = definition(layer, x, ["default"])
    layer.eval()
    for _ in range(2):
        assert relative(layer(x), expected) < max(case.base.eval_error, 2 * tolerance(case))


@grid()
def test_training_after_evaluation_is_as_before(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    inputs = [x, *trained_parameters(layer)]
    torch.manual_seed(1)  # W' is rounded by chance in training
    y = layer(x)
    before = torch.autograd.grad(y.sum(), inputs)
    with torch.no_grad():
        layer.eval()(x.detach())
    torch.manual_seed(1)
    again = layer.train()(x)
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again.sum(), inputs), before, strict=True))


@pytest.mark.parametrize("reading", ["forward", "backward"])
@grid()
def test_who_reads_the_weight(case: Case, reading, monkeypatch):
    """HRA, OFT, Bone, LoRA and low-rank LoHa call the layer as it is, and nothing else."""
    layer, x = case.layer(), case.input(requires_grad=True)
    kind = type(layer.base)
    if reading == "backward":
        y = layer(x)

    def read(self):
        raise AssertionError("the weight was read")

    monkeypatch.setattr(kind, "weight", read)
    call = (lambda: layer(x)) if reading == "forward" else (lambda: y.sum().backward())
    if case.variant.name in NEED_WEIGHT and not layer.base.opaque:
        with pytest.raises(AssertionError, match="the weight was read"):
            call()
    else:
        call()


@grid(READABLE, ONE_EACH)
@torch.no_grad()
def test_merging_quantizes_the_definition_and_says_what_it_cost(case: Case):
    layer, x = case.layer(), case.input()
    W = matrix(layer.base_layer)
    wanted = layer.adapters["default"].weight(W)
    record = layer.merge(["default"])
    bias = layer.base_layer.bias
    fresh = matrix(case.base.build(wanted.to(case.base.dtype), bias))
    assert relative(matrix(layer.base_layer), fresh) <= (0.0 if case.base.dtype == torch.float32 else 0.5 * case.base.step)
    lost = relative(matrix(layer.base_layer), wanted)
    assert lost < 2 * case.base.step
    assert record.error * record.weight_norm == pytest.approx(lost * float(wanted.norm()), rel=0.05)
    assert record.delta == pytest.approx(float((wanted - W).norm() / W.norm()), rel=0.05)
    assert relative(layer(x), F.linear(x.float(), wanted, bias.float())) < 3 * case.base.step


@pytest.mark.parametrize("evaluated", [False, True], ids=["", "after-eval"])
@grid(READABLE, ONE_EACH)
@torch.no_grad()
def test_unmerging_is_bit_exact(case: Case, evaluated):
    layer, x = case.layer().train(not evaluated), case.input()
    torch.manual_seed(1)
    y = layer(x)
    before = stored_tensors(layer.base_layer)
    merged = []
    for _ in range(2):
        layer.merge(["default"])
        merged.append(matrix(layer.base_layer))
        assert not same(before, stored_tensors(layer.base_layer))
        layer(x)
        layer.unmerge()
        torch.manual_seed(1)
        assert same(before, stored_tensors(layer.base_layer)) and torch.equal(layer(x), y)
    assert torch.equal(*merged)


@grid(READABLE, ONE_EACH)
@torch.no_grad()
def test_merging_after_evaluation_is_merging_before(case: Case):
    """bitsandbytes' 4-bit weight is rearranged in place by an evaluation on the CPU: misread, the merge is 36 % off."""
    layer, x = case.layer(), case.input()
    duplicate = copy.deepcopy(layer)
    layer.eval()(x)
    for one in (layer, duplicate):
        one.merge(["default"])
    assert torch.equal(matrix(layer.base_layer), matrix(duplicate.base_layer))


@grid(READABLE, ONE_EACH)
@torch.no_grad()
def test_merged_into_floats(case: Case):
    layer, x = case.layer(), case.input()
    torch.manual_seed(1)  # W' is rounded by chance in training
    module, y = layer.base_layer, layer(x)
    before = stored_tensors(module)
    wanted = layer.adapters["default"].weight(matrix(module))
    record = layer.merge(["default"], as_float=case.base.dtype)
    assert (
        type(layer.base_layer) is nn.Linear and layer.base_layer.weight.dtype == layer.base_layer.bias.dtype == case.base.dtype
    )
    assert record.lost < tolerance(case) and relative(layer.base_layer.weight, wanted) < tolerance(case)
    assert relative(layer(x), y) < 2 * tolerance(case)
    layer.unmerge()
    torch.manual_seed(1)
    assert layer.base_layer is module and same(before, stored_tensors(module)) and torch.equal(layer(x), y)


@grid(READABLE, [v for v in VARIANTS if v.name in ("hra-r4", "bone-r3", "bat-r3")])
def test_two_adapters_compose_in_order(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    for second in VARIANTS:
        layer.add("second", make_adapter(second, layer.base.shape, torch.float32))
        for p in layer.adapters["second"].parameters():
            p.data.mul_(0.3)
        layer.active_adapters = ["default", "second"]
        layer.scales.update(default=1.3, second=0.6)
        expected = definition(layer, x, layer.active_adapters)
        y = layer(x)
        assert relative(y, expected) < 2 * tolerance(case)
        assert_gradients_agree(y, expected, [x, *trained_parameters(layer)], 6 * tolerance(case))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does it
@grid(some("bnb-nf4", "bnb-int8", "ao-int8", "hqq-4bit", "packed"), [v for v in ONE_EACH if v.name in ("hra-r4", "bat-r3")])
def test_compiles_whole(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    inputs = [x, *trained_parameters(layer)]
    torch.compiler.reset()
    y, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    assert relative(y, expected) < 1e-5
    assert_gradients_agree(y, expected, inputs, 1e-4)


@grid()
@torch.no_grad()
def test_copies_are_complete_and_their_own(case: Case):
    layer, x = case.layer().eval(), case.input()
    y = layer(x)
    if not layer.base.opaque:
        layer.merge(["default"])
    duplicate = copy.deepcopy(layer)
    assert torch.equal(duplicate(x), layer(x))
    duplicate.unmerge()
    assert torch.equal(duplicate(x), y)
    assert layer.merged is not layer.base.opaque  # the original is as it was
    layer.unmerge()
    assert torch.equal(layer(x), y)


@grid(READABLE, ONE_EACH)
@torch.no_grad()
def test_a_merge_that_fails_leaves_the_layer_as_it_was(case: Case, monkeypatch):
    layer, x = case.layer().eval(), case.input()
    y = layer(x)
    before = stored_tensors(layer.base_layer)

    def fail(self, W):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(layer.base), "quantize", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.merge(["default"])
    layer.unmerge()
    assert same(before, stored_tensors(layer.base_layer)) and torch.equal(layer(x), y)


def test_a_layer_that_can_only_be_called_cannot_be_read():
    layer = Case(VARIANTS[0], OPAQUE).layer()
    with pytest.raises(HalotuneError, match=r"PackedLinear \(96, 192\) \[tests\] can be called, but its weight cannot be read"):
        layer.merge(["default"])
    assert not layer.merged
