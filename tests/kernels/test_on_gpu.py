"""Every kernel on a GPU: as exact as plain torch in the same dtype, alone and in a whole training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from halotune.methods.bone import ops as bone
from halotune.methods.hra import ops as hra
from halotune.methods.loha import ops as loha
from halotune.ops.build import build_low_rank
from halotune.ops.dispatch import backend
from halotune.ops.grouped_low_rank import add_grouped_low_rank, grouped_low_rank_linear, grouped_outer_pair
from halotune.ops.product import add_product, transposed_products

from .cases import CASES, Case, copied, error, grouped, halves, pair, pulled, reflections, sliced, swapped, tensors, weighted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: kernels at the sizes they are made for"),
]

ONES = tuple(range(1, 2501))
MANY = tuple(range(3, 2501, 3))
EVEN = tuple(range(250, 8001, 250))
SMALL = 4, 8, 12, 24  # blocks of BAT

LARGE = [
    Case("large-grouped", add_grouped_low_rank, lambda t: grouped(t, 8000, 2048, 768, 16, EVEN)),
    Case("large-grouped-in-place", add_grouped_low_rank, lambda t: grouped(t, 8000, 1024, 512, 16, EVEN, 0.5, True)),
    Case("large-grouped-backward", add_grouped_low_rank, lambda t: swapped(*grouped(t, 8000, 2048, 768, 8, EVEN, 2.0))),
    Case("large-grouped-rank", add_grouped_low_rank, lambda t: grouped(t, 3000, 1024, 768, 64, (100, 2900, 3000))),
    Case("large-grouped-odd", add_grouped_low_rank, lambda t: grouped(t, 3000, 1023, 767, 5, (100, 2900, 2999), 1.0, True)),
    Case("large-grouped-single-rows", add_grouped_low_rank, lambda t: grouped(t, 2500, 80, 48, 4, ONES)),
    Case("large-linear", grouped_low_rank_linear, lambda t: weighted(t, 8000, 2048, 768, 16, EVEN)),
    Case("large-linear-backward", grouped_low_rank_linear, lambda t: pulled(t, 8000, 2048, 768, 16, EVEN)),
    Case("large-linear-rank", grouped_low_rank_linear, lambda t: weighted(t, 3000, 1024, 768, 64, (100, 2900, 3000), 0.5)),
    Case("large-linear-open", grouped_low_rank_linear, lambda t: weighted(t, 3000, 520, 328, 5, (100, 110, 2900), 2.0)),
    Case("large-linear-many", grouped_low_rank_linear, lambda t: weighted(t, 2500, 80, 48, 4, MANY)),
    Case("large-grouped-pair", grouped_outer_pair, lambda t: pair(t, 8000, 768, 2048, 16, EVEN)),
    Case("large-grouped-pair-rank", grouped_outer_pair, lambda t: pair(t, 3000, 768, 1024, 64, (100, 2900, 3000))),
    Case("large-grouped-pair-odd", grouped_outer_pair, lambda t: pair(t, 3000, 767, 1023, 5, (100, 2900, 2999))),
    Case("large-grouped-pair-long", grouped_outer_pair, lambda t: pair(t, 40000, 256, 384, 16, (0, 39000, 39000, 40000))),
    Case("large-grouped-pair-single-rows", grouped_outer_pair, lambda t: pair(t, 2500, 48, 80, 4, ONES)),
    Case("large-add-product", add_product, lambda t: (t(1031, 3056), t(1031, 1000), t(24, 1000), t(24, 3056), False)),
    Case(
        "large-add-product-strided", add_product, lambda t: (sliced(t, 700, 3000), t(700, 900), t(50, 900), t(50, 3000), True)
    ),
    Case("large-add-product-deep", add_product, lambda t: (t(500, 1008), t(500, 5000), t(32, 5000), t(32, 1008), True)),
    Case("large-add-product-many-rows", add_product, lambda t: (t(3100, 1008), t(3100, 900), t(32, 900), t(32, 1008), True)),
    Case("large-folded", add_product, lambda t: (t(1000, 1040), t(1000, 5003), None, t(64, 1040), True)),
    Case("large-unfolded", add_product, lambda t: (t(1000, 5008), t(1000, 512), t(64, 512), None, True)),
    Case("large-transposed", transposed_products, lambda t: (t(2222, 64), t(2222, 1040), t(2222, 64), t(2222, 3056))),
    Case("large-reflections", hra.factors, lambda t: (t(28, 3072, 32),)),
    Case("large-reflections-odd", hra.factors, lambda t: (t(3, 8191, 23),)),
    Case("large-reflections-pull", hra.pull_factors, lambda t: reflections(t, 28, 3072, 32)),
    Case("large-reflections-pull-odd", hra.pull_factors, lambda t: reflections(t, 3, 8191, 64)),
    Case("large-bat", bone.build_bat, lambda t: (t(960, 1472), t(15, 64, 64), None)),
    *[Case(f"large-bat-r{r}", bone.build_bat, lambda t, r=r: (t(960, 1464), t(960 // r, r, r), None)) for r in SMALL],
    Case("large-low-rank", build_low_rank, lambda t: (t(3, 960, 1472), t(3, 960, 64), t(3, 64, 1472), None)),
    Case("large-bat-pull", bone.pull_bat, lambda t: (t(960, 1472), t(960, 1472), t(15, 64, 64))),
    *[
        Case(f"large-bat-pull-r{r}", bone.pull_bat, lambda t, r=r: (t(960, 1464), t(960, 1464), t(960 // r, r, r)))
        for r in SMALL
    ],
    Case("large-bat-pull-wide", bone.pull_bat, lambda t: (t(96, 8160), t(96, 8160), t(2, 48, 48))),
    Case("large-loha", loha.build, lambda t: (t(1111, 2050), *halves(t, 1111, 2050, 33), 0.3, None)),
    Case("large-pull", loha.pull, lambda t: (t(1111, 2050), *halves(t, 1111, 2050, 33), 0.3)),
    Case("large-pull-wide", loha.pull, lambda t: (t(96, 8192), *halves(t, 96, 8192, 8), 0.3)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_as_exact_as_plain_torch(case, dtype):
    torch.manual_seed(sum(map(ord, case.name)))
    arguments = case.arguments(lambda *sizes: torch.randn(*sizes, dtype=dtype, device="cuda"))
    exact = case.op.reference(*copied(arguments, torch.float64))
    plain = case.op.reference(*copied(arguments))
    with torch.no_grad(), backend("triton"):
        given = copied(arguments)
        assert case.op.choice(*given) is case.op.kernel
        result = case.op(*given)
        again = case.op(*copied(arguments))  # by the kept launch
    for ours, theirs, twice in zip(tensors(result), tensors(plain), tensors(again), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours, twice)
    if dtype is torch.float32:  # another order of summation: nothing is rounded in between that could be saved
        assert error(result, exact) <= 3 * error(plain, exact) + torch.finfo(dtype).eps
    else:
        assert error(result, exact) <= 1.5 * error(plain, exact) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_left_to_plain_torch(case):
    """A kernel computes in fp32."""
    assert case.op.choice(*case.arguments(lambda *sizes: torch.randn(*sizes, dtype=torch.float64, device="cuda"))) is None


CONFIGS = {
    "hra": HRAConfig(r=8, target_modules="all-linear"),
    "hra-gs": HRAConfig(r=6, apply_GS=True, init_weights=False, target_modules="all-linear"),
    "loha-low-rank": LoHaConfig(r=4, alpha=4, target_modules="all-linear"),
    "loha-dense": LoHaConfig(r=48, alpha=24, target_modules="all-linear"),
    "bone": BoneConfig(r=48, target_modules="all-linear"),
    "bat-small": BoneConfig(r=8, init_weights="bat", target_modules="all-linear"),
    "bat": BoneConfig(r=32, init_weights="bat", target_modules="all-linear"),
    "oft": OFTConfig(oft_block_size=32, target_modules="all-linear"),
    "oft-exact": OFTConfig(oft_block_size=64, use_cayley_neumann=False, target_modules="all-linear"),
    "lora": LoraConfig(r=16, lora_alpha=8, target_modules="all-linear"),
}


def adapted(config, dtype=torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1024, 2048), nn.Tanh(), nn.Linear(2048, 1024, bias=False)).to("cuda", dtype)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("r", [1, 4, 7, 8, 12, 24, 64, 128])
def test_blocks_of_any_size_run_their_kernels_unasked(r):
    W = torch.randn(2 * r, 3 * r, dtype=torch.bfloat16, device="cuda")
    blocks = torch.randn(2, r, r, dtype=torch.bfloat16, device="cuda")
    assert bone.build_bat.choice(W, blocks, None) is bone.build_bat.kernel
    assert bone.pull_bat.choice(W, W, blocks) is bone.pull_bat.kernel


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_is_as_exact(name):
    model = adapted(CONFIGS[name])
    x = torch.randn(4, 384, 1024, device="cuda", dtype=torch.bfloat16)
    duplicates = [copy.deepcopy(model) for _ in range(2)]
    ours = gradients(model, x)
    with backend("reference"):
        plain = gradients(duplicates[0], x)
        exact = gradients(duplicates[1].double(), x.double())
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert error(a, c) <= 1.5 * error(b, c) + torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.parametrize("name", CONFIGS)
def test_in_a_cuda_graph(name):
    """Captured forward and backward, replayed on new inputs and new parameters."""
    if name in ("hra-gs", "oft-exact"):
        pytest.skip("torch.linalg.eigh and solve synchronise, which a capture forbids")
    model = adapted(CONFIGS[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(600, 1024, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x).float().square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    for p in trained:
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = model(x)
        y.float().square().mean().backward()
        y = y.detach()  # else the parameters' nodes of this stream would be those of the pass below, on another
    with torch.no_grad():
        x.normal_()
        for p in trained:
            p.mul_(1.5)
            p.grad.zero_() if p.grad is not None else None
    graph.replay()
    torch.cuda.synchronize()
    captured = [y.clone(), *(p.grad.clone() for p in trained)]
    for p in trained:
        p.grad = None
    z = model(x)
    z.float().square().mean().backward()
    for a, b in zip(captured, [z, *(p.grad for p in trained)], strict=True):
        assert error(a, b.double()) < 2e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_grad_scaler_in_fp16(name):
    model = adapted(CONFIGS[name], torch.float16)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    losses = []
    x, target = torch.randn(2, 64, 1024, device="cuda", dtype=torch.float16), torch.randn(64, 1024, device="cuda")
    for _ in range(8):
        loss = (model(x).float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        assert torch.isfinite(norm) and norm > 0
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
