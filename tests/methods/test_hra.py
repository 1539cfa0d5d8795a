"""HRA: products of Householder reflections, against reflections done one after the other."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halotune import HalotuneError, HRAConfig, get_peft_model, parameter_groups
from halotune.core.operator import WeightShape
from halotune.engine.injection.modules import adapted_layers
from halotune.methods.hra import HRA, ops

BOTH = pytest.mark.parametrize("gram_schmidt", [False, True], ids=["chain", "gram-schmidt"])


def rotate(x, U, gram_schmidt):
    Ût, N = ops.wy_factors(U, gram_schmidt)
    return x + (x @ Ût.mT) @ N


def matrix_of(U, gram_schmidt):
    """Q."""
    return rotate(torch.eye(U.shape[0], dtype=U.dtype), U, gram_schmidt).T


def reflect(x, U, gram_schmidt):
    """The definition, one reflection after the other: `x Qᵀ`.

    Under Gram–Schmidt the columns are orthonormalised in order first, dependent ones dropped.
    """
    columns = ops.normalize(U).unbind(-1)
    if gram_schmidt:
        basis = []
        for u in columns:
            for _ in range(2):  # twice is enough
                for q in basis:
                    u = u - (u @ q) * q
            if u.norm() > 1e-4:
                basis.append(u / u.norm())
        columns = tuple(basis)
    for u in reversed(columns):  # x Qᵀ = x H_r … H_1
        x = x - 2.0 * (x @ u).unsqueeze(-1) * u
    return x


# -- the compact form


@BOTH
@pytest.mark.parametrize(("n", "r"), [(5, 1), (13, 4), (31, 7), (6, 6)])
def test_wy_form_is_the_product_of_reflections(n, r, gram_schmidt):
    U, x = torch.randn(n, r, dtype=torch.float64), torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, U, gram_schmidt), reflect(x, U, gram_schmidt), rtol=1e-9, atol=1e-9)


def test_more_reflections_than_dimensions():
    U, x = torch.randn(4, 9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, U, False), reflect(x, U, False), rtol=1e-10, atol=1e-10)


def test_reflect_is_the_definition():
    """`Q = H_1 H_2 …`, `H = I − 2 u uᵀ / uᵀu`: the reference's own reference."""
    U = torch.randn(5, 3, dtype=torch.float64)
    Q = eye = torch.eye(5, dtype=torch.float64)
    for u in U.T:
        Q = Q @ (eye - 2 * torch.outer(u, u) / (u @ u))
    torch.testing.assert_close(reflect(eye, U, False), Q.T)


@BOTH
def test_factors_of_a_batch_are_those_of_each(gram_schmidt):
    U = torch.randn(3, 11, 4, dtype=torch.float64)
    batched = ops.wy_factors(U, gram_schmidt)
    for i in range(3):
        for together, alone in zip(batched, ops.wy_factors(U[i], gram_schmidt), strict=True):
            torch.testing.assert_close(together[i], alone)


@BOTH
def test_rotation_is_orthogonal(gram_schmidt):
    Q = matrix_of(torch.randn(17, 6, dtype=torch.float64), gram_schmidt)
    torch.testing.assert_close(Q.T @ Q, torch.eye(17, dtype=torch.float64), rtol=0, atol=1e-12)


# -- the vectors' lengths, and vectors that are no directions


