"""Bone and BAT: block-affine adapters; MiSS is their name in newer PEFT."""

from ..registry import Kind, Method, register
from .adapter import Bat, Bone, Miss, MissBat, create
from .config import BoneConfig, MissConfig, as_bone, as_miss
from .from_peft import FROM_PEFT
from .measures import MEASURES

KINDS = {"BONE": Kind(1e-3, title="Bone"), "BAT": Kind(1e-3, lambda r: {"r": r, "init_weights": "bat"})}
BONE = register(Method("BONE", "bone_", BoneConfig, (Bone, Bat), create, KINDS, aliases={"MISS": as_miss}, measures=MEASURES))
MISS = register(
    Method(
        "MISS",
        "miss_",
        MissConfig,
        (Miss, MissBat),
        create,
        {"MISS": Kind(1e-3, title="MiSS")},
        aliases={"BONE": as_bone},
        from_peft=FROM_PEFT,
        measures=MEASURES,
    )
)

__all__ = ["BONE", "MISS", "Bat", "Bone", "BoneConfig", "Miss", "MissBat", "MissConfig"]
