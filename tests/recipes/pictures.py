"""Pictures of a subject, cut from scikit-learn's photograph of a flower, and toy pipelines on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image


def photograph() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("flower.jpg"))


def save_subject(folder: Path, count: int = 3) -> Path:
    """Squares of 32 pixels around the flower."""
    folder.mkdir(parents=True)
    whole = photograph()
    for i in range(count):
        whole.crop((180 + 20 * i, 60, 480 + 20 * i, 360)).resize((32, 32)).save(folder / f"{i:02}.png")
    return folder


def save_flux(folder: Path) -> Path:
    """A Flux pipeline of one block of each kind, whose text encoders know letters alone."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    sd = folder.parent / "sd" / "pipeline"
    clip: Any = CLIPTextModel.from_pretrained(sd / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
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
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.1,
        )
        t5 = T5EncoderModel(T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=37, num_heads=4, num_layers=1))
    # Any tokenizer serves the toy T5.
    FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, clip, tokenizer, t5, tokenizer, transformer).save_pretrained(folder)
    return folder
