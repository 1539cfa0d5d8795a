"""Small pipelines with random weights, and adapters for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halotune import AdapterConfig, BoneConfig, HRAConfig, LoHaConfig, LoraConfig, MissConfig
from halotune.integrations.diffusers import PipelineAdapters

CONFIGS: dict[str, AdapterConfig] = {
    "hra": HRAConfig(r=4),
    "loha": LoHaConfig(r=3, alpha=5),
    "bone": BoneConfig(r=4),
    "bat": BoneConfig(r=4, init_weights="bat"),
    "miss": MissConfig(r=5),
    "lora": LoraConfig(r=2, lora_alpha=3),
}
CONVOLUTIONS = ["to_q", "to_v", "proj_in", "conv1", "conv_shortcut"]


def configs(unet: str = "hra", text_encoder: str = "loha") -> dict[str, AdapterConfig]:
    return {"unet": copy.copy(CONFIGS[unet]), "text_encoder": copy.copy(CONFIGS[text_encoder])}


def load(folder: Path, **changes: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def randomize(model: nn.Module, name: str) -> None:
    """Far from the start, where an adapter does nothing."""
    for key, p in model.named_parameters():
        if f".adapters.{name}." in key:
            p.add_(0.3 * torch.randn_like(p))


def add(pipe: Any, name: str = "dog", **parts: AdapterConfig) -> PipelineAdapters:
    """Adapters that do something: by default HRA in the UNet, LoHa in the text encoder."""
    adapters = PipelineAdapters(pipe)
    adapters.add(parts or configs(), name)
    for component in parts or configs():
        randomize(getattr(pipe, component), name)
    return adapters


def image(pipe: Any, **options: Any) -> Tensor:
    """`(1, 16, 16, 3)`, of two steps from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    pictures = pipe("a dog", num_inference_steps=2, output_type="np", generator=generator, **options).images
    return torch.from_numpy(pictures)


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=2e-3)


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-5)


@torch.no_grad()
def flux_image(pipe: Any) -> Tensor:
    prompts = {"prompt_embeds": pipe.text_encoder_2(torch.arange(12)[None])[0], "pooled_prompt_embeds": torch.ones(1, 32)}
    generator = torch.Generator().manual_seed(0)
    size = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 12}
    return torch.from_numpy(pipe(**prompts, **size, generator=generator, output_type="np").images)


def pixart_image(pipe: Any) -> Tensor:
    embeds = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 6)
    found = pipe(
        prompt_embeds=embeds[0],
        negative_prompt=None,
        negative_prompt_embeds=embeds[1],
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        height=8,
        width=8,
        num_inference_steps=2,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    return torch.from_numpy(found.images)
