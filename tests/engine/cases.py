"""Every form of a forward pass, at sizes that make it: small and large ranks, low-rank and dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model

CONFIGS = {
    "hra": HRAConfig(r=4, target_modules="all-linear"),
    "hra-gs": HRAConfig(r=3, apply_GS=True, init_weights=False, target_modules="all-linear"),
    "loha": LoHaConfig(r=2, alpha=3, target_modules="all-linear"),
    "loha-dense": LoHaConfig(r=8, alpha=3, target_modules="all-linear"),
    "bone": BoneConfig(r=5, target_modules="all-linear"),
    "bat": BoneConfig(r=4, init_weights="bat", target_modules="all-linear"),
    "oft": OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "lora": LoraConfig(r=3, target_modules="all-linear"),
}
every = pytest.mark.parametrize("name", CONFIGS)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapted(make: Callable[[], nn.Module], config) -> PeftModel:
    """What `make` makes, with adapters of random numbers."""
    torch.manual_seed(0)
    model = get_peft_model(make(), config)
    with torch.no_grad():
        for p in trained(model):
            p.normal_(0, 0.3)
    return model
