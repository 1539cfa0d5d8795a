"""What holds for every method on every base layer: `weight(W)` is the definition, the base layer itself the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.func import functional_call

from halotune import PeftModel
from halotune.core.adapter import Adapter
from halotune.core.layer import AdaptedLayer

from .cases import (
    Case,
    Model,
    Variant,
    arrays,
    grid,
    make_adapter,
    matrix,
    pairs,
    relative,
    run_with,
    some_bases,
    train,
    trained_parameters,
    wrap,
)

HALF = (torch.bfloat16, torch.float16)


def only(layer: AdaptedLayer) -> Adapter:
    (adapter,) = layer.adapters.values()
    return adapter


def assert_same(layer, expected, x, inputs):
    """Outputs, and gradients with respect to `inputs`, agree."""
    y = layer(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, probe)
    theirs = torch.autograd.grad(expected, inputs, probe)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# -- 1. The layer is the base with weight(W).


@grid(torch.float64)
def test_output_and_gradients_are_those_of_the_definition(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.requires_grad_()
    expected = run_with(layer.base_layer, only(layer).weight(matrix(layer.base_layer)), x)
    assert relative(expected, layer.base_layer(x)) > 1e-3  # it does something
    assert_same(layer, expected, x, [x, *trained_parameters(layer)])


class Pair(torch.nn.Module):
    """Two layers of one shape: what depends on parameters alone may be computed for both together."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.a, self.b = Model(case.module()), Model(case.module())

    def forward(self, x):
        return self.a(x) - 2 * self.b(x)


@grid(torch.float64, bases=some_bases("linear", "conv2d-grouped"))
def test_layers_of_a_model_are_those_of_the_definition(case: Case):
    """In training and in eval, and again after the parameters changed."""
    model, x = wrap(Pair(case), case.variant.config), case.input(requires_grad=True)
    layers = [model.get_base_model().a.layer, model.get_base_model().b.layer]
    for training in (True, False):
        model.train(training)
        for _ in range(2):
            train(torch.nn.ModuleList(only(layer) for layer in layers))
            a, b = (run_with(m.base_layer, only(m).weight(matrix(m.base_layer)), x) for m in layers)
            assert_same(model, a - 2 * b, x, [x, *trained_parameters(model)])
            with torch.no_grad():
                torch.testing.assert_close(model(x), a - 2 * b, rtol=1e-10, atol=1e-10)


# -- 2. Training starts at the base's function, or the configuration says why not.


@grid(torch.float64)
def test_identity_at_start_or_a_notice(case: Case):
    layer, x = case.layer(trained=False), case.input()
    away = relative(layer(x), layer.base_layer(x))
    notices = case.variant.config.notices()
    assert (away > 1e-3) if notices else (away < 1e-12)


# -- 3. Low-rank factors.


@grid(torch.float64)
def test_factors_are_exact_and_of_the_rank_stated(case: Case):
    layer = case.layer()
    W = matrix(layer.base_layer)
    factors = only(layer).factors(W)
    delta = only(layer).weight(W) - W
    if case.variant.rank is None:
        assert factors is None
        return
    B, A = factors
    assert B.shape == (W.shape[0], case.variant.rank) and A.shape == (case.variant.rank, W.shape[1])
    torch.testing.assert_close(B @ A, delta, rtol=1e-10, atol=1e-12)
    assert 0 < torch.linalg.matrix_rank(delta, atol=1e-10) <= case.variant.rank


# -- 4. Merging.


@grid(torch.float64, torch.float32)
@torch.no_grad()
def test_merge_keeps_outputs(case: Case):
    layer, x = case.layer(), case.input()
    before = layer(x)
    record = layer.merge(["default"])
    assert layer.merged_adapters == ["default"]
    assert relative(layer(x), before) < (1e-12 if case.dtype == torch.float64 else 2e-6)
    assert record.delta > 1e-3 and record.changed > 0.5 and record.lost < 1e-6


