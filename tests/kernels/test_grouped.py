"""Kernels for groups of rows: what rows of no group, empty groups and long ones come to, and whole layers of experts."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halotune
from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig
from halotune.core.experts import Groups
from halotune.ops.dispatch import backend
from halotune.ops.grouped_low_rank import add_grouped_low_rank, grouped_outer_pair

from .cases import CASES, copied, error, tensors

ON_GPU = torch.cuda.is_available()
interpreted = pytest.param("cpu", marks=pytest.mark.skipif(ON_GPU, reason="with a GPU the kernels run on it"))
on_gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")])
devices = pytest.mark.parametrize("device", [interpreted, on_gpu])
gpu_alone = pytest.mark.parametrize("device", [on_gpu])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    pytest.importorskip("triton", reason="triton is made for Linux alone")
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def rows(device: str, n: int, ends: list[int]) -> tuple[Tensor, ...]:
    """x (n, 21), A (groups, 3, 21), B (groups, 17, 3), b (n, 17), ends."""
    torch.manual_seed(n)
    x, A = torch.randn(n, 21), torch.randn(len(ends), 3, 21)
    B, b = torch.randn(len(ends), 17, 3), torch.randn(n, 17)
    return *(t.to(device) for t in (x, A, B, b)), torch.tensor(ends, dtype=torch.int32, device=device)


def by_kernel(op: Any, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), backend("triton"):
        assert op.choice(*args) is op.kernel
        return op(*args)


@devices
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("ends", [[0, 60, 60], [0, 0, 0], [64, 130, 150]])
def test_rows_of_no_group(device, ends, inplace):
    """Whatever is in them; b is there as it was."""
    x, A, B, b, ends = rows(device, 200, ends)
    last = int(ends[-1])
    x[last:] = torch.nan
    before = b.clone()
    y, z = by_kernel(add_grouped_low_rank, x, A, B, b, ends, 1.0, False, inplace)
    assert (y is b) is inplace
    assert torch.equal(y[last:], before[last:]) and not z[last:].any()
    assert torch.isfinite(y).all()
    dB, dA = by_kernel(grouped_outer_pair, b, z, z, x, ends, torch.float32)
    assert torch.isfinite(dB).all() and torch.isfinite(dA).all()
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    assert not dB[empty].any() and not dA[empty].any()


@devices
def test_no_rows(device):
    x, A, B, b, ends = rows(device, 0, [0, 0])
    y, z = by_kernel(add_grouped_low_rank, x, A, B, b, ends, 1.0, True, True)
    dB, dA = by_kernel(grouped_outer_pair, b, z, z, x, ends, torch.float32)
    assert y.shape == (0, 17) and z.shape == (0, 3) and not dB.any() and not dA.any()


@devices
@pytest.mark.parametrize("case", [c for c in CASES if c.op in (add_grouped_low_rank, grouped_outer_pair)], ids=str)
def test_ends_are_counted_some_at_a_time(case, device, monkeypatch):
    import halotune.ops.grouped_kernels as kernels

    arguments = case.arguments(lambda *sizes: torch.randn(*sizes, device=device))
    due = by_kernel(case.op, *copied(arguments))
    monkeypatch.setattr(kernels, "MOST_ENDS", 1)
    for a, b in zip(due, by_kernel(case.op, *copied(arguments)), strict=True):
        assert torch.equal(a, b)


@devices
def test_frozen_inputs_of_a_kind_cost_no_sum(device):
    """Without columns of x there is one sum."""
    x, _, _, b, ends = rows(device, 100, [30, 100])
    z = x[:, :3].contiguous()
    both, one = (by_kernel(grouped_outer_pair, b, z, z, t, ends, torch.float32) for t in (x, x[:, :0]))
    assert torch.equal(both[0], one[0]) and one[1].shape == (2, 3, 0)


TARGETS: dict[str, Any] = {"target_parameters": ["experts.up_proj"]}
CONFIGS = {
    "hra": HRAConfig(r=4, **TARGETS),
    "lora": LoraConfig(r=3, lora_alpha=2, **TARGETS),
    "bone": BoneConfig(r=16, **TARGETS),
    "loha": LoHaConfig(r=2, **TARGETS),
}


class Experts(nn.Module):
    """One weight of several experts."""

    def __init__(self, experts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.has_gate = self.has_bias = self.is_transposed = False
        self.is_concatenated, self.config = True, SimpleNamespace()
        self.up_proj = nn.Parameter(torch.randn(experts, n_out, n_in) * n_in**-0.5)
        self.down_proj = nn.Parameter(torch.empty(experts, 1, 1))


def layer(name: str, device: str, dtype: torch.dtype, *size: int) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Module()
    base.experts = Experts(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = halotune.get_peft_model(base.to(device, dtype), copy.deepcopy(CONFIGS[name]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.base_model.model.experts.up_proj


def step(layer: nn.Module, x: Tensor, groups: Groups) -> list[Tensor]:
    """The output, and the gradients of x and of the parameters."""
    leaves = [x.detach().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(leaves[0], groups)
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), leaves)]


def groups_of(device: str, ends: list[int], n: int) -> Groups:
    of = torch.tensor(ends, dtype=torch.int32, device=device)
    ids = torch.searchsorted(of, torch.arange(n, device=device, dtype=torch.int32), right=True)
    return Groups(of, ids, ends[-1] == n)


@devices
@pytest.mark.parametrize("ends", [[0, 70, 90], [3, 3, 60]], ids=["whole", "open"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_by_kernels_is_the_layer(name, ends, device):
    up = layer(name, device, torch.float32, 3, 37, 29)
    x, groups = torch.randn(90, 37, device=device), groups_of(device, ends, 90)
    with backend("reference"):
        due = step(up, x, groups)
    with backend("triton"):
        got = step(up, x, groups)
    for a, b in zip(got, due, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


SIZES = {"aligned": (16, 256, 128, 700), "odd": (7, 77, 131, 333), "many": (1100, 64, 48, 2000), "long": (4, 128, 256, 9000)}


@gpu_alone
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_experts_is_as_exact(name, size, device):
    """In bf16, beside plain torch in bf16."""
    experts, n_in, n_out, n = SIZES[size]
    up = layer(name, device, torch.bfloat16, experts, n_in, n_out)
    cuts = torch.randint(n + 1, (experts - 1,)).sort().values.tolist()
    x, groups = torch.randn(n, n_in, device=device, dtype=torch.bfloat16), groups_of(device, [*cuts, n], n)
    ours = step(up, x, groups)
    with backend("reference"):
        plain = step(copy.deepcopy(up), x, groups)
        exact = step(copy.deepcopy(up).double(), x.double(), groups)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert error(a, c) <= 1.5 * error(b, c) + torch.finfo(torch.bfloat16).eps / 4


@gpu_alone
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_in_a_cuda_graph(name, device):
    """Nothing waits for the GPU: not even where groups end may change between replays."""
    up = layer(name, device, torch.bfloat16, 8, 256, 128)
    x, groups = torch.randn(600, 256, device=device, dtype=torch.bfloat16), groups_of(device, list(range(75, 601, 75)), 600)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(up, x, groups)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(up, x, groups)
    x.normal_()
    groups.ends.copy_(torch.tensor([0, 10, 10, 300, 301, 450, 599, 600], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(tensors(tuple(captured)), step(up, x, groups), strict=True):
        assert error(a, b.double()) < 2e-2


def test_inputs_are_all_that_is_kept():
    """The input, the weight and the parameters themselves, in whatever dtype they are; and three numbers for each row."""
    up = layer("lora", "cpu", torch.bfloat16, 5, 40, 24)
    x, groups = torch.randn(90, 40, dtype=torch.bfloat16), groups_of("cpu", [10, 30, 30, 70, 90], 90)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        up(x, groups)
    W = up.base_layer.weight  # type: ignore[union-attr]
    given = {t.data_ptr() for t in (x, W, groups.ends, *up.parameters())}
    assert {p.dtype for p in up.parameters() if p.requires_grad} == {torch.float32}
    made = [t for t in kept if t.data_ptr() not in given]
    assert len(kept) == 6 and [t.shape for t in made] == [(90, 3)]
