"""Toy experts of every kind that transformers' interface knows; their eager forward is what tests compare with."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from halotune import PeftModel
from halotune.core.experts import AdaptedExperts

EXPERTS, HIDDEN, INNER = 5, 15, 21
KINDS: dict[str, dict[str, bool]] = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "no-gate": {"has_gate": False},
    "norm": {"has_post_expert_norm": True},
}


class Experts(nn.Module):
    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        flags = KINDS[kind]
        n_up = INNER * (2 if flags.get("has_gate", True) else 1)
        self.num_experts, self.flags = EXPERTS, flags
        self.up = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
        for name, n_out, n_in in ((self.up, n_up, HIDDEN), ("down_proj", HIDDEN, INNER)):
            size = (n_in, n_out) if flags.get("is_transposed") else (n_out, n_in)
            self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *size) * n_in**-0.5))
            if flags.get("has_bias"):
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, n_out) * 0.1))
        self.act_fn = nn.SiLU()
        if flags.get("has_post_expert_norm"):
            self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def apply_gate(self, x: Tensor) -> Tensor:
        gate, up = (x[..., ::2], x[..., 1::2]) if self.flags.get("is_concatenated") is False else x.chunk(2, -1)
        return self.act_fn(gate) * up

    def project(self, name: str, e: int, x: Tensor) -> Tensor:
        W = getattr(self, name)[e]
        bias = getattr(self, f"{name}_bias")[e] if self.flags.get("has_bias") else None
        return F.linear(x, W.t() if self.flags.get("is_transposed") else W, bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(EXPERTS):
            token, place = torch.where(top_k_index == e)
            x = self.project(self.up, e, hidden_states[token])
            y = self.project("down_proj", e, self.apply_gate(x) if self.flags.get("has_gate", True) else self.act_fn(x))
            if self.flags.get("has_post_expert_norm"):
                y = self.post_expert_norm(y)
            out = out.index_add(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out


def _kind(name: str) -> type[nn.Module]:
    made = type(f"{name.title().replace('-', '')}Experts", (Experts,), {"_apply_gate": Experts.apply_gate, "kind": name})
    forward = Experts.forward  # the interface replaces that of the class itself

    def init(self: Any, config: Any) -> None:
        Experts.__init__(self, config, name)

    made.__init__ = init  # type: ignore[method-assign]
    made.forward = forward
    return use_experts_implementation(made, **KINDS[name])


CLASSES = {name: _kind(name) for name in KINDS}


class Block(nn.Module):
    """A router, experts, and a linear layer."""

    def __init__(self, kind: str = "plain", top_k: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy", _experts_implementation="eager")
        self.top_k = top_k
        self.router = Router()
        self.experts = CLASSES[kind](self.config)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).topk(self.top_k, -1)
        return self.out(x + self.experts(rows, index, weights).view_as(x))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


def block(kind: str = "plain", dtype: torch.dtype = torch.float64, **kwargs: Any) -> Block:
    return Block(kind, **kwargs).to(dtype).eval()


def sample(tokens: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, tokens, HIDDEN, dtype=dtype)


def on_experts(config: Any, **kwargs: Any) -> Any:
    """A configuration of the same method, for both weights of the experts alone."""
    config = copy.deepcopy(config)
    config.target_modules = None
    config.target_parameters = {"experts.gate_up_proj", "experts.down_proj"}
    vars(config).update(kwargs)
    return config


def named(kind: str, config: Any) -> Any:
    """The configuration for the names that experts of this kind have."""
    config.target_parameters = {
        f"experts.{n}" for n in ("gate_up_proj" if KINDS[kind].get("has_gate", True) else "up_proj", "down_proj")
    }
    return config


@torch.no_grad()
def shake(model: nn.Module, std: float = 0.2) -> None:
    """Away from the start."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * std)


def dense(model: PeftModel, x: Tensor) -> Tensor:
    """The model with W' of every adapter in the place of the weights of its experts, by way of their eager forward."""
    base: Any = model.get_base_model()
    holder = next(m for m in base.modules() if isinstance(m, AdaptedExperts))
    weights = {}
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        layer: Any = holder._modules.get(name)
        if layer is not None:
            W = layer.base.weight()
            for n in layer.active_adapters if layer.enabled else ():
                W = torch.lerp(W, layer.adapters[n].weight(W), layer.scales[n])
            weights[name] = layer.base.stored(W)
    rows = x.reshape(-1, HIDDEN)
    routing, index = base.router(rows).topk(base.top_k, -1)
    own = holder.base_layer
    config, own.config = own.config, SimpleNamespace(_experts_implementation="eager")
    try:
        y = torch.func.functional_call(own, weights, (rows, index, routing))
    finally:
        own.config = config
    return base.out(x + y.view_as(x))
