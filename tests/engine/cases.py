"""Every form of a forward pass, at sizes that make it: small and large ranks, thin and dense."""

from __future__ import annotations

import pytest

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig

CONFIGS = {
    "hra": HRAConfig(r=4, target_modules="all-linear"),
    "hra-gs": HRAConfig(r=3, apply_GS=True, init_weights=False, target_modules="all-linear"),
    "loha": LoHaConfig(r=2, alpha=3, target_modules="all-linear"),
    "loha-dense": LoHaConfig(r=8, alpha=3, target_modules="all-linear"),
    "bone": BoneConfig(r=5, target_modules="all-linear"),
    "bat": BoneConfig(r=4, init_weights="bat", target_modules="all-linear"),
    "lora": LoraConfig(r=3, target_modules="all-linear"),
}
every = pytest.mark.parametrize("name", CONFIGS)
