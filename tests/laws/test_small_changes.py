"""Small changes are seen: where W' is stored in half precision in training, it is rounded so that its mean is right.

Half a unit of bf16 is 2e-3 of a weight. Rounded to nearest, a change smaller than that would leave most outputs as they were.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from halotune.core.adapter import Adapter

WIDTH, ROWS = 1024, 4096  # four million outputs
CONFIGS = {
    "hra": HRAConfig(r=8, target_modules="all-linear"),
    "lora": LoraConfig(r=8, target_modules="all-linear"),
    "bone": BoneConfig(r=32, target_modules="all-linear"),
    "bat": BoneConfig(r=32, init_weights="bat", target_modules="all-linear"),
    "loha": LoHaConfig(r=6, target_modules="all-linear"),
    "loha-large": LoHaConfig(r=24, target_modules="all-linear"),
}
FORMS = [*((name, "weights") for name in CONFIGS), ("bat", "activations"), ("loha-large", "activations")]


def model_of(name: str, form: str) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(torch.bfloat16)
    model = get_peft_model(base, CONFIGS[name])
    model.set_adapter_form(form)
    return model.train()


def only(model: PeftModel) -> Adapter:
    return next(m for m in model.modules() if isinstance(m, Adapter))


def matrix(model: PeftModel) -> Tensor:
    """W', not rounded."""
    W = next(p for p in model.parameters() if not p.requires_grad)
    return only(model).weight(W.detach().float()).detach()


def outputs(model: PeftModel, x: Tensor, times: int) -> Tensor:
    """Their mean: over a million weights, by chance alone, one pass shows a change of 1e-4 to about 4 %."""
    return sum(model(x).detach().float() for _ in range(times)) / times


@torch.no_grad()
def move(model: PeftModel, direction: list[Tensor], step: float) -> None:
    for p, d in zip(only(model).parameters(), direction, strict=True):
        p.add_(step * d)


@torch.no_grad()
def step_for(model: PeftModel, direction: list[Tensor], size: float) -> float:
    """How far to go in this direction, so that W' changes by `size` of itself."""
    before, step, power, last = matrix(model), 1e-3, 1.0, None
    for _ in range(12):
        move(model, direction, step)
        change = float((matrix(model) - before).norm() / before.norm())
        move(model, direction, -step)
        if abs(change / size - 1) < 0.05:
            return step
        if last is not None and last[0] != step:  # the change grows like a power of the step
            power = max(0.3, math.log(change / last[1]) / math.log(step / last[0]))
        last = step, change
        step *= (size / change) ** (1 / power)
    return step


@pytest.mark.parametrize(("name", "form"), FORMS, ids=["-".join(f) for f in FORMS])
@pytest.mark.parametrize("trained", [False, True], ids=["start", "trained"])
def test_the_change_of_the_output_is_the_true_one(name, form, trained):
    model, x = model_of(name, form), torch.randn(ROWS, WIDTH).to(torch.bfloat16)
    torch.manual_seed(1)
    if trained:
        move(model, [torch.randn_like(p) * p.detach().std().clamp_min(1e-2) for p in only(model).parameters()], 0.1)
    direction = [torch.randn_like(p) for p in only(model).parameters()]
    y, before = outputs(model, x, 4), matrix(model)
    for size in (1e-4, 1e-3, 1e-2, 1e-1):
        step = step_for(model, direction, size)
        move(model, direction, step)
        true = x.float() @ (matrix(model) - before).T
        seen = outputs(model, x, 4 if size == 1e-4 else 1) - y
        move(model, direction, -step)
        assert 0.5 * size < float(true.norm() / y.norm()) < 2 * size
        assert 0.95 < float((seen * true).sum() / true.square().sum()) < 1.05


def test_evaluation_rounds_to_nearest():
    model, x = model_of("bat", "weights"), torch.randn(16, WIDTH).to(torch.bfloat16)
    with torch.no_grad():
        next(only(model).parameters()).normal_(std=1e-3)
    W = matrix(model).to(torch.bfloat16)
    assert not torch.equal(model(x), model(x))
    for form in ("weights", "activations"):
        model.set_adapter_form(form)
        model.eval()
        torch.testing.assert_close(model(x), nn.functional.linear(x, W), rtol=2e-2, atol=2e-2)
        assert torch.equal(model(x), model(x))
        model.train()


@pytest.mark.parametrize("form", ["weights", "activations"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_rounds_as_before(form, reentrant):
    """What is computed again is what was computed: gradients are those of a run without a checkpoint, under one seed."""
    found = []
    for checkpointed in (False, True):
        model, x = model_of("bat", form), torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            next(only(model).parameters()).normal_(std=1e-2)
        x.requires_grad_()
        torch.manual_seed(5)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        else:
            y = model(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, next(only(model).parameters()).grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
