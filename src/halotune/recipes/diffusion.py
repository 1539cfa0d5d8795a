"""What differs between families of diffusion pipelines, for recipes that train one: text, latents, what is predicted.

A family is told by the pipeline's own class; everything else of a recipe is the same for all.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config, load_single_file_checkpoint
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from safetensors import safe_open
from torch import Tensor, nn

from ..cli.loading import loadable
from ..cli.main import require
from ..core.errors import HalotuneError
from ..engine.files.state_dict import write_tensors
from ..engine.injection.in_place import adapters_in
from ..export.header import METADATA_KEY
from ..export.runtimes import DIFFUSERS_NAME
from .common.config import RunConfig
from .common.model import DTYPES
from .common.run import Run, said
from .pictures import buckets

# Modules by role, as regular expressions over their names; diffusers names them alike in UNets and transformers.
_ATTENTION = r"to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
_GEGLU = r"ff\.net\.0\.proj"
_FEED_FORWARD = r"ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp"
_CONVOLUTIONS = r"conv1|conv2|conv_shortcut|proj_in|proj_out"
TARGETS = {
    "attention": rf"(.*\.)?({_ATTENTION})",
    "geglu": rf"(.*\.)?({_ATTENTION}|{_GEGLU})",
    "feed-forward": rf"(.*\.)?({_ATTENTION}|{_FEED_FORWARD})",
    "convolutions": rf"(.*\.)?({_ATTENTION}|{_FEED_FORWARD}|{_CONVOLUTIONS})",
}
# The attention of CLIP, BERT and T5.
TEXT_TARGETS = r"(.*\.)?(q_proj|k_proj|v_proj|out_proj|query|key|value|SelfAttention\.[qkvo])"

LORAS = {"lora": "diffusers", "kohya": "comfyui"}  # and the program that it is written for

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")  # pickles are read as weights alone (`weights_only=True`)

Text = dict[str, Tensor]


class Noised(NamedTuple):
    """Latents at random times, `(n, c, h, w)`; the times; what the model should answer; the weight of each error, `(n,)`."""

    noisy: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor


class Family:
    """Stable Diffusion 1 and 2: a UNet that predicts the noise, or the velocity."""

    model_name: ClassVar[str] = "unet"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    flow: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.scheduler: Any = self._training_scheduler()

    def _training_scheduler(self) -> Any:
        scheduler = self.pipe.scheduler
        predicted = scheduler.config.get("prediction_type", "epsilon")
        if "beta_schedule" not in scheduler.config or predicted not in ("epsilon", "v_prediction"):
            raise HalotuneError(
                f"{self.pipe.name_or_path}: its {type(scheduler).__name__} (prediction_type {predicted!r}) stands for another "
                "training than this: noise by betas, epsilon or v_prediction predicted. Use a model that was trained so."
            )
        return DDPMScheduler.from_config(scheduler.config)

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.model_name)

    @property
    def divisor(self) -> int:
        """Heights and widths of pictures are multiples of it; diffusers draws none that 8 does not divide, whatever the VAE."""
        return math.lcm(8, self.pipe.vae_scale_factor * 2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def size(self) -> int:
        """The height and width that the model was made for, in pixels."""
        return int(self.model.config.sample_size) * self.pipe.vae_scale_factor

    def sizes(self, resolution: int | None, aspect: bool = False) -> list[tuple[int, int]]:
        """The (height, width) that pictures are brought to, and drawn in.

        Raises:
            HalotuneError: the model cannot draw them.
        """
        found = buckets(resolution or self.size, self.divisor, aspect)
        places = getattr(self.model.config, "pos_embed_max_size", None)  # Stable Diffusion 3's, a side
        if places and max(map(max, found)) > places * self.divisor:
            most, got = places * self.divisor, max(map(max, found))
            raise HalotuneError(f"resolution: this model draws at most {most} pixels a side; got {got}. Use a smaller one.")
        return found

    def text(self, prompt: str, device: torch.device) -> Text:
        """What the model is told of a prompt, each `(1, …)`."""
        return {"encoder_hidden_states": self.pipe.encode_prompt(prompt, device, 1, False)[0]}

    def normalized(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def noised(self, latents: Tensor, min_snr: float | None = None) -> Noised:
        """`√ᾱ_t z + √(1 − ᾱ_t) ε`. The weight is 1, or min(SNR, γ) / SNR, of a velocity min(SNR, γ) / (SNR + 1)."""
        noise = torch.randn_like(latents)
        t = torch.randint(self.scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, t) if velocity else noise
        weight = torch.ones(len(t), device=t.device)
        if min_snr:
            snr = compute_snr(self.scheduler, t)
            weight = snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
        return Noised(self.scheduler.add_noise(latents, noise, t), t, target, weight)

    def predict(self, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.model(noisy.to(self.model.dtype), t, **self._cast(text)).sample

    def _cast(self, text: Text) -> Text:
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in text.items()}


class SDXL(Family):
    text_encoders = ("text_encoder", "text_encoder_2")

    def text(self, prompt: str, device: torch.device) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        """The model is also told the picture's size, that nothing was cut off, and the size wanted."""
        height, width = (n * self.pipe.vae_scale_factor for n in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device).expand(len(noisy), -1)
        own = self._cast(text)
        added = {"text_embeds": own.pop("text_embeds"), "time_ids": sizes.to(self.model.dtype)}
        return self.model(noisy.to(self.model.dtype), t, added_cond_kwargs=added, **own).sample


