"""Grouped products against a sum over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from halotune.core.grouped_linear import add_low_rank, low_rank_linear
from halotune.ops import grouped
from halotune.ops.grouped import grouped_outer, grouped_product

ENDS = {"usual": [2, 2, 7, 9], "one": [0, 9, 9, 9], "none": [0, 0, 0, 0], "open": [1, 1, 4, 6]}


def case(name: str, dtype: torch.dtype = torch.float64, k: int = 5, m: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    ends = torch.tensor(ENDS[name], dtype=torch.int32)
    n = 0 if name == "none" else 9
    x, d = torch.randn(n, k, dtype=dtype), torch.randn(n, m, dtype=dtype)
    return x, torch.randn(4, k, m, dtype=dtype), d, ends, int(ends[-1]) == n


def one_hot(ends: Tensor, n: int) -> Tensor:
    """Which group a row is of, `(n, groups)`; of none past the last end."""
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    rows = torch.arange(n)[:, None]
    return ((rows >= begins) & (rows < ends)).double()


@pytest.mark.parametrize("name", ENDS)
def test_products_and_their_derivatives(name):
    x, W, d, ends, whole = case(name)
    of = one_hot(ends, x.shape[0])
    y = grouped_product(x, W, ends, whole)
    assert torch.allclose(y, torch.einsum("ng,nk,gkm->nm", of, x, W))
    assert torch.allclose(grouped_outer(x, d, ends), torch.einsum("ng,nk,nm->gkm", of, x, d))
    for t in (x, W, d):
        t.requires_grad_()
    torch.autograd.gradcheck(lambda x, W: grouped_product(x, W, ends, whole), (x, W))
    torch.autograd.gradcheck(lambda x, d: grouped_outer(x, d, ends), (x, d))
    torch.autograd.gradgradcheck(lambda x, W: grouped_product(x, W, ends, whole), (x, W))
    torch.autograd.gradgradcheck(lambda x, d: grouped_outer(x, d, ends), (x, d))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped product on a CPU")
@pytest.mark.parametrize("name", [n for n in ENDS if n != "none"])
@pytest.mark.parametrize(("k", "m"), [(16, 24), (16, 3), (5, 16), (5, 3)])
def test_the_single_launch_is_the_loop(name, k, m, monkeypatch):
    """What CUDA runs, with sizes that torch's grouped product does not take as they are."""
    x, W, d, ends, whole = case(name, torch.bfloat16, k, m)
    transposed = torch.randn(4, m, k, dtype=torch.bfloat16).mT
    due = [grouped_product(x, w, ends, whole) for w in (W, transposed)] + [grouped_outer(x, d, ends)]
    launches = []
    run = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kwargs: launches.append(1) or run(*args, **kwargs))
    monkeypatch.setattr(grouped, "_in_one_launch", lambda *_: True)
    got = [grouped_product(x, w, ends, whole) for w in (W, transposed)] + [grouped_outer(x, d, ends)]
    assert len(launches) == 3
    for a, b in zip(got, due, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("says_so", [True, False])
def test_compiled_products_are_the_same(says_so, monkeypatch):
    """Also where the compiler, up to torch 2.11, does not say that it is one while it traces backward."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with monkeypatch.context() as patch:
            if not says_so:
                patch.setattr(torch.compiler, "_is_compiling_flag", False)
            return aot_eager(graph, inputs)

    x, W, d, ends, _ = case("usual", torch.float32)
    x.requires_grad_()
    W.requires_grad_()

    def f(x: Tensor, W: Tensor) -> Tensor:
        return grouped_product(torch.tanh(x), W, ends).square().sum() + grouped_outer(x, d, ends).sum()

    due = torch.autograd.grad(f(x, W), (x, W))
    got = torch.autograd.grad(torch.compile(f, backend=backend, fullgraph=True)(x, W), (x, W))
    for a, b in zip(got, due, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [False, True], ids=["", "one-A"])
@pytest.mark.parametrize("name", ENDS)
def test_a_low_rank_delta_in_one_node(name, shared):
    x, W, _, ends, whole = case(name)
    W, s = W.mT.contiguous(), 0.5  # (groups, m, k)
    A, B = torch.randn(*([] if shared else [4]), 2, 5).double(), torch.randn(4, 3, 2).double()
    inputs = [t.requires_grad_() for t in ((x, B) if shared else (x, B, A))]

    def run(x: Tensor, B: Tensor, A: Tensor = A) -> Tensor:
        return low_rank_linear(x, A, B, W, ends, s, whole)

    def run_apart(x: Tensor, B: Tensor, A: Tensor = A) -> Tensor:
        return add_low_rank(x.square()[:, :3], x, A, B, ends, s, whole)

    def run_on_itself(x: Tensor, B: Tensor, A: Tensor = A) -> Tensor:
        return add_low_rank(x, x, A, torch.cat([B, B[:, :2]], 1), ends, s, whole)

    delta = grouped_product(x, (s * B @ A).mT, ends, whole)
    assert torch.allclose(run(*inputs), grouped_product(x, W.mT, ends, whole) + delta)
    assert torch.allclose(run_apart(*inputs), x.square()[:, :3] + delta)
    assert torch.allclose(run_on_itself(*inputs), x + torch.cat([delta, delta[:, :2]], 1))
    for function in (run, run_apart, run_on_itself):
        torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradgradcheck(function, inputs)
