"""What the tests of both image recipes share: crops of scikit-learn's photograph of a flower, and options at toy size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file


def toy_options(root: Path, output: Path, **also: Any) -> dict[str, Any]:
    """Fields of a run that takes a second, on the Stable Diffusion below `root`."""
    values: dict[str, Any] = {
        "model": str(root / "sd" / "pipeline"),
        "resolution": 16,
        "cache": str(root / "cache"),
        "max_steps": 4,
        "inference_steps": 2,
        "log_every": 1,
        "device": "cpu",
        "tracker": "none",
        "adapter": {"r": 4},
        "output": str(output),
    }
    return values | also


def flags(values: dict[str, Any]) -> list[str]:
    """The same, as a user types them."""
    return [*(f"--{k.replace('_', '-')}={v}" for k, v in values.items() if k != "adapter"), "--r=4"]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """What a run has trained in the UNet."""
    return load_file(run / "adapter" / "unet" / "adapter_model.safetensors")


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
