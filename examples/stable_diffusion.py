"""Adapt the text encoder and the UNet of Stable Diffusion with HRA, LoHa or Bone, on a few images of one subject.

The UNet's `proj_in` and `proj_out` are convolutions, its other targets are linear; one configuration covers both.

python examples/stable_diffusion.py --method loha --images my_dog --prompt "a photo of sks dog" --output my_dog_sd
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from halotune import BoneConfig, BoneModel, HRAConfig, HRAModel, LoHaConfig, LoHaModel

TEXT_ENCODER = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
LOHA = {"r": 8, "lora_alpha": 32, "rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}

# method -> the class of the adapted model, the configurations of the text encoder and of the UNet, the learning rate
METHODS = {
    "hra": (
        HRAModel,
        HRAConfig(r=8, target_modules=TEXT_ENCODER, init_weights=True),
        HRAConfig(r=8, target_modules=UNET, init_weights=True),
        1e-3,
    ),
    "hra-gs": (
        HRAModel,
        HRAConfig(r=8, target_modules=TEXT_ENCODER, init_weights=True, apply_GS=True),
        HRAConfig(r=8, target_modules=UNET, init_weights=True, apply_GS=True),
        1e-3,
    ),
    "loha": (
        LoHaModel,
        LoHaConfig(target_modules=TEXT_ENCODER, **LOHA),
        LoHaConfig(target_modules=UNET, use_effective_conv2d=True, **LOHA),
        5e-4,
    ),
    "bone": (
        BoneModel,
        BoneConfig(r=8, target_modules=TEXT_ENCODER, init_weights=True),
        BoneConfig(r=8, target_modules=UNET, init_weights=True),
        1e-4,
    ),
}


def adapt(pipe: StableDiffusionPipeline, method: str) -> None:
    """Put adapters into the two models of the pipeline that are trained."""
    model_class, text_encoder_config, unet_config, _ = METHODS[method]
    pipe.text_encoder = model_class(pipe.text_encoder, text_encoder_config, "default")
    pipe.unet = model_class(pipe.unet, unet_config, "default")


def encode(pipe: StableDiffusionPipeline, images: list[Image.Image]) -> Tensor:
    """The images as latents `(images, channels, height, width)`, at the size that the UNet was trained for."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pixels = pipe.image_processor.preprocess(images, height=size, width=size).to(pipe.device)
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


def denoising_loss(pipe: StableDiffusionPipeline, latents: Tensor, prompt: str) -> Tensor:
    """The mean squared error of the noise that the UNet sees in latents, noised to random times."""
    noise = torch.randn_like(latents)
    t = torch.randint(pipe.scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    noisy = pipe.scheduler.add_noise(latents, noise, t)
    tokens = pipe.tokenizer([prompt] * len(t), padding="max_length", truncation=True, return_tensors="pt")
    text = pipe.text_encoder(tokens.input_ids.to(latents.device))[0]
    return F.mse_loss(pipe.unet(noisy, t, text).sample, noise)


def train(pipe: StableDiffusionPipeline, latents: Tensor, prompt: str, steps: int, lr: float) -> list[float]:
    """The loss before each step, of four latents at a time."""
    parameters = [p for m in (pipe.text_encoder, pipe.unet) for p in m.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in parameters):,d} numbers are trained")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for step in range(steps):
        loss = denoising_loss(pipe, latents[torch.randint(len(latents), (4,))], prompt)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


def main(
    images: str,
    prompt: str,
    method: str = "hra",
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    output: str = "stable_diffusion_adapted",
    steps: int = 400,
) -> list[float]:
    """The loss before each step. The pipeline written to `output` is a plain one: the adapters are in its weights."""
    pipe = StableDiffusionPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted(f for f in Path(images).iterdir() if f.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})

    adapt(pipe, method)
    latents = encode(pipe, [Image.open(f).convert("RGB") for f in files])
    losses = train(pipe, latents, prompt, steps, lr=METHODS[method][-1])

    pipe.text_encoder = pipe.text_encoder.merge_and_unload()
    pipe.unet = pipe.unet.merge_and_unload()
    pipe.save_pretrained(output)
    pipe(prompt, num_inference_steps=25).images[0].save(Path(output) / "sample.png")
    print(f"written: {output}, and a picture of {prompt!r}: {Path(output) / 'sample.png'}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--images", required=True, help="a folder with a few images of the subject")
    parser.add_argument("--prompt", required=True, help="what they show, with a rare word as the subject's name")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--model", help="a Stable Diffusion pipeline, by its name on the hub or its folder")
    parser.add_argument("--output", help="the folder that the new pipeline goes to")
    parser.add_argument("--steps", type=int)
    main(**vars(parser.parse_args()))