@grid(torch.float32, *HALF)
@torch.no_grad()
def test_merge_rounds_once_and_unmerge_is_bit_exact(case: Case):
    layer, x = case.layer().eval(), case.input()  # in training W' is rounded by chance
    parameter, raw, before = layer.base_layer.weight, layer.base_layer.weight.clone(), layer(x)
    merged = only(layer).weight(matrix(layer.base_layer).float()).to(case.dtype)

    layer.merge(["default"])
    assert torch.equal(matrix(layer.base_layer), merged)
    assert not torch.equal(layer.base_layer.weight, raw)
    assert torch.equal(layer(x), layer.base_layer(x))

    layer.unmerge()
    assert layer.base_layer.weight is parameter
    assert torch.equal(layer.base_layer.weight, raw)
    assert torch.equal(layer(x), before)


# -- 5. Scale, and several adapters.


@grid(torch.float64)
def test_scale_is_between_the_base_and_the_adapter(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    layer.scales["default"] = s = -0.7
    W = matrix(layer.base_layer)
    scaled = W + s * (only(layer).weight(W) - W)
    assert_same(layer, run_with(layer.base_layer, scaled, x), x, [x, *trained_parameters(layer)])
    torch.testing.assert_close(layer.merged_weight(["default"]), scaled.detach(), rtol=1e-10, atol=1e-12)


@pairs(torch.float64, some_bases("linear", "gpt2-conv1d", "conv2d-grouped"))
def test_ordered_pairs_compose(case: Case, second: Variant):
    layer, x = case.layer(), case.input(requires_grad=True)
    layer.add("second", make_adapter(second, layer.base.shape, case.dtype))
    layer.active_adapters = ["default", "second"]
    layer.scales.update(default=1.3, second=0.6)

    composed = W = matrix(layer.base_layer)
    for name in layer.active_adapters:
        composed = composed + layer.scales[name] * (layer.adapters[name].weight(composed) - composed)
    assert_same(layer, run_with(layer.base_layer, composed, x), x, [x, *trained_parameters(layer)])
    assert torch.equal(W, matrix(layer.base_layer))

    expected = layer(x)
    layer.merge(["default"])  # the second one still applies, after it
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    layer.merge(["second"])
    torch.testing.assert_close(layer.base_layer(x), expected, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    assert torch.equal(W, matrix(layer.base_layer))


# -- 6. Gradients.


@grid(torch.float64)
def test_gradcheck(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *trained_parameters(layer)), fast_mode=True)


@grid(torch.float32)
def test_only_the_adapter_gets_gradients(case: Case):
    model = wrap(Model(case.module().requires_grad_()), case.variant.config)
    model(case.input(requires_grad=True)).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".adapters.default." in name}


# -- 7. Files.


@grid(torch.bfloat16)
def test_saved_and_loaded_is_the_same(case: Case, tmp_path):
    base, x = case.module(), case.input()
    model = wrap(Model(copy.deepcopy(base)), case.variant.config).eval()
    train(model.get_base_model().layer.adapters)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(Model(base), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), base(x))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


# -- 8. Precision: as close to float64 as the plain layer that holds the merged weight.


DRAWS = 8


@torch.no_grad()
def assert_as_close(case: Case, dtype: torch.dtype, autocast: bool):
    """`|ours − exact| ≤ 1.5 |plain − exact| + ε/4 |exact|` over several draws, `exact` in float64 on the same numbers.

    ε/4 is one more rounding of the output: a low-rank form adds to what the base has rounded already. In training W' is rounded
    by chance, with twice the variance of rounding to nearest. All draws count alike: of products of four normal numbers the
    largest would decide alone, and the law would be one about chance.
    """
    for training in (True, False):
        ours, plain = 0.0, 0.0
        for _ in range(DRAWS):
            layer, x = case.layer().train(training), case.input()
            double = copy.deepcopy(layer).double()
            W = only(double).weight(matrix(double.base_layer))
            exact = run_with(double.base_layer, W, x.double())
            with torch.autocast("cpu", dtype, enabled=autocast):
                y, y_plain = layer(x), run_with(layer.base_layer, W.to(case.dtype), x)
            assert y.dtype == y_plain.dtype == dtype
            ours += relative(y, exact) ** 2
            plain += relative(y_plain, exact) ** 2
        assert (ours / DRAWS) ** 0.5 <= 1.5 * (plain / DRAWS) ** 0.5 + torch.finfo(dtype).eps / 4