class SD3(Family):
    """A transformer that predicts the flow from data to noise, `ε − z`, at `(1 − σ) z + σ ε`; σ is logit-normal."""

    model_name = "transformer"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    flow = True

    def _training_scheduler(self) -> Any:
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)

    @property
    def divisor(self) -> int:
        return self.pipe.vae_scale_factor * self.model.config.patch_size

    def text(self, prompt: str, device: torch.device) -> Text:
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompt, prompt, prompt, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def noised(self, latents: Tensor, min_snr: float | None = None) -> Noised:
        noise = torch.randn_like(latents)
        u = compute_density_for_timestep_sampling("logit_normal", len(latents), 0.0, 1.0, device=latents.device)
        steps = self.scheduler.config.num_train_timesteps
        chosen = (u * steps).long().clamp(max=steps - 1).cpu()
        sigma = self.scheduler.sigmas[chosen].to(latents.device).reshape(-1, 1, 1, 1)
        t = self.scheduler.timesteps[chosen].to(latents.device)
        return Noised((1 - sigma) * latents + sigma * noise, t, noise - latents, torch.ones(len(t), device=t.device))

    def predict(self, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.model(hidden_states=noisy.to(self.model.dtype), timestep=t, **self._cast(text)).sample


class Flux(SD3):
    """Its latents go in as a sequence of 2 × 2 patches, with their places; a distilled guidance is told 1."""

    text_encoders = ("text_encoder", "text_encoder_2")

    @property
    def divisor(self) -> int:
        return self.pipe.vae_scale_factor * 2

    @property
    def size(self) -> int:
        return int(self.pipe.default_sample_size) * self.pipe.vae_scale_factor

    def text(self, prompt: str, device: torch.device) -> Text:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, None, device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        n, channels, height, width = noisy.shape
        dtype, device, own = self.model.dtype, noisy.device, self._cast(text)
        packed = self.pipe._pack_latents(noisy.to(dtype), n, channels, height, width)
        found = self.model(
            hidden_states=packed,
            timestep=t / self.scheduler.config.num_train_timesteps,
            guidance=torch.ones(n, device=device) if self.model.config.guidance_embeds else None,
            img_ids=self.pipe._prepare_latent_image_ids(n, height // 2, width // 2, device, dtype),
            txt_ids=torch.zeros(own["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype),
            **own,
        ).sample
        patches = found.reshape(n, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(n, channels, height, width)


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": Family,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": Flux,
}


def family_class(name: str, model: str) -> type[Family]:
    if name not in FAMILIES:
        raise HalotuneError(
            f"{model}: a {name} is of no known type. Use a model of one of {', '.join(FAMILIES)}; any other can be trained "
            "with PipelineAdapters and a loop of your own, as examples/pipeline_adapters.py shows."
        )
    return FAMILIES[name]


def load_family(config: RunConfig) -> Family:
    """The pipeline of a configuration, held as that wants it, in its family."""
    if not sys.stderr.isatty():  # progress bars are for terminals, not for log files
        for package in ("diffusers", "transformers"):
            import_module(f"{package}.utils.logging").disable_progress_bar()
    with loadable("the pipeline", config.model):
        file = single_file(config.model)
        source = _published(file, config) if file else config.model
        stored: Any = DiffusionPipeline.load_config(source, revision=None if file else config.revision)
        name = str(stored.get("_class_name"))
        kind = family_class(name, config.model)
        options: dict[str, Any] = {"dtype": DTYPES[config.precision]}
        if file:
            if config.quant:
                raise HalotuneError(
                    f"quant: a single file is not quantized; got {config.quant!r}. Save it as a pipeline first."
                )
            try:
                pipe = getattr(diffusers, name).from_single_file(str(file), config=source, **options)
            except SingleFileComponentError as e:  # as files without T5
                reason = str(e).partition("\n")[0]
                raise HalotuneError(f"{file}: is no whole {name}: {reason} Give the pipeline's folder or its id.") from e
        else:
            if config.quant:
                options["quantization_config"] = _quantization(config, kind.model_name)
            pipe = DiffusionPipeline.from_pretrained(config.model, revision=config.revision, **options)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return kind(pipe)


def single_file(model: str) -> Path | None:
    """The checkpoint, where a model is one file: of safetensors, rather than the pickle that lies beside it."""
    file = Path(model).expanduser()
    if file.suffix.lower() not in SINGLE_FILES or not file.is_file():
        return None
    safe = file.with_suffix(".safetensors")
    if safe != file and safe.is_file():
        said(f"{safe} is read, not {file.name}, which is a pickle")
        return safe
    return file


def _published(file: Path, config: Any) -> str:
    """Where the configuration of a checkpoint's pipeline is: as said, else as its weights tell."""
    return (
        config.pipeline_config
        or fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    )


def _quantization(config: RunConfig, model_name: str) -> PipelineQuantizationConfig:
    require("quant", ["bitsandbytes"])
    if config.device == "cpu" or not torch.accelerator.is_available():
        raise HalotuneError(f"quant: diffusers quantizes on an accelerator alone; got {config.quant!r}. Leave it out on a CPU.")
    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": DTYPES[config.precision],
    }
    if config.quant == "int8":
        return PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}, [model_name])
    return PipelineQuantizationConfig("bitsandbytes_4bit", four, [model_name])


def draw(family: Family, config: Any, prompt: str, seed: int, device: torch.device) -> Any:
    """A picture; the noise is drawn on the CPU, so that it is the same on every machine."""
    for part in family.pipe.components.values():
        if isinstance(part, nn.Module) and part is not family.model:
            part.to(device)
    size = config.resolution or family.size
    with torch.no_grad():  # and no autocast, in which the decoder of SDXL, which asks for fp32, would overflow in fp16
        return family.pipe(
            prompt,
            height=size,
            width=size,
            num_inference_steps=config.inference_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]


def export(run: Run, family: Family, formats: Sequence[str]) -> None:
    """The adapter as a LoRA of every model that has one, for programs that read nothing else; what they cannot have is said."""
    if not run.writer:
        return
    models = {name: getattr(family.pipe, name) for name in (family.model_name, *family.text_encoders)}
    tuners = {name: tuner for name, model in models.items() if model is not None and (tuner := adapters_in(model))}
    for name in formats:
        file = run.folder / name / DIFFUSERS_NAME
        try:
            with TemporaryDirectory() as scratch:
                parts = {c: Path(scratch) / c for c in tuners}
                reports = {c: tuners[c].export("lora", parts[c], runtime=LORAS[name], component=c) for c in tuners}
                _join([part / DIFFUSERS_NAME for part in parts.values()], file)
        except HalotuneError as e:
            said(f"no {name} was written: {e}")
            run.update(substitutes=[*run.record["substitutes"], f"{name}: not written: {e}"])
            continue
        for component, report in reports.items():
            said(f"{file.parent}: {component}: {report}")


def _join(files: Sequence[Path], to: Path) -> None:
    """LoRAs of several models as one file. A scale is in the header or in alphas: both at once are refused by diffusers."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            tensors |= {key: f.get_tensor(key) for key in f.keys()}
            scales |= json.loads((f.metadata() or {}).get(METADATA_KEY, "{}"))
    with_alphas = any(key.endswith(".alpha") for key in tensors)
    write_tensors(tensors, to, {} if with_alphas else {METADATA_KEY: json.dumps(scales)})
