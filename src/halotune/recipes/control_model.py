"""A pipeline that is led by a hint, such as edges: an encoder of hints beside the UNet, and the call that uses it.

    controlled = load_control(pipe, "runs/edges/adapter")
    controlled("a teapot", hint).images[0]

The encoder's output is added once, after the UNet's first convolution; the UNet's own layers have the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..cli.loading import loadable
from ..core.errors import HalotuneError
from ..core.generators import forked_generators
from ..integrations.diffusers import PipelineAdapters
from .pictures import pixels

ENCODER = "control_encoder"  # its folder, beside those of the adapted models
WIDTHS = (16, 16, 32, 32, 96, 96, 256)
STRIDED = (2, 4, 6, 1, 3, 5)  # which convolutions halve the size: the first three are those of Stable Diffusion


class ControlEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Hints in [0, 1], `(n, 3, h, w)` -> `(n, width, h / factor, w / factor)`.

    Eight 3 × 3 convolutions with SiLU between them; the last is zero at first, so that training starts at the base.

    Args:
        width: of the UNet's first convolution.
        factor: of the VAE, a power of 2.
        control: what the hints are: canny, landmark, segm or depth.
    """

    @register_to_config
    def __init__(self, width: int, factor: int = 8, control: str = "canny") -> None:
        super().__init__()
        halvings = factor.bit_length() - 1
        if factor != 2**halvings or halvings > len(STRIDED):
            raise HalotuneError(f"the VAE's factor must be a power of 2 up to {2 ** len(STRIDED)}; got {factor}. Use another.")
        channels = (3, *WIDTHS, width)
        strides = [2 if i in STRIDED[:halvings] else 1 for i in range(8)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in zip(channels, channels[1:], strides, strict=False)
        )
        nn.init.zeros_(self.convolutions[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.convolutions[-1].bias)  # type: ignore[arg-type]

    def forward(self, hint: Tensor) -> Tensor:
        *first, last = self.convolutions
        for convolution in first:
            hint = F.silu(convolution(hint))
        return last(hint)


class Controlled:
    """A pipeline with a UNet, and an encoder of hints.

    Attributes:
        pipe: the diffusers pipeline, whose UNet it hooks.
        encoder: a `ControlEncoder`.
    """

    def __init__(self, pipe: Any, encoder: ControlEncoder) -> None:
        self.pipe, self.encoder = pipe, encoder
        self._added: Tensor | None = None
        self._hook = pipe.unet.conv_in.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """With guidance the batch is the prompts' half behind the empty prompts': both have the hints."""
        if self._added is None:
            return output
        return output + self._added.to(output.dtype).repeat(len(output) // len(self._added), 1, 1, 1)

    def remove(self) -> None:
        """The pipeline is as it was."""
        self._hook.remove()

    @contextmanager
    def adding(self, encoded: Tensor | None) -> Iterator[None]:
        """Inside, the UNet has what the encoder made of the hints; None for none."""
        usual, self._added = self._added, encoded
        try:
            yield
        finally:
            self._added = usual

    def __call__(
        self,
        prompt: str | list[str],
        hint: Image.Image | list[Image.Image] | None,
        conditioning_scale: float = 1.0,
        **also: Any,
    ) -> Any:
        """What the pipeline returns.

        Args:
            hint: of the pictures' own size, one for each prompt; None for none.
            conditioning_scale: of what the hints add: 0 is none, 1 as trained.
            also: what the pipeline takes: `num_inference_steps`, `guidance_scale`, `generator` …
        """
        if hint is None:
            return self.pipe(prompt, **also)
        hints = [hint] if isinstance(hint, Image.Image) else hint
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if len({h.size for h in hints}) != 1 or len(hints) != len(prompts):
            sizes = ", ".join(sorted({f"{h.width} × {h.height}" for h in hints}))
            raise HalotuneError(f"{len(prompts)} prompts, {len(hints)} hints of {sizes}. Give one for each, all of one size.")
        width, height = hints[0].size
        parameter = next(self.encoder.parameters())
        x = torch.cat([(pixels(h.convert("RGB")) + 1) / 2 for h in hints]).to(parameter.device, parameter.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            encoded = self.encoder(x) * conditioning_scale
        with self.adding(encoded):
            return self.pipe(prompt, height=height, width=width, **also)


def new_control(pipe: Any, control: str, seed: int = 0) -> Controlled:
    """A pipeline with an encoder that is not trained yet, and a DDIM scheduler.

    Args:
        seed: of the encoder's first weights, which are the same whatever adapter is trained beside them.

    Raises:
        HalotuneError: the pipeline has no UNet.
    """
    if not hasattr(getattr(pipe, "unet", None), "conv_in"):
        raise HalotuneError(
            f"a {type(pipe).__name__} has no UNet, whose first convolution a hint is added to. Use one of Stable Diffusion "
            "1, 2 or XL."
        )
    width = pipe.unet.config.block_out_channels[0]
    with forked_generators("cpu"):
        torch.default_generator.manual_seed(seed)
        encoder = ControlEncoder(width, pipe.vae_scale_factor, control)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return Controlled(pipe, encoder)


def load_control(pipe: Any, folder: str | Path, *, ddim: bool = True) -> Controlled:
    """A run's adapter and its encoder of hints, on a pipeline of the base that they were trained on.

    Args:
        folder: the run's `adapter/`.
        ddim: give the pipeline a DDIM scheduler, as the paper has; else it keeps its own.

    Raises:
        HalotuneError: there is no encoder, or it does not fit the pipeline.
    """
    folder = Path(folder)
    if not (folder / ENCODER).is_dir():
        raise HalotuneError(f"{folder}: holds no {ENCODER}/. Give the adapter/ of a run of `halotune train control`.")
    with loadable("the control encoder", str(folder / ENCODER)):
        encoder = ControlEncoder.from_pretrained(folder / ENCODER, low_cpu_mem_usage=False)
    assert isinstance(encoder, ControlEncoder)
    unet = getattr(pipe, "unet", None)
    own: Any = encoder.config
    width = unet.config.block_out_channels[0] if unet is not None else None
    if own.width != width or own.factor != pipe.vae_scale_factor:
        raise HalotuneError(
            f"{folder}: its encoder is for a UNet of width {own.width} and a VAE of factor {own.factor}; "
            f"this {type(pipe).__name__} has {width} and {pipe.vae_scale_factor}. Use the base that it was trained on."
        )
    PipelineAdapters(pipe).load(folder)
    if ddim:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    encoder.to(unet.device).eval().requires_grad_(False)  # type: ignore[union-attr]
    return Controlled(pipe, encoder)
