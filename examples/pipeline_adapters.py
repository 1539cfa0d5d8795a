"""An adapter for a whole Stable Diffusion pipeline: trained in the UNet and the text encoder, saved, and painted with.

The pipeline stays what it is: its models are changed in place, and diffusers' own methods go on working.

python examples/pipeline_adapters.py --images my_dog --prompt "a photo of sks dog" --output my_dog
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from halotune import HRAConfig, LoHaConfig
from halotune.integrations.diffusers import PipelineAdapters


def train(pipe: StableDiffusionPipeline, images: list[Image.Image], prompt: str, steps: int) -> list[float]:
    """Put an adapter into the pipeline and train it on the images; the loss before each step."""
    adapters = PipelineAdapters(pipe)
    adapters.add({"unet": HRAConfig(r=8), "text_encoder": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"])}, name="subject")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3, weight_decay=0.0)

    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pixels = pipe.image_processor.preprocess(images, height=size, width=size).to(pipe.device)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    tokens = pipe.tokenizer([prompt] * len(images), padding="max_length", truncation=True, return_tensors="pt")

    losses = []
    for _ in range(steps):
        noise = torch.randn_like(latents)
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
        text = pipe.text_encoder(tokens.input_ids.to(latents.device))[0]
        found = pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, text).sample
        loss = F.mse_loss(found, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def paint(pipe: StableDiffusionPipeline, folder: Path, prompt: str, inference_steps: int) -> None:
    """Load the adapter into another pipeline, and paint with it at several scales, always from the same noise."""
    adapters = PipelineAdapters(pipe)
    adapters.load(folder)
    for scale in (0.0, 0.5, 1.0):
        adapters.set("subject", scale)
        picture = pipe(prompt, num_inference_steps=inference_steps, generator=torch.Generator().manual_seed(0)).images[0]
        picture.save(folder / f"scale-{scale}.png")
    adapters.fuse()  # as fast as without adapters; unfuse() restores the weights bit for bit
    pipe.save_pretrained(folder / "fused")  # a plain pipeline
    adapters.unfuse()


def main(
    images: str,
    prompt: str,
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    output: str = "subject_adapter",
    steps: int = 400,
    inference_steps: int = 25,
) -> list[float]:
    """The loss before each step. `output` holds the adapter, a picture for each scale, and a pipeline with it fused."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = sorted(f for f in Path(images).iterdir() if f.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
    pipe = StableDiffusionPipeline.from_pretrained(model).to(device)
    losses = train(pipe, [Image.open(f).convert("RGB") for f in files], prompt, steps)
    PipelineAdapters(pipe).save(output)
    paint(StableDiffusionPipeline.from_pretrained(model).to(device), Path(output), prompt, inference_steps)
    print(f"written: {output}; the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--images", required=True, help="a folder with a few images of the subject")
    parser.add_argument("--prompt", required=True, help="what they show, with a rare word as the subject's name")
    parser.add_argument("--model", help="a Stable Diffusion pipeline, by its name on the hub or its folder")
    parser.add_argument("--output", help="the folder that the adapter goes to")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--inference-steps", type=int)
    main(**vars(parser.parse_args()))
