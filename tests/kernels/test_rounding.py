"""Rounding by chance: its mean is what is rounded, its errors are under a unit, and kernels round as plain torch does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halotune.methods.bone import ops as bone
from halotune.methods.loha import ops as loha
from halotune.ops.build import build_low_rank
from halotune.ops.dispatch import backend
from halotune.ops.rounding import Dither, draw_noise, round_stochastically

BLOCKS = 1, 4, 7, 8, 12, 24
HALF = [torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_mean_is_what_is_rounded(dtype):
    torch.manual_seed(0)
    y = torch.randn(30, 40)
    draws = torch.stack([round_stochastically(y, draw_noise(y), dtype).float() for _ in range(4000)])
    unit = (draws - y).abs().max(0).values
    assert bool((unit <= torch.finfo(dtype).eps * y.abs()).all())
    deviation = (draws.double().mean(0) - y) / (torch.finfo(dtype).eps * y.abs())
    assert float(deviation.abs().max()) < 5 * 0.5 / 4000**0.5  # a chance of at most ½ each way
    assert abs(float(deviation.mean())) < 1e-3


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_the_dtype_holds_stays(dtype):
    y = torch.tensor([[0.0, -0.0, 1.0, -2.5, 448.0, float("inf"), -float("inf")]])
    for _ in range(20):
        assert torch.equal(round_stochastically(y, draw_noise(y), dtype).float(), y)
    for bits in (0x7FC00000, 0x7FFFFFFF, -0x400000):  # a CPU's NaN, a GPU's, a negative one
        nan = torch.full((1, 1), bits, dtype=torch.int32).view(torch.float32)
        assert all(round_stochastically(nan, draw_noise(nan), dtype).isnan() for _ in range(20))


@pytest.mark.parametrize("r", [None, 1, 8, 12, 16, 24, 128], ids=lambda r: f"blocks of {r}" if r else "rows and columns")
def test_errors_are_independent_in_pairs(r):
    """So sums of them vary as if all were drawn apart."""
    torch.manual_seed(0)
    y, x = torch.rand(64, 128) + 1, torch.rand(128)

    def drawn() -> Tensor:
        return draw_noise(y) if r is None else bone.noise_of_blocks(draw_noise(y), 128, r)

    errors = torch.stack([round_stochastically(y, drawn(), torch.bfloat16).float() - y for _ in range(1500)])
    sums = errors @ x  # along rows, of a direction that is no noise
    alone = (errors.square().mean(0) @ x.square()).mean()
    assert 0.9 < float(sums.square().mean() / alone) < 1.1


def test_layers_draw_apart_from_torchs_generator():
    y = torch.rand(2, 20, 30).sort(0).values.roll(1, 0)[:1].expand(2, -1, -1).contiguous()
    torch.manual_seed(3)
    first = round_stochastically(y, draw_noise(y), torch.bfloat16)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(3)
    assert torch.equal(first, round_stochastically(y, draw_noise(y), torch.bfloat16))


@pytest.mark.parametrize("size", [(3, 70, 133), (5, 3), (2, 4, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_seed_rounds_factors_alike_and_each_by_its_own_noise(dtype, size):
    t = torch.randn(size, device=DEVICE)
    dither = Dither(7)
    first, second = dither.round([t, t], dtype)
    assert first.dtype is dtype and not torch.equal(first, second)
    assert torch.equal(first, round_stochastically(t, dither.noise(1, t), dtype))
    for again in (dither, Dither(7)):
        assert all(map(torch.equal, again.round([t, t], dtype), (first, second)))


def arguments(dtype: torch.dtype) -> dict[str, tuple]:
    def t(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=DEVICE)

    return {
        "low-rank": (build_low_rank, (t(3, 70, 133), t(3, 70, 7), t(3, 7, 133))),
        "low-rank-one": (build_low_rank, (t(37, 50), t(37, 5), t(5, 50))),
        "low-rank-fine": (build_low_rank, (t(3, 70, 133), t(3, 70, 7).float() * 1.001, t(3, 7, 133).float() * 1.001)),
        **{f"bat-r{r}": (bone.build_bat, (t(2, 3 * r, 5 * r), t(2, 3, r, r))) for r in BLOCKS},
        "loha": (loha.build, (t(3, 37, 50), t(3, 37, 5), t(3, 5, 50), t(3, 37, 5), t(3, 5, 50), 0.7)),
    }


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["low-rank", "low-rank-one", "low-rank-fine", "loha", *(f"bat-r{r}" for r in BLOCKS)])
def test_kernels_round_as_plain_torch(name, dtype, monkeypatch):
    pytest.importorskip("triton", reason="triton is made for Linux alone")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    op, args = arguments(dtype)[name]
    noise = draw_noise(args[0])
    with torch.no_grad(), backend("triton"):
        assert op.choice(*args, noise) is op.kernel
        ours = op(*args, noise)
    plain = op.reference(*args, noise)
    same = ours == plain  # sums of products differ in the last bits of fp32, which moves few numbers over the edge
    assert float(same.float().mean()) > 0.995
    torch.testing.assert_close(ours, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
