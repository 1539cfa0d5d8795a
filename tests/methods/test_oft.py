"""OFT: rotations in blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halotune import HalotuneError, OFTConfig, PeftModel, get_peft_model
from halotune.core.adapter import Adapter
from halotune.core.base import base_for
from halotune.core.layer import AdaptedLayer
from halotune.core.operator import WeightShape
from halotune.methods.oft import OFT, ops

OUT, IN = 9, 12


def made(out: int = OUT, n_in: int = IN, std: float = 0.3, **options) -> OFT:
    """An adapter of random numbers, in fp64."""
    adapter = OFT.create(WeightShape(out, n_in), OFTConfig(**options)).double()
    nn.init.normal_(adapter.oft_R["weight"], std=std)
    return adapter


def skew(θ: Tensor, b: int) -> Tensor:
    """Entry by entry."""
    Q, entries = torch.zeros(b, b, dtype=θ.dtype), iter(θ)
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(entries)
            Q[j, i] = -Q[i, j]
    return Q


def rotation(adapter: OFT) -> Tensor:
    """R `(in, in)` of the exact transform, block by block."""
    I = torch.eye(adapter.b, dtype=torch.float64)  # noqa: E741
    Q = [skew(θ, adapter.b) for θ in adapter.oft_R["weight"].detach()]
    if len(Q) == 1:
        Q *= adapter.rank
    return torch.block_diag(*(torch.linalg.solve(I + q, I - q, left=False) for q in Q))


def wrapped(adapter: OFT, dtype: torch.dtype = torch.float64) -> AdaptedLayer:
    layer = AdaptedLayer(nn.Linear(adapter.shape.in_features, adapter.shape.out_features, dtype=dtype).requires_grad_(False))
    layer.add("default", adapter)
    layer.active_adapters = ["default"]
    return layer


# -- the map


@pytest.mark.parametrize("options", [{"oft_block_size": 4}, {"r": 2}, {"oft_block_size": 3, "block_share": True}], ids=str)
def test_the_exact_transform_is_an_orthogonal_block_matrix(options):
    adapter, W = made(use_cayley_neumann=False, **options), torch.randn(OUT, IN, dtype=torch.float64)
    R = rotation(adapter)
    torch.testing.assert_close(R @ R.T, torch.eye(IN, dtype=torch.float64))
    torch.testing.assert_close(adapter.weight(W), W @ R.T)
    assert adapter.rank == IN // adapter.b


@pytest.mark.parametrize(
    ("terms", "powers"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 2, 1]), (4, [1, 2, 2, 1]), (5, [1, 2, 2, 2, 1]), (7, [1, 2, 2, 2, 2, 2, 1])],
)
def test_the_series_has_the_terms_that_peft_counts(terms, powers):
    Q = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = sum(c * torch.linalg.matrix_power(Q, k) for k, c in enumerate(powers))
    torch.testing.assert_close(ops.cayley(Q, terms), expected)


def test_the_series_tends_to_the_transform():
    Q = ops.skew(torch.randn(3, 6, dtype=torch.float64) * 0.05, 4)
    exact = ops.cayley(Q)
    errors = [float((ops.cayley(Q, terms) - exact).norm()) for terms in (4, 5, 6, 12)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8 < 1e-5 < errors[0]


def test_the_constraint_scales_what_is_too_long_and_nothing_else():
    eps, blocks = 0.5, 3
    adapter = made(oft_block_size=4, coft=True, eps=eps, use_cayley_neumann=False)
    θ = adapter.oft_R["weight"]
    with torch.no_grad():
        θ[0].mul_(1e-3 / θ[0].norm())
        θ[1:].mul_(2)
    before = θ.detach().clone()
    Q = ops.skew(θ.detach(), 4)
    lengths = ops.skew(θ.detach(), 4, eps).norm(dim=(-2, -1))
    torch.testing.assert_close(lengths[1:], torch.full((2,), eps / blocks**0.5, dtype=torch.float64))
    assert torch.equal(ops.skew(θ.detach(), 4, eps)[0], Q[0])
    layer, x = wrapped(adapter), torch.randn(5, IN, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert torch.equal(θ, before)  # peft writes what it has scaled
    assert θ.grad.isfinite().all()
    assert (θ.grad[1:] * θ[1:]).sum(1).abs().max() < 1e-12 < θ.grad[1:].norm()  # a length that changes nothing


def test_the_constraint_lets_training_start():
    adapter = OFT.create(WeightShape(OUT, IN), OFTConfig(oft_block_size=4, coft=True))
    wrapped(adapter, torch.float32)(torch.randn(5, IN)).square().sum().backward()
    assert adapter.oft_R["weight"].grad.norm() > 0  # ‖Q‖ = 0, of which a root would have no derivative


def test_dropout_makes_blocks_the_identity_in_training():
    adapter = made(oft_block_size=4, module_dropout=0.5)
    layer, x = wrapped(adapter), torch.randn(7, IN, dtype=torch.float64)
    kept = ops.rotate(x, *adapter.factors_now())
    seen = set()
    for _ in range(40):
        (R,) = adapter.drop(*adapter.factors_now())
        same = [bool(torch.equal(r, torch.eye(4, dtype=r.dtype))) for r in R]
        assert all(s or torch.equal(r, full) for s, r, full in zip(same, R, *adapter.factors_now(), strict=True))
        seen.add(tuple(same))
    assert len(seen) > 3
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(kept))


def test_dropout_on_a_convolution():
    """Of W', as its patches are rotated."""
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3)),
        OFTConfig(oft_block_size=6, module_dropout=0.5, init_weights=False, target_modules=["0"]),
    )
    x = torch.randn(2, 4, 7, 7)
    kept, base = model.eval()(x), model.get_base_model()[0].base_layer(x)
    outputs = [model.train()(x) for _ in range(8)]
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise([base, kept, *outputs[:2]]))
    torch.testing.assert_close(model.eval()(x), kept)


