"""Toy pipelines of every family, with random weights; their CLIP knows letters alone, as that of the toy Stable Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .examples.models import seeded


def vae(widths: tuple[int, ...] = (8, 8), **also: Any) -> Any:
    """Halves pictures once less than it has widths."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        norm_num_groups=4,
        **also,
    )


def clip(stable_diffusion: Path) -> tuple[Any, Any, Any]:
    """A text encoder, one with a projection, and their tokenizer."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    plain: Any = CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder")
    plain.config.projection_dim = 32
    tokenizer = CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer")
    return plain, CLIPTextModelWithProjection(plain.config).eval(), tokenizer


def t5(width: int) -> Any:
    """Any tokenizer serves it."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=60, d_model=width, d_kv=8, d_ff=37, num_heads=4, num_layers=1)).eval()


@seeded()
def sdxl(stable_diffusion: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    plain, projected, tokenizer = clip(stable_diffusion)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 32,
        use_linear_projection=True,
    )
    text = (plain, projected, tokenizer, tokenizer)
    return StableDiffusionXLPipeline(vae(), *text, unet, DDIMScheduler(), add_watermarker=False)


@seeded()
def sd3(stable_diffusion: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    _, projected, tokenizer = clip(stable_diffusion)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )
    text = (projected, tokenizer, projected, tokenizer, t5(64), tokenizer)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.1), *text)


@seeded()
def flux(stable_diffusion: Path) -> Any:
    """With one block of each kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    plain, _, tokenizer = clip(stable_diffusion)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    text = (plain, tokenizer, t5(32), tokenizer)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.1), *text, transformer)


@seeded()
def pixart() -> Any:
    """Without a text encoder."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        use_additional_conditions=False,
    )
    with torch.no_grad():  # these start at zero
        nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae((8,)), transformer=transformer, scheduler=DDIMScheduler()
    )
