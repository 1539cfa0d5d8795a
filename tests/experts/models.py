"""Every model file of transformers that uses its experts interface, at toy size: adapters on the experts are right, or the file
is listed with the reason why it does not build.

    python -m tests.experts.models [--write docs/experts-models.md] [NAME …]

Each module of experts is compared with its own eager forward run with the adapted weights, and its model, where it builds from
a shrunk configuration, with itself after merging.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import halotune
from halotune.core.experts import AdaptedExperts, projection_names
from halotune.engine.injection.modules import adapted_layers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_num_experts_per_token": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "moe_layer_start_index": 0,
    "num_dense_layers": 0,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "num_global_key_value_heads": 2,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "patch_size": 4,
    "image_size": 16,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "out_hidden_size": 32,
}
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "routed_experts")
INNER = re.compile(r"(.*_)?(intermediate|ffn_hidden)_(size|dim)$")
IDS = re.compile(r".*_token_(id|index)$|.*_token_index$")


class Result(NamedTuple):
    """Of one class of experts."""

    flags: str
    experts: str  # "right", or what is wrong
    model: str


def files() -> list[str]:
    """The names of the models whose files use the interface."""
    import transformers.models as models

    out = []
    for module in pkgutil.iter_modules(models.__path__):
        folder = Path(models.__path__[0]) / module.name
        if any("@use_experts_implementation" in f.read_text(encoding="utf-8") for f in folder.glob("modeling_*.py")):
            out.append(module.name)
    return out


# What the defaults leave open, and a toy needs.
GIVEN: dict[str, dict[str, Any]] = {
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "FlintConfig": {"mlp_only_layers": []},
    "NemotronHConfig": {"layers_block_type": ["attention", "moe"]},
    "Ernie4_5_VLMoeTextConfig": {"moe_num_experts": 4, "moe_intermediate_size": [48, 24]},
    "Dots1Config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 48},
    "Gemma4TextConfig": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "DiffusionGemmaTextConfig": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "HunYuanMoEV1Config": {"head_dim": 8, "moe_topk": 2},
    "Lfm2MoeConfig": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
}
# Their own gates compute in float32.
ROUNDED = {"beam", "inkling2", "openai_privacy_filter"}
# Linear layers that do more than a product, which "all-linear" asks to be left out.
LEFT_OUT = {"deepseek_v4": ["o_a_proj"], "jamba": ["dt_proj"]}


def toy(kind: type) -> Any:
    """A configuration with every size that is known by name made small; what follows from these follows anew."""
    default = kind()
    given = {**_small(default), **GIVEN.get(kind.__name__, {})}
    try:
        return kind(**given)
    except Exception:  # it takes other arguments than it keeps
        for name, value in given.items():
            setattr(default, name, value)
        return default


def _small(config: Any, layers: int = 2) -> dict[str, Any]:
    out: dict[str, Any] = {}
    latent = {"num_key_value_heads": 4} if "kv_lora_rank" in vars(config) else {}  # its keys are of all heads
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            out[name] = toy(type(value))
        elif isinstance(value, bool):
            continue
        elif name in EXPERTS and value:
            out[name] = 4
        elif name in SIZES and isinstance(value, int):
            out[name] = latent.get(name, SIZES[name])
        elif INNER.match(name) and isinstance(value, int):
            out[name] = 48
        elif IDS.match(name) and isinstance(value, int) and value > 95:
            out[name] = 95
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern") and value:
            out[name] = value[-layers:] if isinstance(value, str) else _varied(list(value), layers)
    return out


def _varied(kinds: list[str], n: int) -> list[str]:
    """One of each of the last kinds, of which one runs experts, and one attends."""
    known = sorted(dict.fromkeys(reversed(kinds)), key=lambda kind: "attention" not in kind)
    out = (known * n)[:n] if "moe" not in known else ["moe", *[k for k in known if k != "moe"]][:n]
    return ["sparse"] * n if "sparse" in known else out


def config_classes(module: types.ModuleType, cls: type) -> list[Any]:
    """The configurations of a model file, the one first that a class of experts says it takes."""
    folder = module.__name__.rpartition(".")[0]
    name = module.__name__.rpartition(".modeling_")[2]
    inner = importlib.import_module(f"{folder}.configuration_{name}")
    hint = inspect.signature(inspect.unwrap(cls.__init__)).parameters.get("config")
    wanted = getattr(hint, "annotation", None)
    wanted = getattr(inner, wanted, None) if isinstance(wanted, str) else wanted
    first = [wanted] if inspect.isclass(wanted) and hasattr(wanted, "to_dict") else []
    kinds = [c for c in vars(inner).values() if inspect.isclass(c) and hasattr(c, "to_dict")]
    return first + [c for c in kinds if c.__module__ == inner.__name__]


def experts_of(module: types.ModuleType) -> list[type[nn.Module]]:
    """The classes of a file that the interface wraps."""
    text = inspect.getsource(module)
    names = re.findall(r"@use_experts_implementation.*\nclass (\w+)\(", text)
    return [getattr(module, n) for n in names]


def build(module: types.ModuleType, cls: type[nn.Module]) -> nn.Module:
    """A module of toy experts in float64, with random weights."""
    problem: Exception | None = None
    for kind in config_classes(module, cls):
        try:
            config = toy(kind)
            config._experts_implementation = "eager"
            sized = "intermediate_size" in inspect.signature(inspect.unwrap(cls.__init__)).parameters
            experts = cls(config, *([48] if sized else [])).double()
        except Exception as e:  # another configuration of the file may be the one
            problem = problem or e
            continue
        for p in experts.parameters():
            nn.init.normal_(p, std=0.3)
        if projection_names(experts):
            return experts
    raise problem or RuntimeError("no configuration of the file makes it")


def configs(shared: bool) -> dict[str, halotune.PeftConfig]:
    """One small adapter of every kind."""
    common: dict[str, Any] = {"target_parameters": ["gate_up_proj", "up_proj", "down_proj"], "expert_sharing": shared}
    return {
        "HRA": halotune.HRAConfig(r=4, **common),
        "LoHa": halotune.LoHaConfig(r=2, **common),
        "LoHa r12": halotune.LoHaConfig(r=12, **common),
        "Bone": halotune.BoneConfig(r=5, **common),
        "BAT": halotune.BoneConfig(r=8, init_weights="bat", **common),
        "OFT": halotune.OFTConfig(oft_block_size=8, **common),
        "LoRA": halotune.LoraConfig(r=4, **common),
    }


class Holder(nn.Module):
    """Experts in a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def adapted(model: nn.Module, config: Any, std: float = 0.2) -> halotune.PeftModel:
    """With the adapter away from its start."""
    config = copy.copy(config)
    names = {n.rpartition(".")[2] for n, _ in model.named_parameters()}
    config.target_parameters = {n for n in config.target_parameters if n in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = halotune.get_peft_model(model, config)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * std)
    return wrapped


