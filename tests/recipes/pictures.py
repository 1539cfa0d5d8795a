"""Pictures of a subject, cut from scikit-learn's photograph of a flower, and toy pipelines on disk."""

from __future__ import annotations

import re
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


def _clip(folder: Path) -> tuple[Any, Any, Any]:
    """The toy Stable Diffusion's text encoder and tokenizer, and an encoder with a projection."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    sd = folder.parent / "sd" / "pipeline"
    clip: Any = CLIPTextModel.from_pretrained(sd / "text_encoder")
    clip.config.projection_dim = 32
    return clip, CLIPTextModelWithProjection(clip.config), CLIPTokenizer.from_pretrained(sd / "tokenizer")


def _vae(**also: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **also,
    )


def _t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=60, d_model=width, d_kv=8, d_ff=37, num_heads=4, num_layers=1))


def save_sdxl(folder: Path) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, projected, tokenizer = _clip(folder)
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
        pipe = StableDiffusionXLPipeline(
            _vae(), clip, projected, tokenizer, tokenizer, unet, DDIMScheduler(), add_watermarker=False
        )
    pipe.save_pretrained(folder)
    return folder


def save_sd3(folder: Path) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, projected, tokenizer = _clip(folder)
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
        scheduler = FlowMatchEulerDiscreteScheduler()
        text = (projected, tokenizer, projected, tokenizer, _t5(64), tokenizer)
        pipe = StableDiffusion3Pipeline(transformer, scheduler, _vae(shift_factor=0.1), *text)
    pipe.save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    """A Flux pipeline of one block of each kind, whose text encoders know letters alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, _, tokenizer = _clip(folder)
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
        t5 = _t5(32)
    # Any tokenizer serves the toy T5.
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), _vae(shift_factor=0.1), clip, tokenizer, t5, tokenizer, transformer
    ).save_pretrained(folder)
    return folder


# The names of the toy Stable Diffusion's parts in a checkpoint of the original code: (ours, theirs), in turn.
UNET_NAMES = (
    (r"^conv_in", "input_blocks.0.0"),
    (r"^down_blocks.0.resnets.0", "input_blocks.1.0"),
    (r"^down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    (r"^down_blocks.1.resnets.0", "input_blocks.3.0"),
    (r"^down_blocks.1.attentions.0", "input_blocks.3.1"),
    (r"^mid_block.resnets.0", "middle_block.0"),
    (r"^mid_block.attentions.0", "middle_block.1"),
    (r"^mid_block.resnets.1", "middle_block.2"),
    (r"^up_blocks.0.resnets.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks.0.attentions.(\d)", r"output_blocks.\1.1"),
    (r"^up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
    (r"^up_blocks.1.resnets.0", "output_blocks.2.0"),
    (r"^up_blocks.1.resnets.1", "output_blocks.3.0"),
    (r"^time_embedding.linear_1", "time_embed.0"),
    (r"^time_embedding.linear_2", "time_embed.2"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^(\w+blocks?[.\d]+)\.norm1", r"\1.in_layers.0"),
    (r"^(\w+blocks?[.\d]+)\.conv1", r"\1.in_layers.2"),
    (r"^(\w+blocks?[.\d]+)\.norm2", r"\1.out_layers.0"),
    (r"^(\w+blocks?[.\d]+)\.conv2", r"\1.out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
)
VAE_NAMES = (
    (r"down_blocks.(\d).resnets.(\d)", r"down.\1.block.\2"),
    (r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample"),
    (r"up_blocks.0.resnets.(\d)", r"up.1.block.\1"),
    (r"up_blocks.1.resnets.(\d)", r"up.0.block.\1"),
    (r"up_blocks.0.upsamplers.0", "up.1.upsample"),
    (r"mid_block.resnets.0", "mid.block_1"),
    (r"mid_block.resnets.1", "mid.block_2"),
    (r"mid_block.attentions.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out.0", "proj_out"),
    (r"conv_norm_out", "norm_out"),
)


def single_file(pipe: Any) -> dict[str, torch.Tensor]:
    """The toy Stable Diffusion as one state dict with the original code's names."""

    def renamed(model: Any, prefix: str, names: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
        out = {}
        for key, value in model.state_dict().items():
            for ours, theirs in names:
                key = re.sub(ours, theirs, key)
            square = prefix == "first_stage_model." and value.ndim == 2  # 1 × 1 convolutions there
            out[prefix + key] = (value[..., None, None] if square else value).clone()
        return out

    text = (r"^(text_model\.)?", "text_model.")
    return {
        **renamed(pipe.unet, "model.diffusion_model.", UNET_NAMES),
        **renamed(pipe.vae, "first_stage_model.", VAE_NAMES),
        **renamed(pipe.text_encoder, "cond_stage_model.transformer.", (text,)),
    }