@grid(*HALF)
def test_half_precision_is_as_good_as_a_plain_layer(case: Case):
    assert_as_close(case, case.dtype, autocast=False)


@grid(torch.float32)
def test_autocast_is_as_good_as_a_plain_layer(case: Case):
    assert_as_close(case, torch.bfloat16, autocast=True)


@grid(torch.float32)
@torch.no_grad()
def test_single_precision_is_accurate(case: Case):
    layer, x = case.layer(), case.input()
    assert relative(layer(x), copy.deepcopy(layer).double()(x.double())) < 2e-6


@grid(torch.float32, bases=some_bases("linear", "conv2d-strided"))
@torch.no_grad()
def test_the_definition_ignores_autocast(case: Case):
    layer = case.layer()
    layer.scales["default"] = 0.5
    W = matrix(layer.base_layer)
    expected = only(layer).weight(W), layer.merged_weight(["default"])
    with torch.autocast("cpu", torch.bfloat16):
        found = only(layer).weight(W), layer.merged_weight(["default"])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == W.dtype
        assert torch.equal(a, b)


@pairs(torch.float32, some_bases("linear", "conv2d-strided"))
def test_pairs_run_under_autocast(case: Case, second: Variant):
    layer, x = case.layer(), case.input(requires_grad=True)
    layer.add("second", make_adapter(second, layer.base.shape, case.dtype))
    layer.active_adapters = ["default", "second"]
    layer.scales["default"] = 0.5
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 0.03
    inputs = arrays(x, *trained_parameters(layer))
    probe = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(y, inputs, probe.bfloat16()), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        assert relative(a, b) < 0.06


@grid(*HALF)
def test_half_precision_gradients_are_near(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    y = layer(x)
    probe = torch.randn_like(y)
    inputs = arrays(x, *trained_parameters(layer))
    ours = torch.autograd.grad(y, inputs, probe)
    double, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact = torch.autograd.grad(double(x64), arrays(x64, *trained_parameters(double)), probe.double())
    for g, e, p in zip(ours, exact, inputs, strict=True):
        assert g.dtype == p.dtype
        assert relative(g, e) < 8 * torch.finfo(case.dtype).eps


# -- 9. The compiler, and hooks of the base layer.


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does it
@grid(torch.float32, bases=some_bases("linear", "conv2d-strided"))
def test_compiles_whole(case: Case):
    layer, x = case.layer(), case.input(requires_grad=True)
    inputs = [x, *trained_parameters(layer)]
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@grid(torch.float32, bases=some_bases("linear", "gpt2-conv1d", "conv2d-strided"))
def test_hooks_of_the_base_fire(case: Case):
    layer, fired = case.layer(), []
    layer.base_layer.register_forward_pre_hook(lambda *_: fired.append("before"))
    layer.base_layer.register_forward_hook(lambda *_: fired.append("after"))
    layer(case.input())
    assert fired == ["before", "after"]


# -- 10. Copies.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@grid(torch.float32)
@torch.no_grad()
def test_copies_are_complete_and_their_own(case: Case, copied):
    layer, x = case.layer(), case.input()
    layer.scales["default"] = 0.5
    before = layer(x)
    layer.merge(["default"])
    duplicate = copied(layer)
    assert torch.equal(duplicate(x), layer(x))
    duplicate.unmerge()
    assert torch.equal(duplicate(x), before)
    assert layer.merged  # the original is as it was
    train(duplicate)
    layer.unmerge()
    assert torch.equal(layer(x), before)
