"""Models of published shapes with random weights, and batches for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .contenders import imported

Batch = dict[str, Tensor]
TARGETS = ("qv", "all-linear", "all")


class Family:
    """What the models of one architecture share; these methods are those of transformers' models of text."""

    model: ClassVar[str]  # its class
    qv: ClassVar[tuple[str, str]]  # the query's and the value's projections
    blocks: ClassVar[tuple[str, ...]]  # classes of the repeated blocks, which --compile compiles
    layers: ClassVar[str] = "num_hidden_layers"  # the configuration's field that --layers changes
    decodes: ClassVar[bool] = False

    def build(self, shape: dict[str, Any]) -> nn.Module:
        model = getattr(imported("transformers"), self.model)
        return model(model.config_class(**shape))

    def batch(self, shape: dict[str, Any], batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Batch:
        """One random batch."""
        return {"input_ids": torch.randint(shape["vocab_size"], (batch, tokens), device=device)}

    def static(self, batch: Batch) -> Batch:
        """The batch for a step that is captured: with all that the model would otherwise make in another way then."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch, labels=batch["input_ids"]).loss

    def entry(self, model: Any) -> nn.Module:
        """The module whose output gradients have to reach."""
        return model.get_input_embeddings()

    def head(self, model: Any) -> nn.Module | None:
        """The output layer, which "all-linear" leaves out."""
        return model.get_output_embeddings()


class Llama(Family):
    model = "LlamaForCausalLM"
    qv = "q_proj", "v_proj"
    blocks = ("LlamaDecoderLayer",)
    decodes = True

    def build(self, shape: dict[str, Any]) -> nn.Module:
        return super().build({"tie_word_embeddings": False, **shape})

    def static(self, batch: Batch) -> Batch:
        tokens = batch["input_ids"].shape[1]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=batch["input_ids"].device).tril()
        return {**batch, "attention_mask": mask}  # transformers leaves it out, but not while a stream is captured

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch, labels=batch["input_ids"], use_cache=False).loss


class Bert(Family):
    model = "BertForMaskedLM"
    qv = "query", "value"
    blocks = ("BertLayer",)


class UNet(Family):
    """Stable Diffusion's UNet, which has convolutions; `tokens` are the latent's pixels."""

    qv = "to_q", "to_v"
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    layers = "layers_per_block"

    def build(self, shape: dict[str, Any]) -> nn.Module:
        return imported("diffusers").UNet2DConditionModel(**shape)

    def batch(self, shape: dict[str, Any], batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Batch:
        factor = 2 ** (len(shape["block_out_channels"]) - 1)  # every block but the last halves the sides
        side = max(1, round(math.sqrt(tokens) / factor)) * factor
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        return {
            "sample": torch.randn(batch, 4, side, side, **options),
            "timestep": torch.randint(1000, (batch,), device=device),
            "encoder_hidden_states": torch.randn(batch, 77, shape["cross_attention_dim"], **options),
            "noise": torch.randn(batch, 4, side, side, **options),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "noise"}
        return nn.functional.mse_loss(model(**inputs).sample.float(), batch["noise"].float())

    def entry(self, model: Any) -> nn.Module:
        return model.conv_in

    def head(self, model: Any) -> nn.Module | None:
        return None


@dataclass(frozen=True)
class Preset:
    """A published shape."""

    family: Family
    shape: dict[str, Any]  # the configuration's fields
    tokens: int  # of a sample, unless asked otherwise

    def with_layers(self, layers: int | None) -> Preset:
        return self if layers is None else replace(self, shape={**self.shape, self.family.layers: layers})


_LLAMA = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"),
    "vocab_size",
)
_BERT = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"


def _shape(names: tuple[str, ...], *sizes: int) -> dict[str, Any]:
    return dict(zip(names, sizes, strict=True))


def _unet(channels: tuple[int, ...], cross: int, heads: int, layers: int) -> dict[str, Any]:
    n = len(channels) - 1
    return {
        "block_out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * n + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * n,
        "cross_attention_dim": cross,
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "layers_per_block": layers,
    }


PRESETS: dict[str, Preset] = {
    "llama-8b": Preset(Llama(), _shape(_LLAMA, 4096, 32, 32, 8, 128, 14336, 128256), 768),
    "llama-3b": Preset(Llama(), _shape(_LLAMA, 3072, 28, 24, 8, 128, 8192, 128256), 768),
    "llama-1b": Preset(Llama(), _shape(_LLAMA, 2048, 16, 32, 8, 64, 8192, 128256), 768),
    "llama-135m": Preset(Llama(), {**_shape(_LLAMA, 576, 30, 9, 3, 64, 1536, 49152), "tie_word_embeddings": True}, 256),
    "llama-tiny": Preset(Llama(), _shape(_LLAMA, 128, 2, 4, 2, 32, 256, 512), 64),
    "bert-base": Preset(Bert(), _shape(_BERT, 768, 12, 12, 3072, 30522), 128),
    "bert-tiny": Preset(Bert(), _shape(_BERT, 128, 2, 2, 512, 512), 32),
    "sd-unet": Preset(UNet(), _unet((320, 640, 1280, 1280), 768, 8, 2), 4096),
    "unet-tiny": Preset(UNet(), _unet((32, 64), 32, 2, 1), 64),
}


def build(preset: Preset, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen model with random weights, made on the device in its dtype."""
    with default_dtype(dtype), device:
        model = preset.family.build(preset.shape)
    return model.to(device, dtype).requires_grad_(False)


def target_names(model: nn.Module, family: Family, targets: str) -> list[str]:
    """The full names of the modules that get an adapter: the same ones for every library."""
    named = [(name, m) for name, m in model.named_modules() if m is not family.head(model)]
    if targets == "qv":
        return [name for name, _ in named if name.rsplit(".", 1)[-1] in family.qv]
    kinds = (nn.Linear,) if targets == "all-linear" else (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, m in named if isinstance(m, kinds)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
