"""In a compiled graph a kernel is a node; what backward can make again is not kept for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, get_peft_model

CONFIGS = {
    "bat": BoneConfig(r=8, init_weights="bat", target_modules="all-linear"),
    "loha-dense": LoHaConfig(r=32, alpha=4, target_modules="all-linear"),
    "hra": HRAConfig(r=4, target_modules="all-linear"),
    "bone": BoneConfig(r=8, target_modules="all-linear"),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own compiler does it
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_the_size_of_the_weight_is_kept(name):
    torch._dynamo.reset()
    base = nn.Sequential(nn.Linear(48, 64))
    model = get_peft_model(base, CONFIGS[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(5, 48, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = compiled(x)
    W = next(p for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
    assert kept
    assert all(t.data_ptr() == W.data_ptr() for t in kept if t.numel() >= W.numel())
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
