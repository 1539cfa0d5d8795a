"""Bone and BAT: block-affine adapters; MiSS is their name in newer PEFT."""

from ...core.config import PeftType
from ..registry import Method, register
from .adapter import Bat, Bone, Miss, MissBat, create_bone, create_miss
from .config import BoneConfig, MissConfig, as_bone, as_miss
from .from_peft import BONE_FROM_PEFT, MISS_FROM_PEFT
from .measures import MEASURES

BONE = register(
    Method(
        PeftType.BONE.value,
        "bone_",
        BoneConfig,
        (Bone, Bat),
        create_bone,
        {"BONE": 1e-3, "BAT": 1e-3},
        twins={"MISS": as_miss},
        from_peft=BONE_FROM_PEFT,
        measures=MEASURES,
    )
)
MISS = register(
    Method(
        PeftType.MISS.value,
        "miss_",
        MissConfig,
        (Miss, MissBat),
        create_miss,
        {"MISS": 1e-3},
        twins={"BONE": as_bone},
        from_peft=MISS_FROM_PEFT,
        measures=MEASURES,
    )
)

__all__ = ["BONE", "MISS", "Bat", "Bone", "BoneConfig", "Miss", "MissBat", "MissConfig"]
