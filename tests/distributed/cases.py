"""Every method on a small Llama, or Mixtral, and what training it gives in one process."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import halotune
from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, OFTConfig, PeftModel

METHODS: dict[str, Any] = {
    "hra": HRAConfig(r=4),
    "loha": LoHaConfig(r=2),
    "loha-large": LoHaConfig(r=8),
    "bone": BoneConfig(r=4),
    "bat": BoneConfig(r=4, init_weights="bat"),
    "oft": OFTConfig(r=0, oft_block_size=4),
    "lora": LoraConfig(r=3),
}
WORDS = 37


def llama(seed: int = 0, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "max_position_embeddings": 32,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))  # type: ignore[arg-type]


def mixtral(seed: int = 0, **options: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **heads, **options}))  # type: ignore[arg-type]


def configured(method: str, **options: Any) -> Any:
    options = {"target_modules": "all-linear", "exclude_modules": ["gate"], "task_type": "CAUSAL_LM", **options}
    return replace(copy.deepcopy(METHODS[method.removesuffix("-experts")]), **options)


def adapted(method: str, base: nn.Module | None = None, **options: Any) -> PeftModel:
    """With parameters as if trained for a while, the same on every process. Of "…-experts" the base is a Mixtral."""
    if base is None:
        base = mixtral() if method.endswith("-experts") else llama()
    model = halotune.get_peft_model(base, configured(method, **options))
    return randomized(model)


@torch.no_grad()
def randomized(model: Any, seed: int = 1) -> Any:
    rng = torch.Generator().manual_seed(seed)
    for p in trained(model).values():
        p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, under their plain names."""
    wrappers = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for w in wrappers:
        named = {n.replace(w, ""): p for n, p in named.items()}
    return {n.removeprefix("module."): p for n, p in named.items()}


def batch(rank: int, device: Any = "cpu") -> dict[str, Tensor]:
    """Ranks have batches of different sizes."""
    ids = torch.randint(WORDS, (2 + rank, 5 + 2 * rank), generator=torch.Generator().manual_seed(rank)).to(device)
    return {"input_ids": ids, "labels": ids}


def steps(model: Any, batches: Callable[[int], list[dict[str, Tensor]]], n: int = 2, optimizer: Any = None) -> list[Any]:
    """Loss, clipped gradients' norm and parameters after each of n optimizer steps; gradients are means over the batches."""
    optimizer = optimizer or torch.optim.AdamW(trained(model).values(), lr=0.01)
    found: list[Any] = []
    for step in range(n):
        given = batches(step)
        losses = [model(**b).loss for b in given]
        (torch.stack(losses).mean() if len(losses) > 1 else losses[0]).backward()
        grads = {n: whole(p.grad) for n, p in trained(model).items()}
        norm = whole(torch.nn.utils.clip_grad_norm_(trained(model).values(), 0.1))
        optimizer.step()
        optimizer.zero_grad()
        found.append((torch.stack(losses).detach().cpu(), norm.cpu(), grads))
    return found


def whole(t: Any) -> Any:
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return None if t is None else t.detach().clone().cpu()


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    found, expected = found.detach().cpu(), expected.detach().cpu()
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, where {tuple(expected.shape)} is due"
    error = (found - expected).norm() / expected.norm().clamp_min(1e-8)
    assert error <= tolerance, f"{what}: off by {error:.1e}"


def failures(rank: int, cases: Iterable[tuple[Any, ...]], run: Callable[..., None]) -> dict[tuple[Any, ...], str]:
    """What went wrong in this process, by case. It is printed, too, for the others may wait for this one for ever."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    out = {}
    for case in cases:
        try:
            run(rank, *case)
        except Exception as e:
            out[case] = "".join(traceback.format_exception(e)[-4:])
            print(f"process {rank}:", *case, out[case], file=sys.stderr, flush=True)
        dist.barrier()
    return out