def routed(experts: nn.Module, tokens: int = 9, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """An input of the experts: tokens, their experts and weights."""
    hidden = _hidden(experts)
    n = experts.get_parameter("down_proj").shape[0]
    index = torch.rand(tokens, n).argsort(-1)[:, :k]
    return torch.randn(tokens, hidden).double(), index, torch.rand(tokens, k).double()


def _hidden(experts: Any) -> int:
    return experts.down_proj.shape[2 if experts.is_transposed else 1]


def dense(model: halotune.PeftModel) -> dict[str, Tensor]:
    """The parameters of the experts with the adapters in them, by the definition of each adapter."""
    holder = next(m for m in model.modules() if isinstance(m, AdaptedExperts))
    out = {}
    for name in projection_names(holder.base_layer):
        layer: Any = getattr(holder, name)
        out[name] = layer.base.stored(layer.operator().weight())
    return out


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-12))


def eager(experts: Any, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """The class's own forward with other weights."""
    config, experts.config = experts.config, copy.copy(experts.config)
    experts.config._experts_implementation = "eager"
    try:
        return torch.func.functional_call(experts, weights, inputs)
    finally:
        experts.config = config


def check_experts(experts: nn.Module, tolerance: float = 1e-10) -> None:
    """Outputs and gradients of every method, per expert and shared, against the class's own forward with W'."""
    inputs = routed(experts)
    for shared in (False, True):
        for name, config in configs(shared).items():
            model = adapted(Holder(copy.deepcopy(experts)), config)
            holder = model.get_base_model().experts
            trained = [p for p in model.parameters() if p.requires_grad]
            x = inputs[0].clone().requires_grad_()
            y = model(x, *inputs[1:])
            expected = eager(holder.base_layer, dense(model), x, *inputs[1:])
            assert error(y, expected) < tolerance, f"{name}: outputs are {error(y, expected):.1e} off"
            weight = torch.randn_like(y)
            got = torch.autograd.grad((y * weight).sum(), [x, *trained])
            due = torch.autograd.grad((expected * weight).sum(), [x, *trained])
            worst = max(map(error, got, due))
            assert worst < 100 * tolerance, f"{name}: gradients are {worst:.1e} off"
            with model.disable_adapter():
                off = error(model(*inputs), eager(holder.base_layer, {}, *inputs))
            assert off < tolerance, f"{name}: disabled it is {off:.1e} off"
            merged = model.merge_and_unload()
            assert error(merged(*inputs), expected) < tolerance, f"{name}: merged"


def model_of(module: types.ModuleType) -> nn.Module:
    """A toy model of a file that runs, with at least one module of experts; of the text, where it has several parts."""
    names = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
    kinds = sorted(
        (n for n in names if n.endswith(("ForCausalLM", "ForConditionalGeneration", "Model", "ForTokenClassification"))),
        key=lambda n: (not n.endswith("ForCausalLM"), not n.endswith("TextModel"), not n.endswith("Model"), n),
    )
    problem: Exception | None = None
    for name in kinds:
        kind = getattr(module, name)
        config = getattr(kind, "config_class", None)
        if config is None or "PreTrained" in name:
            continue
        try:
            torch.manual_seed(0)
            model = kind(toy(config)).eval()
            with torch.no_grad():
                model(input_ids=torch.ones(1, 7, dtype=torch.long))
        except Exception as e:
            problem = problem or e
            continue
        if any(projection_names(m) for m in model.modules()):
            return model
    raise problem or RuntimeError("no model of the file has experts in its default configuration")


def check_model(model: nn.Module, left_out: Sequence[str] = ()) -> None:
    """ "all-linear" reaches every expert; a pass equals that of the merged model; adapters of experts get gradients."""
    holders = [n for n, m in model.named_modules() if projection_names(m)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = halotune.get_peft_model(
            model, halotune.HRAConfig(r=4, target_modules="all-linear", exclude_modules=list(left_out))
        )
    layers = adapted_layers(wrapped.get_base_model())
    missed = [f"{n}.down_proj" for n in holders if f"{n}.down_proj" not in layers]
    assert not missed, f"{missed[0]} has no adapter"
    ids = torch.randint(1, 90, (2, 7))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    out = wrapped(input_ids=ids)
    y = out[0] if "logits" not in out else out["logits"]
    y.float().square().mean().backward()
    experts = {n: p for n, p in wrapped.named_parameters() if ".experts." in n and p.requires_grad}
    none = [n for n, p in experts.items() if p.grad is None]
    assert not none, f"{none[0]} got no gradient"
    wrapped.merge_adapter()
    merged = wrapped(input_ids=ids)
    z = merged[0] if "logits" not in merged else merged["logits"]
    assert error(z, y) < 1e-3, f"the merged model is {error(z, y):.1e} off"


def flags_of(cls_or_module: Any) -> str:
    said = {
        "transposed": cls_or_module.is_transposed,
        "interleaved": not cls_or_module.is_concatenated,
        "bias": cls_or_module.has_bias,
        "no gate": not cls_or_module.has_gate,
        "norm": getattr(cls_or_module, "has_post_expert_norm", False),
        "own gate": "_apply_gate" in inspect.getsource(type(cls_or_module)),
    }
    return ", ".join(k for k, v in said.items() if v)


def check(name: str) -> dict[str, Result]:
    """The classes of experts of one file."""
    import transformers.models as models

    folder = Path(models.__path__[0]) / name
    out = {}
    for file in sorted(folder.glob("modeling_*.py")):
        if "@use_experts_implementation" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{name}.{file.stem}")
        for cls in experts_of(module):
            torch.manual_seed(0)
            flags, experts = "", "right"
            try:
                made = build(module, cls)
                flags = flags_of(made)
                check_experts(made, 1e-6 if name in ROUNDED else 1e-10)
            except Exception as e:
                experts = _said(e)
            try:
                model = model_of(module)
            except Exception as e:
                whole = f"does not build: {_said(e)}"
            else:
                try:
                    check_model(model, LEFT_OUT.get(name, ()))
                    whole = "right"
                except Exception as e:
                    whole = _said(e)
            out[f"{name}: {cls.__name__}"] = Result(flags, experts, whole)
    return out


def _said(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).splitlines()[0][:110] if str(e) else ''}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.names or files():
        for what, result in check(name).items():
            rows.append((what, result))
            print(f"{what:45} {result.flags:32} {result.experts:10} {result.model}", flush=True)
    right = sum(r.experts == "right" for _, r in rows), sum(r.model == "right" for _, r in rows)
    print(f"{len(rows)} classes in {len(args.names or files())} files: experts right {right[0]}, models right {right[1]}")
    if args.write:
        lines = ["| file: class | flags | experts | model |", "|---|---|---|---|"]
        lines += [f"| {what} | {r.flags} | {r.experts} | {r.model} |" for what, r in rows]
        args.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(any(r.experts != "right" for _, r in rows))


if __name__ == "__main__":
    main()