@BOTH
def test_lengths_mean_nothing(gram_schmidt):
    U = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([1e-6, 1.0, 30.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(matrix_of(U * lengths, gram_schmidt), matrix_of(U, gram_schmidt))
    (gradient,) = torch.autograd.grad(matrix_of(U, gram_schmidt).square().mul(torch.randn(13, 13)).sum(), U)
    torch.testing.assert_close((gradient * U).sum(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    assert gradient.norm() > 1e-3


@BOTH
def test_a_zero_column_is_no_reflection(gram_schmidt):
    U = torch.randn(13, 5)
    U[:, 2] = 0
    U.requires_grad_()
    x = torch.randn(3, 13)
    y = rotate(x, U, gram_schmidt)
    torch.testing.assert_close(y, reflect(x, U.detach()[:, [0, 1, 3, 4]], gram_schmidt), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), U)
    assert gradient.isfinite().all()
    assert gradient[:, 2].count_nonzero() == 0
    assert (gradient[:, [0, 1, 3, 4]].norm(dim=0) > 1e-3).all()


@BOTH
def test_zero_columns_alone_are_the_identity(gram_schmidt):
    U, x = torch.zeros(7, 4, requires_grad=True), torch.randn(3, 7)
    y = rotate(x, U, gram_schmidt)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y.sum(), U)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("r", [8, 9])
def test_equal_columns_stay_accurate(r):
    u, x = torch.randn(64, 1), torch.randn(5, 64)
    exact = x.double() if r % 2 == 0 else reflect(x.double(), u.double(), False)
    error = rotate(x, u.repeat(1, r), False) - exact
    assert error.norm() / exact.norm() < 1e-6


# -- Gram–Schmidt


def test_gram_schmidt_depends_on_the_span_only():
    U = torch.randn(13, 4, dtype=torch.float64)
    mixed = U @ torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(mixed, True), matrix_of(U, True), rtol=0, atol=1e-9)
    assert (matrix_of(mixed, False) - matrix_of(U, False)).norm() > 0.1  # a chain does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependent_columns_are_no_reflection(dtype):
    U = torch.randn(13, 2, dtype=dtype)
    more = torch.cat([U, U @ torch.tensor([[1.0, 2.0], [-0.5, 3.0]], dtype=dtype)], 1).requires_grad_()
    torch.testing.assert_close(matrix_of(more, True), matrix_of(U, True), rtol=0, atol=1e-4 if dtype.itemsize == 4 else 1e-9)
    (gradient,) = torch.autograd.grad(matrix_of(more, True).mul(torch.randn(13, 13, dtype=dtype)).sum(), more)
    assert gradient.isfinite().all() and gradient.norm() < 100


def test_orthonormal_columns_make_both_variants_one():
    U = torch.linalg.qr(torch.randn(13, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(matrix_of(U, True), matrix_of(U, False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("draw", range(20))
def test_gram_schmidt_starts_orthonormal_with_a_moderate_gradient(draw):
    torch.manual_seed(draw)
    adapter = HRA.create(WeightShape(16, 16), HRAConfig(r=8, apply_GS=True))
    U = adapter.hra_u.detach()
    torch.testing.assert_close(U.T @ U, torch.eye(8), rtol=0, atol=1e-5)
    x = torch.randn(4, 16)
    y = adapter.rotate(x, *adapter.factors_now())
    torch.testing.assert_close(y.norm(), x.norm())
    y.square().mul(torch.randn_like(y)).sum().backward()
    assert adapter.hra_u.grad.isfinite().all()
    assert 0.1 < adapter.hra_u.grad.norm() < 1e3


def test_gram_schmidt_refuses_more_vectors_than_dimensions(mlp):
    x = mlp.sample()
    before = mlp(x)
    with pytest.raises(HalotuneError, match=r"blocks\.0\.up: .*at most 6 .*\(15, 6\).*r=8.*rank_pattern"):
        get_peft_model(mlp, HRAConfig(r=8, apply_GS=True, target_modules=["up", "down"]))
    assert not adapted_layers(mlp)
    assert torch.equal(mlp(x), before)


def test_a_file_of_dependent_vectors_is_told_of():
    doubled = HRA.create(WeightShape(9, 7), HRAConfig(r=4))
    doubled.gram_schmidt = True
    assert "linearly dependent" in doubled.loading_warning(*doubled.parameters())
    for config in (HRAConfig(r=4, apply_GS=True), HRAConfig(r=4)):
        independent = HRA.create(WeightShape(9, 7), config)
        assert independent.loading_warning(*independent.parameters()) is None


# -- the start


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (HRAConfig(r=8), []),
        (HRAConfig(r=7), ["even r.*got r=7"]),
        (HRAConfig(r=7, rank_pattern={"a": 4, "b": 5}), ["got r=5", "got r=7"]),
        (HRAConfig(r=8, apply_GS=True), ["apply_GS=True training starts away"]),
        (HRAConfig(r=7, init_weights=False), []),
        (HRAConfig(r=8, apply_GS=True, init_weights=False), []),
    ],
    ids=["even", "odd", "odd-in-pattern", "gram-schmidt", "odd-asked-for", "gram-schmidt-asked-for"],
)
def test_notices(config, told):
    notices = config.notices()
    assert len(notices) == len(told)
    assert all(re.search(pattern, notice) for pattern, notice in zip(told, notices, strict=True))


def test_a_notice_is_given_once_for_all_layers(mlp):
    with pytest.warns(UserWarning, match="even r") as caught:
        get_peft_model(mlp, HRAConfig(r=3, target_modules=["up", "down"]))
    assert len(caught) == 1


def test_random_start_is_away_from_the_base(mlp):
    x = mlp.sample()
    before = mlp(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(mlp, HRAConfig(r=4, init_weights=False, target_modules=["up"]))
    assert (model(x) - before).norm() > 1e-2 * before.norm()


# -- several as one


def test_chains_one_after_the_other_are_one_chain():
    """A Gram–Schmidt adapter among them; zero columns fill up."""
    configs = HRAConfig(r=3, init_weights=False), HRAConfig(r=4, apply_GS=True), HRAConfig(r=2, init_weights=False)
    adapters = [HRA.create(WeightShape(9, 13), config).double() for config in configs]
    combined = HRA.combined(adapters, [1.0, 1.0, 1.0], "cat", rank=11)
    assert combined.rank == 11
    expected = W = torch.randn(9, 13, dtype=torch.float64)
    for adapter in adapters:
        expected = adapter.weight(expected)
    torch.testing.assert_close(combined.weight(W), expected)
    backwards = HRA.combined(adapters[::-1], [1.0, 1.0, 1.0], "cat", rank=9).weight(W)
    assert (backwards - expected).norm() > 1e-3


@pytest.mark.parametrize(("how", "weights"), [("cat", (1.0, 0.5)), ("linear", (1.0, 1.0))])
def test_other_combinations_are_no_chain(how, weights):
    adapters = [HRA.create(WeightShape(9, 13), HRAConfig(r=2)) for _ in range(2)]
    assert HRA.combined(adapters, weights, how, rank=4) is None


# -- the regulariser


def hand_penalty(U, squared):
    Û = U / U.norm(dim=0)
    gap = sum((float(i == j) - Û[:, i] @ Û[:, j]) ** 2 for i in range(U.shape[1]) for j in range(U.shape[1]))
    return gap if squared else gap**0.5


@pytest.mark.parametrize("norm", ["squared", "unsquared"])
def test_penalty_of_a_model_is_the_sum_over_layers(mlp, norm):
    config = HRAConfig(r=4, target_modules=["up", "down"], orthogonality_weight=3e-4, orthogonality_norm=norm)
    model = get_peft_model(mlp, config)
    vectors = [layer.adapters["default"].hra_u for layer in adapted_layers(model).values()]
    assert len(vectors) == 4
    expected = 3e-4 * sum(hand_penalty(U, norm == "squared") for U in vectors)
    penalty = model.penalty()
    torch.testing.assert_close(penalty, expected)
    assert penalty > 0
    for ours, theirs in zip(torch.autograd.grad(penalty, vectors), torch.autograd.grad(expected, vectors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_penalty_is_nothing_unless_asked_for(mlp):
    assert get_peft_model(mlp, HRAConfig(r=4, target_modules=["up"])).penalty() == 0.0


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_has_a_finite_gradient_where_it_is_zero(squared):
    U = torch.eye(7, 3).requires_grad_()
    penalty = ops.orthogonality(U, squared)
    assert penalty == 0
    (gradient,) = torch.autograd.grad(penalty, U)
    assert gradient.isfinite().all()


def test_lengths_of_vectors_do_not_decay(mlp):
    model = get_peft_model(mlp, HRAConfig(r=4, target_modules=["up"]))
    (group,) = parameter_groups(model, weight_decay=0.1)
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("shape", [(3, 40, 5), (17, 1), (2, 2, 9, 12)], ids=str)
def test_the_gradient_is_that_of_the_definition(shape):
    """Against autograd through the plain formula, of unequal weights; a zero column gets none, neighbours may be equal."""
    U = torch.randn(*shape, dtype=torch.float64)
    if shape[-1] > 3:
        U[..., 2], U[..., 1] = 0, U[..., 0]
    U.requires_grad_()
    made = ops.wy_factors(U, False)
    weights = [torch.randn_like(t) for t in made]
    (expected,) = torch.autograd.grad(ops._factors(U)[:2], U, weights)
    (found,) = torch.autograd.grad(made, U, weights, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if shape[-1] > 3:
        assert not found[..., 2].any()
    torch.autograd.gradgradcheck(lambda U: ops.wy_factors(U, False), U.detach()[..., :1].requires_grad_())


def test_vectors_are_prepared_in_few_launches():
    """Forward, and again where a checkpoint runs a layer again: a host that is slow to launch waits for each of them."""
    U, launched = torch.randn(3, 1024, 8), []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and "empty" not in func.name():
                launched.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Counted():
        ops.wy_factors(U, False)
    assert len(launched) <= 11, launched