@torch.no_grad()
def test_the_gradient_of_rotations_from_that_of_weights():
    """Written out, for several layers at a time."""
    adapter = made(oft_block_size=4)
    W, G, R = (torch.randn(size, dtype=torch.float64) for size in ((2, OUT, IN), (2, OUT, IN), (2, 3, 4, 4)))
    torch.testing.assert_close(adapter.pull(G, W, R), tuple(Adapter.pull(adapter, G, W, R)))


@pytest.mark.parametrize("neumann", [True, False])
def test_weights_are_what_activations_are(neumann):
    """Outputs and gradients of a model of both forms."""
    config = OFTConfig(oft_block_size=4, use_cayley_neumann=neumann, init_weights=False, target_modules=["0", "2"])
    model = get_peft_model(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, IN)), config).double()
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    results = []
    for form in ("activations", "weights"):
        model.set_adapter_form(form)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)


# -- what a pass costs, and what may be done with its result


class Largest(TorchDispatchMode):
    """The size of the largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and not func.is_view:
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("neumann", [True, False])
def test_a_linear_layer_never_sees_a_matrix_of_the_weights_size(neumann):
    d, tokens = 128, 16
    layer = wrapped(made(d, d, oft_block_size=8, use_cayley_neumann=neumann).float(), torch.float32)
    x = torch.randn(tokens, d, requires_grad=True)
    with Largest() as seen:
        layer(x).sum().backward()
    assert tokens * d <= seen.numbers < d * d / 4


def test_second_derivatives():
    adapter = made(5, 6, oft_block_size=3)
    layer, x = wrapped(adapter), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    θ = adapter.oft_R["weight"]

    def run(x, θ):
        return torch.func.functional_call(layer, {"adapters.default.oft_R.weight": θ}, (x,)).tanh()

    assert torch.autograd.gradgradcheck(run, (x, θ))
    W, b = layer.base_layer.weight, layer.base_layer.bias
    R = adapter.factors_now()[0].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, R: ops.RotatedLinear.apply(x, W, b, R).tanh(), (x, R))


@pytest.mark.parametrize("size", [(IN,), (0, IN), (2, 0, IN), (1, IN), (2, 3, IN)], ids=str)
def test_inputs_of_any_size_and_outputs_that_may_be_written_to(size):
    layer, x = wrapped(made(oft_block_size=4)), torch.randn(size, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*size[:-1], OUT) and not y._is_view()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    y.relu_().sum().backward()
    assert x.grad.shape == x.shape and layer.adapters["default"].oft_R["weight"].grad is not None


# -- configurations


def test_one_of_r_and_the_block_size():
    assert (OFTConfig().r, OFTConfig().oft_block_size) == (0, 32)
    assert (OFTConfig(r=8).oft_block_size, OFTConfig(oft_block_size=16).r) == (0, 0)
    assert OFTConfig(r=8).size == ("r", 8) and OFTConfig().size == ("oft_block_size", 32)
    for r, size in ((8, 32), (0, 0), (-2, 0), (0, -2)):
        with pytest.raises(HalotuneError, match=r"OFTConfig.r: "):
            OFTConfig(r=r, oft_block_size=size)
    for config in (OFTConfig(rank_pattern={"up": 4}), OFTConfig(r=2, rank_pattern={"up": 4})):
        assert config.at("a.up").size == (config.size[0], 4) and config.at("a.down") == config
    for name, value in (("num_cayley_neumann_terms", 0), ("eps", 0.0), ("module_dropout", 1.0), ("bias", "hra_only")):
        with pytest.raises(HalotuneError, match=f"OFTConfig.{name}"):
            OFTConfig(**{name: value})


@pytest.mark.parametrize("n_in", [12, 30, 64, 77])
def test_what_does_not_divide_becomes_the_nearest_divisor_as_in_peft(n_in):
    peft = pytest.importorskip("peft", minversion="0.21")
    adjusted = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for wanted in range(2, n_in + 3):
        for options in ({"r": wanted}, {"oft_block_size": wanted}):
            theirs = wanted if wanted <= n_in and n_in % wanted == 0 else adjusted(None, n_in, wanted)
            b = n_in // theirs if "r" in options else theirs
            if b == 1:
                with pytest.raises(HalotuneError, match="blocks of side 1"):
                    made(OUT, n_in, **options)
            else:
                assert made(OUT, n_in, **options).b == b


@torch.no_grad()
def test_a_kernel_of_peft_merges_as_ours(tmp_path):
    """peft flattens a kernel alike, so its merged weight is ours; its outputs before merging are not."""
    peft = pytest.importorskip("peft", minversion="0.21")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    state = {k: t.clone() for k, t in base.state_dict().items()}
    theirs = peft.get_peft_model(base, peft.OFTConfig(oft_block_size=6, use_cayley_neumann=False, target_modules=["0"]))
    for name, p in theirs.named_parameters():
        if "oft_" in name:
            p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    again = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    again.load_state_dict(state)
    ours = PeftModel.from_pretrained(again, tmp_path)
    x = torch.randn(2, 4, 7, 7)
    y, merged = ours(x), theirs.merge_and_unload()
    torch.testing.assert_close(y, merged(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.merge_and_unload()[0].weight, merged[0].weight, rtol=1e-6, atol=1e-6)


def test_a_lora_of_it_needs_a_rank(mlp, tmp_path):
    """A rotation of the inputs has full rank."""
    model = get_peft_model(mlp, OFTConfig(oft_block_size=3, init_weights=False, target_modules=["up"]))
    (layer,) = [m for n, m in model.named_modules() if n.endswith("0.up")]
    assert layer.adapters["default"].factors(base_for(layer.base_layer).weight()) is None
    with pytest.raises(HalotuneError, match="rank"):
        model.export("lora", tmp_path / "a")
    report = model.export("lora", tmp_path / "b", rank=2)
    assert report.rank == 2 and not report.exact
