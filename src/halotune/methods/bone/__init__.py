"""Bone and BAT: block-affine adapters; MiSS is their name in newer PEFT."""

from ...core.config import PeftType
from ...core.registry import Method, register
from .adapter import Bat, Bone, Miss, MissBat, create_bone, create_miss
from .config import BoneConfig, MissConfig, as_bone, as_miss

_RATES = {"BONE": 1e-3, "BAT": 1e-3}

BONE = register(Method(PeftType.BONE.value, "bone_", BoneConfig, (Bone, Bat), create_bone, _RATES, {"MISS": as_miss}))
MISS = register(
    Method(PeftType.MISS.value, "miss_", MissConfig, (Miss, MissBat), create_miss, {"MISS": 1e-3}, {"BONE": as_bone})
)

__all__ = ["BONE", "MISS", "Bat", "Bone", "BoneConfig", "Miss", "MissBat", "MissConfig"]
