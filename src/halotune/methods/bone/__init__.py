"""Bone and BAT: block-affine adapters; MiSS is their name in newer PEFT."""

from ..registry import Kind, Method, register
from .adapter import Bat, Bone, Miss, MissBat, create_bone, create_miss
from .config import BoneConfig, MissConfig, as_bone, as_miss
from .from_peft import BONE_FROM_PEFT, MISS_FROM_PEFT
from .measures import MEASURES

BONE = register(
    Method(
        "BONE",
        "bone_",
        BoneConfig,
        (Bone, Bat),
        create_bone,
        {"BONE": Kind(1e-3), "BAT": Kind(1e-3, lambda r: {"r": r, "init_weights": "bat"})},
        aliases={"MISS": as_miss},
        from_peft=BONE_FROM_PEFT,
        measures=MEASURES,
    )
)
MISS = register(
    Method(
        "MISS",
        "miss_",
        MissConfig,
        (Miss, MissBat),
        create_miss,
        {"MISS": Kind(1e-3)},
        aliases={"BONE": as_bone},
        from_peft=MISS_FROM_PEFT,
        measures=MEASURES,
    )
)

__all__ = ["BONE", "MISS", "Bat", "Bone", "BoneConfig", "Miss", "MissBat", "MissConfig"]
