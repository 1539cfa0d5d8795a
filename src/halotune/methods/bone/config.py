"""The configurations of Bone and of MiSS, its name in newer PEFT."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError


@dataclass(kw_only=True)
class BlockConfig(AdapterConfig):
    """What Bone and MiSS share."""

    r: int = 64
    init_weights: bool | Literal["bat"] | str = True
    bias: str = "none"

    KINDS: ClassVar[tuple[object, ...]] = (True, False, "bat")

    def check(self) -> None:
        super().check()
        self.require_choice("init_weights", self.KINDS)

    @property
    def kind(self) -> str:
        return self.init_weights if isinstance(self.init_weights, str) else ""


@dataclass(kw_only=True)
class BoneConfig(BlockConfig):
    """Bone: `W' = W + tile(Dᵀ)`, and BAT: `W'_ij = W_ij + W_ij B_i + B_i` (arXiv 2409.15371), in PEFT's older name.

    Args:
        r: the number of rows of D (Bone); or the side of the blocks (BAT), which must divide both sizes of the weight.
        init_weights: True is Bone, starting as the identity; False the same, at random; `"bat"` is BAT.
        bias: which biases are trained: `"none"`, `"all"`, or `"bone_only"`, those of the adapted layers.
    """

    TYPE: ClassVar[str] = "BONE"
    BIASES: ClassVar[tuple[str, ...]] = ("none", "all", "bone_only")


@dataclass(kw_only=True)
class MissConfig(BlockConfig):
    """MiSS: the adapters of Bone and BAT under PEFT's newer name, and the mini form.

    Args:
        r: as in Bone.
        mini_r: for `"mini"`: the number of columns of the block, which are repeated over the outputs; it must divide them.
        miss_dropout: dropout on the adapter's input; not defined for `"bat"`.
        init_weights: True is balance (Bone), False the same at random, `"bat"`, or `"mini"`.
        bias: which biases are trained: `"none"`, `"all"`, or `"MiSS_only"`, those of the adapted layers.
    """

    mini_r: int = 1
    miss_dropout: float = 0.0
    init_weights: bool | Literal["bat", "mini"] | str = True

    TYPE: ClassVar[str] = "MISS"
    KINDS: ClassVar[tuple[object, ...]] = (True, False, "bat", "mini")
    BIASES: ClassVar[tuple[str, ...]] = ("none", "all", "MiSS_only", "bone_only")  # peft's files hold either

    def check(self) -> None:
        super().check()
        self.require_share("miss_dropout")
        if self.mini_r < 1:
            remedy = "Use a number of columns that divides the outputs, such as 1."
            raise self.error("mini_r", f"must be at least 1; got {self.mini_r}", remedy)
        if self.init_weights == "bat" and self.miss_dropout:
            found = f'is not defined for init_weights="bat", which acts on the weight; got {self.miss_dropout}'
            raise self.error("miss_dropout", found, "Set it to 0, or use init_weights=True.")


def as_miss(config: BoneConfig, tensors: dict[str, Tensor]) -> tuple[MissConfig, dict[str, Tensor]]:
    """The same adapter in the names of MiSS, which peft 0.19 and later read."""
    entries = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "peft_type"}
    if config.bias == "bone_only":
        entries["bias"] = "MiSS_only"
    return MissConfig(**entries), {key.replace("bone_block", "miss_block"): t for key, t in tensors.items()}


def as_bone(config: MissConfig, tensors: dict[str, Tensor]) -> tuple[BoneConfig, dict[str, Tensor]]:
    """The same adapter in the names of Bone, which peft up to 0.18 reads. Its dropout, which Bone lacks, is left out.

    Raises:
        HalotuneError: Bone has no mini form.
    """
    if config.init_weights == "mini":
        raise HalotuneError('MiSS: init_weights="mini" has no form in Bone. Keep it as MiSS.')
    entries = {f.name: getattr(config, f.name) for f in fields(BoneConfig) if f.name != "peft_type"}
    if config.bias == "MiSS_only":
        entries["bias"] = "bone_only"
    return BoneConfig(**entries), {key.replace("miss_block", "bone_block"): t for key, t in tensors.items()}
