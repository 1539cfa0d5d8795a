"""The target runtimes that read LoRA files, and what each can represent: one table. Their rules are in `rules.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.attention import ProjectionBase
from ..core.base import Convolution, TransposedLinear
from ..core.errors import HalotuneError
from ..core.experts import ExpertsBase
from ..core.files import WEIGHTS_NAME
from ..core.layer import AdaptedLayer
from .components import Component

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Runtime:
    """What one program reads of a LoRA.

    Attributes:
        convolutions: "no"; "basic": as peft wraps them, two convolutions without dilation and padded with zeros; "any".
        attention: the projections of `torch.nn.MultiheadAttention`. peft 0.21 adds the output projection's LoRA twice.
        transposed: transformers' `Conv1D`.
        experts: fused experts, as PEFT from 0.19 on stores them.
        modules_to_save: modules fully fine-tuned, and resized embeddings, beside the LoRA.
        folder: a folder with `adapter_config.json`, in PEFT's names; else one file, in those of diffusers.
        ranks: the ranks that it takes; () is any.
        hint: how to serve; "{rank}" is replaced by the first of its ranks that suffices.
    """

    name: str
    convolutions: Literal["no", "basic", "any"] = "no"
    attention: bool = False
    transposed: bool = True
    experts: bool = False
    modules_to_save: bool = False
    folder: bool = True
    ranks: tuple[int, ...] = ()
    hint: str = ""

    @property
    def file(self) -> str:
        return WEIGHTS_NAME if self.folder else DIFFUSERS_NAME

    def refusal(self, path: str, layer: AdaptedLayer, shared: bool) -> str | None:
        """Why the adapter of this layer, at `path` in the model, is nothing that the runtime represents; or None.

        Args:
            shared: the model has the layer under several names.
        """
        base = layer.base
        if shared and self.convolutions == "basic":
            return "wraps a layer that has several names (peft does) at one of them only"
        if not self.attention and (isinstance(base, ProjectionBase) or path.endswith(".base_layer.out_proj")):
            return "reads no LoRA of torch.nn.MultiheadAttention, or reads it wrong"
        if isinstance(base, ExpertsBase) and not self.experts:
            return "reads no LoRA of fused experts"
        if isinstance(base, TransposedLinear) and not self.transposed:
            return "does not know that the weight of transformers' Conv1D is transposed"
        if not isinstance(base, Convolution) or self.convolutions == "any":
            return None
        if self.convolutions == "no":
            return "reads no LoRA of convolutions"
        if any(d != 1 for d in base.module.dilation):
            return f"ignores a convolution's dilation, which is {tuple(base.module.dilation)}"
        if base.module.padding_mode != "zeros":
            return f"ignores a convolution's padding mode, which is {base.module.padding_mode!r}"
        return None

    def blocks(self, layer: AdaptedLayer) -> int:
        """How many blocks the factors of a layer fill: peft's form of a grouped convolution has one per group."""
        return layer.base.shape.groups if self.convolutions == "basic" else 1

    def fitting_rank(self, rank: int) -> int:
        """The smallest rank that it takes and that is not below this one."""
        if not self.ranks:
            return rank
        fitting = [r for r in self.ranks if r >= rank]
        if not fitting:
            raise HalotuneError(
                f"{self.name} takes ranks up to {self.ranks[-1]}, and the LoRA that equals this adapter has rank {rank}. Give "
                f"rank={self.ranks[-1]} or less: what truncation loses is reported layer by layer."
            )
        return fitting[0]

    def serving_hint(self, rank: int | None) -> str:
        """What to add to "reads it", for a rank that it takes."""
        return f"; {self.hint.format(rank=self.fitting_rank(rank))}" if self.hint and rank else ""

    def keys(self, path: str, component: Component | None) -> tuple[str, str, str | None]:
        """The keys of A, of B, and of the alpha that the file has beside them, if any.

        Args:
            component: which part of a pipeline the model is; None for folders in PEFT's format.
        """
        if component is None:
            name = f"base_model.model.{path}"
        elif self.name == "comfyui" and component.name.startswith(("unet", "text_encoder")):  # transformers: by other names
            name = component.kohya(path)
            return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"
        else:
            name = f"{component.name}.{component.stored(path)}"
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight", None


# vLLM: MaxLoRARanks in vllm/config/lora.py.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

RUNTIMES: dict[str, Runtime] = {
    c.name: c
    for c in (
        Runtime("peft", convolutions="basic", experts=True, modules_to_save=True),
        Runtime("halotune", convolutions="any", attention=True, experts=True, modules_to_save=True),
        Runtime("vllm", ranks=_VLLM_RANKS, hint="serve with --max-lora-rank {rank}"),
        Runtime("sglang"),
        Runtime("llama.cpp", transposed=False),
        Runtime("diffusers", convolutions="basic", folder=False),
        Runtime("comfyui", convolutions="any", folder=False),
    )
}
