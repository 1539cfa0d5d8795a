"""Every kernel in Triton's interpreter, on the CPU: it computes what its reference defines, at odd shapes."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halotune.ops.dispatch import Kernel, backend
from halotune.ops.product import add_product

from .cases import CASES, copied, error, tensors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run on it, in test_on_gpu.py")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    pytest.importorskip("triton", reason="triton is made for Linux alone")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined, on import


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_plain_torch(case, dtype):
    torch.manual_seed(sum(map(ord, case.name)))
    arguments = case.arguments(lambda *sizes: torch.randn(*sizes, dtype=dtype))
    exact = case.op.reference(*copied(arguments, torch.float64))
    plain = case.op.reference(*copied(arguments))
    with torch.no_grad(), backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that refuses would leave plain torch to be compared with itself
        given = copied(arguments)
        assert case.op.choice(*given) is case.op.kernel
        result = case.op(*given)
    for ours, theirs in zip(tensors(result), tensors(plain), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    eps = torch.finfo(dtype).eps
    assert error(result, exact) <= 1.5 * error(plain, exact) + eps / 4


def test_refusals_are_said():
    b, a, A, Q = torch.randn(8, 8), torch.randn(8, 4), torch.randn(2, 4), torch.randn(2, 8)
    op = add_product
    with torch.no_grad(), backend("triton"):
        with pytest.warns(UserWarning, match="add_product: the triton kernel cannot run here: the last dimension"):
            assert torch.equal(op(b.t(), a, A, Q, False)[0], torch.addmm(b.t(), a @ A.t(), Q))
        with pytest.warns(UserWarning, match="there is none for torch.float64"):
            op(*(t.double() for t in (b, a, A, Q)), False)
        os.environ["TRITON_INTERPRET"] = "0"
        with pytest.warns(UserWarning, match="needs a CUDA device, and the tensor is on cpu"):
            op(b, a, A, Q, False)


def test_what_autograd_records_is_plain_torch():
    b, a, A, Q = torch.randn(8, 8), torch.randn(8, 4), torch.randn(2, 4, requires_grad=True), torch.randn(2, 8)
    with backend("triton"):
        y, _ = add_product(b, a, A, Q, False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), A)[0], (Q.sum(1, keepdim=True) @ a.sum(0, keepdim=True)))


def test_nothing_runs_unasked_on_a_cpu():
    for case in CASES:
        arguments = case.arguments(lambda *sizes: torch.randn(*sizes, dtype=torch.bfloat16))
        assert case.op.choice(*arguments) is None


def test_float64_is_left_to_plain_torch():
    """Kernels compute in fp32. On a GPU too, of which there is none here: so of tensors without numbers."""
    case = next(case for case in CASES if case.name == "grouped")
    for dtype, kernel in ((torch.float32, case.op.kernel), (torch.float64, None)):
        with FakeTensorMode():
            arguments = case.arguments(lambda *sizes, dtype=dtype: torch.randn(*sizes, dtype=dtype, device="cuda:0"))
            assert case.op.choice(*arguments) is kernel
    for case in CASES:
        arguments = case.arguments(lambda *sizes: torch.randn(*sizes, dtype=torch.float64))
        assert case.op.kernel.refuses(*arguments) == "there is none for torch.float64"


def test_every_kernel_has_cases():
    """A kernel that is added must be added there."""
    import halotune.methods.bone.kernels as bone
    import halotune.methods.hra.kernels as hra
    import halotune.methods.loha.kernels as loha
    import halotune.ops.grouped_kernels as grouped
    import halotune.ops.kernels as product

    launchers = {n for m in (product, grouped, bone, hra, loha) for n in vars(m) if n.startswith("_launch")}
    products = {
        "_launch_add_parts",
        "_launch_build",
        "_launch_tiles",
        "_launch_few",
        "_launch_fused",
        "_launch_transposed",
        "_launch_low_rank",
        "_launch_outer",
        "_launch_add",
    }
    reflections = {"_launch_gram_parts", "_launch_factors", "_launch_pulled_parts", "_launch_pulled"}
    assert launchers == {*products, *reflections, "_launch_bat", "_launch_pull_bat", "_launch_hadamard", "_launch_pull"}
    assert all(isinstance(case.op.kernel, Kernel) for case in CASES)
