"""Pipelines whose models are away while they do not run: accelerate's hooks and diffusers' group offloading.

On a CPU alone the hooks run as they are, with the CPU as the device that weights are brought to; that they come to
another device is tested on one (`-m gpu`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from halotune import HalotuneError
from halotune.engine.injection.modules import adapted_layers
from halotune.integrations.diffusers import PipelineAdapters

from .pipelines import CONFIGS, CONVOLUTIONS, add, differ, image, load, near, randomize

Offload = Callable[[Any, str], None]


def sequentially(pipe: Any, device: str) -> None:
    """What `enable_sequential_cpu_offload` does, which itself fails on the CPU, with adapters or without."""
    if device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
        return
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        cpu_offload(model, torch.device(device), offload_buffers=len(model._parameters) > 0)


def by_model(pipe: Any, device: str) -> None:
    pipe.enable_model_cpu_offload(device=device)


def by_group(pipe: Any, device: str, kind: str, stream: bool = False) -> None:
    from diffusers.hooks import apply_group_offloading

    blocks = 1 if kind == "block_level" else None
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        apply_group_offloading(model, torch.device(device), offload_type=kind, num_blocks_per_group=blocks, use_stream=stream)


OFFLOADS: dict[str, Offload] = {
    "sequentially": sequentially,
    "by model": by_model,
    "by leaf": partial(by_group, kind="leaf_level"),
    "by block": partial(by_group, kind="block_level"),
}
STREAMS: dict[str, Offload] = {
    "by leaf, prefetched": partial(by_group, kind="leaf_level", stream=True),
    "by block, prefetched": partial(by_group, kind="block_level", stream=True),
}

both_orders = pytest.mark.parametrize("first", ["adapters", "offload"])


def follow_a_life(pipe: Any, offload: Offload, device: str, first: str, saved: Path, method: str, same: Any) -> None:
    """Everything that a pipeline does with its adapters, offloaded; against one that is all there."""
    there = load(pipe.name_or_path).to(device)
    base = image(there)
    unet = copy.copy(CONFIGS[method])
    unet.target_modules = set(CONVOLUTIONS)
    add(there, unet=unet, text_encoder=CONFIGS[method]).save(saved)
    full = image(there)
    assert differ(full, base)

    adapters = PipelineAdapters(pipe)
    if first == "offload":
        offload(pipe, device)
    adapters.load(saved)
    if first == "adapters":
        offload(pipe, device)
    assert same(image(pipe), full)
    adapters.set("dog", 0.5)
    assert differ(image(pipe), full)
    adapters.set("dog", 0)
    assert same(image(pipe), base)
    adapters.set("dog")
    reports = adapters.fuse()
    assert reports["unet"].total().delta > 0 and same(image(pipe), full)
    adapters.unfuse()
    assert same(image(pipe), full)
    with adapters.disabled():
        assert same(image(pipe), base)

    adapters.save(saved / "again")
    add(pipe, "style", unet=CONFIGS["bat"])  # layers are put in, and taken out, while it is offloaded
    adapters.set(["dog", "style"], [1.0, 0.5])
    together = image(pipe)
    assert differ(together, full)
    adapters.delete("style")
    assert same(image(pipe), full)
    adapters.unload()
    assert same(image(pipe), base)
    adapters.load(saved / "again")
    assert same(image(pipe), full)


@both_orders
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded(pipe: Any, tmp_path: Path, how: str, first: str):
    follow_a_life(pipe, OFFLOADS[how], "cpu", first, tmp_path, "hra", near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_orders
@pytest.mark.parametrize("method", ["hra", "loha", "bat"])
@pytest.mark.parametrize("how", OFFLOADS | STREAMS)
def test_offloaded_from_a_gpu(pipe: Any, tmp_path: Path, how: str, method: str, first: str):
    follow_a_life(pipe, (OFFLOADS | STREAMS)[how], "cuda", first, tmp_path, method, partial(torch.allclose, atol=2e-3))


def test_parameters_that_move_when_the_model_is_called(pipe: Any):
    """Hooks that bring a whole model run after those of torch: what is derived before would be of other parameters."""
    import accelerate.hooks

    class CpuOffload(accelerate.hooks.CpuOffload):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for layer in adapted_layers(module).values():
                layer.adapters["dog"].load_state_dict(other[layer.name])
            return super().pre_forward(module, *args, **kwargs)

    adapters = add(pipe, unet=CONFIGS["hra"])
    full, other = image(pipe), {}
    for path, layer in adapted_layers(pipe.unet).items():
        layer.name, other[path] = path, copy.deepcopy(layer.adapters["dog"].state_dict())
    randomize(pipe.unet, "dog")
    assert differ(image(pipe), full)
    accelerate.hooks.add_hook_to_module(pipe.unet, CpuOffload("cpu"))
    pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 32))
    randomize(pipe.unet, "dog")
    assert torch.equal(image(pipe), full) and adapters.active == ["dog"]


@both_orders
def test_adapters_stay_where_they_run(pipe: Any, first: str, tmp_path: Path):
    """Offloading one layer at a time is not for them: they are small, and a merge or a file reads them at any time."""
    adapters = add(pipe)
    adapters.save(tmp_path / "before")
    if first == "offload":
        adapters.unload()
        sequentially(pipe, "cpu")
        adapters.load(tmp_path / "before")
    else:
        sequentially(pipe, "cpu")
    adapters.save(tmp_path / "after")  # before any call
    weights = [tmp_path / when / "unet" / "adapter_model.safetensors" for when in ("before", "after")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for layer in adapted_layers(pipe.unet).values():
        assert layer.base_layer.weight.is_meta and not any(p.is_meta for p in layer.adapters.parameters())


def test_offloaded_while_fused(pipe: Any):
    adapters = add(pipe)
    full = image(pipe)
    adapters.fuse()
    sequentially(pipe, "cpu")
    adapters.unfuse()
    assert near(image(pipe), full)
    adapters.fuse()
    fused = image(pipe)
    pipe.remove_all_hooks()
    assert near(image(pipe), fused)
    adapters.unfuse()
    assert near(image(pipe), full) and not any(p.is_meta for p in pipe.unet.parameters())


def test_one_way_of_offloading_after_another(pipe: Any, base: Tensor):
    """A layer's hook is not the adapted layer's: removing hooks meets each once."""
    adapters = add(pipe)
    full = image(pipe)
    for offload in (sequentially, by_model, sequentially):
        offload(pipe, "cpu")
        assert near(image(pipe), full)
        pipe.remove_all_hooks()
        assert near(image(pipe), full)
    adapters.unload()
    assert near(image(pipe), base)


def test_weights_in_files_cannot_be_changed(pipe: Any, tmp_path: Path):
    adapters = add(pipe)
    full = image(pipe)
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert near(image(pipe), full)
    add_one = partial(adapters.add, {"unet": CONFIGS["hra"]}, "style")
    for change in (adapters.fuse, adapters.unfuse, adapters.unload, partial(adapters.delete, "dog"), add_one):
        with pytest.raises(HalotuneError, match="group offloading keeps the weights of the UNet2DConditionModel in files"):
            change()
        assert near(image(pipe), full)
