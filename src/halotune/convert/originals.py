"""The names that layers of diffusion models have in their authors' own code, which kohya's scripts write.

sd-scripts trains SDXL in Stability's code (`input_blocks.4.1 …`) and FLUX in Black Forest Labs'
(`double_blocks.0.img_attn.qkv`), while diffusers names the same layers `down_blocks.1.attentions.0 …` and
`transformer_blocks.0.attn.to_q`. The rules here go from the diffusers names of a model at hand to the originals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..export.components import Component


@dataclass(frozen=True)
class Part:
    """A layer here, and the rows that it has of the original's output: ranges, in order; None is all."""

    path: str
    rows: tuple[tuple[int, int], ...] | None = None


def original_names(class_name: str, outputs: Mapping[str, int]) -> dict[str, list[Part]]:
    """Original name -> the layers here that it consists of; empty for models whose own names are the originals.

    Args:
        class_name: of the model, as in diffusers or transformers.
        outputs: path -> number of outputs, of the model's layers.
    """
    if class_name == "UNet2DConditionModel":
        return _unet(outputs)
    if class_name == "FluxTransformer2DModel":
        return _flux(outputs)
    stored = {Component("text_encoder", class_name).stored(path): path for path in outputs}
    return {name: [Part(path)] for name, path in stored.items() if name != path}


# -- Stable Diffusion's UNet

_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _unet(outputs: Mapping[str, int]) -> dict[str, list[Part]]:
    """Blocks are one flat list there: in each half `layers_per_block` layers and a change of size make one block here."""
    found = (re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path) for path in outputs)
    layers = [(m.string, m[1], int(m[2] or 0), m[3], int(m[4]), m[5]) for m in found if m]
    per_block = max((j for _, half, _, kind, j, _ in layers if (half, kind) == ("down", "resnets")), default=0) + 1
    attending = {b for _, half, b, kind, _, _ in layers if (half, kind) == ("up", "attentions")}
    names = {_UNET_TOP[path]: path for path in outputs if path in _UNET_TOP}
    for path, half, b, kind, j, rest in layers:
        if kind in ("downsamplers", "upsamplers"):
            j = per_block
        if half == "mid":
            place = f"middle_block.{2 * j + (kind == 'attentions')}"
        else:
            slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if b in attending else 1}[kind]
            index = (per_block + 1) * b + j + (half == "down")
            place = f"{'input' if half == 'down' else 'output'}_blocks.{index}.{slot}"
        leaf = {"resnets": _RESNET.get(rest, rest), "downsamplers": "op"}.get(kind, rest)
        names[f"{place}.{leaf}"] = path
    return {name: [Part(path)] for name, path in names.items()}


# -- FLUX: original -> the layers whose outputs it stacks

_FLUX_TOP = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.linear": ["proj_out"],
}
_FLUX_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
_FLUX_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}


def _flux(outputs: Mapping[str, int]) -> dict[str, list[Part]]:
    names = dict(_FLUX_TOP)
    for theirs, ours, table in (
        ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
        ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    ):
        for i in dict.fromkeys(path.split(".")[1] for path in outputs if path.startswith(f"{ours}.")):
            names.update({f"{theirs}.{i}.{name}": [f"{ours}.{i}.{p}" for p in paths] for name, paths in table.items()})
    out = {name: _stacked(paths, outputs) for name, paths in names.items() if all(p in outputs for p in paths)}
    if "norm_out.linear" in outputs:  # shift and scale are in the other order here
        n = outputs["norm_out.linear"]
        out["final_layer.adaLN_modulation.1"] = [Part("norm_out.linear", ((n // 2, n), (0, n // 2)))]
    return out


def _stacked(paths: list[str], outputs: Mapping[str, int]) -> list[Part]:
    if len(paths) == 1:
        return [Part(paths[0])]
    ends = [sum(outputs[p] for p in paths[: i + 1]) for i in range(len(paths))]
    return [Part(p, ((end - outputs[p], end),)) for p, end in zip(paths, ends, strict=True)]
