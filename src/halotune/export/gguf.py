"""A LoRA as a GGUF file, which llama.cpp loads as it is: what its `convert_lora_to_gguf.py` writes, without that script.

Names come from the tables of llama.cpp's own package `gguf`. Where the conversion of a base changes its weights, the LoRA's
change with them: of the architectures here it is the rows of q and k, from the order in which transformers rotates them (two
halves of a head) to llama.cpp's (neighbours).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from ..core.files import write_atomically

GGUF_NAME = "adapter_model.gguf"

# Class in transformers -> the architecture in llama.cpp. Others cut, join or reorder weights in ways that are not known here.
_PERMUTED = {
    "ArceeForCausalLM": "arcee",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "OlmoForCausalLM": "olmo",
    "SmolLM3ForCausalLM": "smollm3",
}
ARCHITECTURES = {
    **_PERMUTED,
    "ApertusForCausalLM": "apertus",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "command-r",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "HunYuanDenseV1ForCausalLM": "hunyuan-dense",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen2VLForConditionalGeneration": "qwen2vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2vl",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3VLForConditionalGeneration": "qwen3vl",
    "SeedOssForCausalLM": "seed_oss",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def gguf_lora(tensors: Mapping[str, Tensor], base: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors under llama.cpp's names, and the architecture.

    Args:
        tensors: a LoRA's, under PEFT's keys.
        base: the base model, of transformers.

    Raises:
        HalotuneError: an architecture, or a module, that is not known.
    """
    gguf, model_class = _gguf(), type(base).__name__
    name = ARCHITECTURES.get(model_class)
    architecture = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}.get(name)
    if architecture is None:
        raise HalotuneError(
            f"gguf: how llama.cpp converts a {model_class} is not known here; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Export without gguf (--gguf), and convert the folder with llama.cpp's convert_lora_to_gguf.py."
        )
    config: Any = base.config.get_text_config()  # type: ignore[operator,union-attr]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()  # type: ignore[union-attr]
        theirs = names.get_name(path.replace("language_model.", "") + ".weight", try_suffixes=(".weight",))
        if theirs is None:
            raise HalotuneError(f"gguf: llama.cpp's {name} has no {path}. Leave it out when training, or merge the adapter.")
        leaf = path.rpartition(".")[2]
        if factor == "B" and model_class in _PERMUTED and leaf in heads:
            tensor = _rotated_as_neighbours(tensor, heads[leaf])
        out[f"{theirs}.lora_{factor.lower()}"] = tensor
    return out, str(name)


def _rotated_as_neighbours(B: Tensor, heads: int) -> Tensor:
    """Rows (heads · 2 · d/2, r), of which the i-th of both halves are rotated together, as (heads · d/2 · 2, r)."""
    return B.reshape(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


def write_gguf(tensors: Mapping[str, Tensor], architecture: str, alpha: float, file: Path) -> None:
    """Write the file, atomically; fp64 as fp32, which GGUF has instead."""
    gguf = _gguf()

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, t in tensors.items():
            if t.dtype == torch.bfloat16:  # numpy has none
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(name, gguf.quants.quantize(t.float().numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, (t.float() if t.dtype == torch.float64 else t).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(file, write)


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise HalotuneError('gguf: needs the package gguf. Install it with: pip install "halotune[gguf]"') from None
