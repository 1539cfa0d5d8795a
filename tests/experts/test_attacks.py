"""Adapters on experts in what users do with a model."""

from __future__ import annotations

import copy
import io
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halotune
from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, LoraConfig, OFTConfig
from halotune.core.experts import AdaptedExperts, experts_forward
from halotune.engine.injection.modules import adapted_layers

from .test_laws import adapted, error
from .toys import EXPERTS, HIDDEN, block, dense, on_experts, sample, shake

transformers = pytest.importorskip("transformers")
TARGETS: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
METHODS = [
    HRAConfig(r=4, **TARGETS),
    LoHaConfig(r=2, **TARGETS),
    LoHaConfig(r=8, **TARGETS),
    BoneConfig(r=4, **TARGETS),
    BoneConfig(r=4, init_weights="bat", **TARGETS),
    OFTConfig(oft_block_size=4, **TARGETS),
    LoraConfig(r=4, **TARGETS),
]
names = pytest.mark.parametrize("config", METHODS, ids=["hra", "loha", "loha-dense", "bone", "bat", "oft", "lora"])


def mixtral(**kwargs: Any) -> nn.Module:
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    config = transformers.MixtralConfig(vocab_size=40, num_local_experts=4, num_experts_per_tok=2, **{**sizes, **kwargs})
    return transformers.MixtralForCausalLM(config).eval()


def wrapped(config: Any, base: nn.Module | None = None, **kwargs: Any) -> halotune.PeftModel:
    model = halotune.get_peft_model(mixtral() if base is None else base, copy.deepcopy(config), **kwargs)
    shake(model, 0.1)
    return model.eval()


def ids() -> Tensor:
    return torch.arange(14).view(2, 7) % 39 + 1


def gradients(model: nn.Module, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids(), **kwargs).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


# -- routing


def pushed(index: Tensor, config: Any = METHODS[0], kind: str = "interleaved") -> tuple[Any, Tensor, Tensor]:
    """A pass of experts alone, with a given routing."""
    model = adapted(on_experts(config), kind)
    holder = model.get_base_model().experts
    x = torch.randn(index.shape[0], HIDDEN, dtype=torch.float64, requires_grad=True)
    return model, holder(x, index, torch.rand(index.shape, dtype=torch.float64)), x


ROUTED = [HRAConfig(r=4), LoHaConfig(r=2), LoHaConfig(r=5), BoneConfig(r=3, init_weights="bat"), OFTConfig(oft_block_size=3)]


@pytest.mark.parametrize("config", ROUTED, ids=["hra", "loha", "loha-dense", "bat", "oft"])
def test_experts_without_tokens_get_zero_gradients_and_the_others_theirs(config):
    index = torch.tensor([[1, 3], [3, 1], [1, 3]])
    model, y, x = pushed(index, config)
    y.square().sum().backward()
    assert x.grad is not None
    for p in model.parameters():
        if p.requires_grad:
            used = p.grad.flatten(1).abs().sum(1) > 0
            assert used.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("config", ROUTED, ids=["hra", "loha", "loha-dense", "bat", "oft"])
def test_all_tokens_to_one_expert_and_no_tokens_at_all(config):
    model, y, _ = pushed(torch.full((7, 1), 2), config)
    assert torch.isfinite(y).all()
    model, y, x = pushed(torch.zeros((0, 2), dtype=torch.long), config)
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert x.grad.shape == (0, HIDDEN)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_same_expert_twice_for_a_token():
    model = adapted(LoraConfig(r=3))
    holder = model.get_base_model().experts
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    twice = holder(x, torch.tensor([[1, 1], [0, 2], [4, 4]]), torch.tensor([[0.3, 0.7], [1, 0], [0.5, 0.5]]).double())
    once = holder(x, torch.tensor([[1], [0], [4]]), torch.ones(3, 1).double())
    assert error(twice, once) < 1e-12


def test_rows_of_other_processes_are_zero_and_have_no_gradient():
    """As expert parallelism marks them: by ids from the number of experts on."""
    model = adapted(HRAConfig(r=4), "interleaved")
    holder = model.get_base_model().experts
    x = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64)
    holder.base_layer._is_expert_parallel = True
    mine = holder(x, torch.tensor([[1, EXPERTS], [EXPERTS, 2], [0, 4], [EXPERTS, EXPERTS]]), weights)
    holder.base_layer._is_expert_parallel = False
    due = holder(x, torch.tensor([[1, 0], [0, 2], [0, 4], [3, 3]]), weights * torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]))
    assert error(mine, due) < 1e-12
    assert not mine[3].any()
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (mine, due))
    assert error(a, b) < 1e-12


# -- a language model


def checkpoint(model: Any, reentrant: bool) -> None:
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5's name
    kwargs = {"use_reentrant": reentrant}
    if new:
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


@names
def test_checkpointed_training_has_the_same_gradients(config):
    model = wrapped(config).train()
    due = gradients(model)
    for reentrant in (False, True):
        checkpoint(model, reentrant)
        got = gradients(model)
        assert len(got) == len(due)
        assert max(map(error, got, due)) < 1e-5


@names
def test_a_base_in_bf16_and_autocast(config):
    exact = wrapped(config)
    model = wrapped(config, mixtral().to(torch.bfloat16)).train()
    grads = gradients(model)
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(torch.isfinite(g).all() for g in grads)
    with torch.autocast("cpu", torch.bfloat16):
        y = exact(input_ids=ids()).logits
        grads = gradients(exact)
    z = exact(input_ids=ids()).logits
    assert error(y.float(), z) < 0.1
    assert all(g.dtype is torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("config", [HRAConfig(r=4), OFTConfig(oft_block_size=3), LoraConfig(r=3)], ids=["hra", "oft", "lora"])
def test_it_compiles_into_one_graph(config):
    model = adapted(config, "interleaved", dtype=torch.float32)
    x = sample(dtype=torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model().experts, backend="aot_eager", fullgraph=True)
    index, weights = torch.rand(11, EXPERTS).argsort(-1)[:, :2], torch.rand(11, 2)
    y, z = (f(x[0], index, weights) for f in (model.get_base_model().experts, compiled))
    assert error(z, y) < 1e-6
    got, due = (torch.autograd.grad(t.square().sum(), parameters) for t in (z, y))
    assert max(map(error, got, due)) < 1e-5


@names
def test_generation(config):
    model = wrapped(config)
    with torch.no_grad():
        out = model.generate(input_ids=ids()[:1], max_new_tokens=5, do_sample=False)
        merged = copy.deepcopy(model).merge_and_unload()
        due = merged.generate(input_ids=ids()[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(out, due)


@names
def test_merged_and_saved_it_is_read_by_transformers_alone(config, tmp_path):
    model = wrapped(config)
    y = model(input_ids=ids()).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(again(input_ids=ids()).logits, y) < 1e-4
    assert again.config._experts_implementation != "halotune"


def test_a_trained_router_keeps_its_gradients():
    for trained in ("modules_to_save", "by hand"):
        config = copy.deepcopy(METHODS[0])
        config.modules_to_save = ["gate"] if trained == "modules_to_save" else None
        model = wrapped(config).train()
        if trained == "by hand":
            for n, p in model.named_parameters():
                p.requires_grad_(p.requires_grad or n.endswith("mlp.gate.weight"))
        gradients(model)
        routers = [p for n, p in model.named_parameters() if ".gate." in n and p.requires_grad]
        assert len(routers) == 2
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)
    plain = mixtral()
    plain.set_experts_implementation("eager")
    model = halotune.get_peft_model(copy.deepcopy(plain), copy.deepcopy(METHODS[0]))
    for m in (plain, model):
        m.requires_grad_(False)
        for n, p in m.named_parameters():
            p.requires_grad_(n.endswith("mlp.gate.weight"))
    assert max(map(error, gradients(model), gradients(plain))) < 1e-4  # at the start, those of the base


@names
def test_copies_and_pickles(config):
    model = wrapped(config)
    y = model(input_ids=ids()).logits
    twin = copy.deepcopy(model)
    shake(model, 0.3)
    assert torch.equal(twin(input_ids=ids()).logits, y)
    holders = [next(m for m in x.modules() if isinstance(m, AdaptedExperts)) for x in (model, twin)]
    assert all(vars(h.base_layer)["_halotune"][0] is h for h in holders)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(input_ids=ids()).logits, y)


def test_taking_adapters_out_leaves_the_model_as_it_was():
    base = mixtral()
    base.set_experts_implementation("eager")
    y = base(input_ids=ids()).logits
    keys = list(base.state_dict())
    model = wrapped(METHODS[0], base)
    assert not torch.equal(model(input_ids=ids()).logits, y)
    assert base.config._experts_implementation == "eager"
    model.add_adapter("second", copy.deepcopy(METHODS[-1]))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert set(adapted_layers(base)) == {
        f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")
    }
    back = model.unload()
    assert back is base
    assert list(back.state_dict()) == keys
    assert all(m.config is base.config for n, m in base.named_modules() if n.endswith(".experts"))
    assert torch.equal(back(input_ids=ids()).logits, y)


def test_another_model_of_the_same_configuration_is_left_alone():
    first = mixtral()
    second = transformers.MixtralForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    y = second(input_ids=ids()).logits
    model = wrapped(METHODS[0], first)
    assert torch.equal(second(input_ids=ids()).logits, y)
    model.set_experts_implementation("eager")  # of the experts without adapters: there are none
    assert error(model(input_ids=ids()).logits, y) > 1e-3


def test_one_layer_alone_and_the_others_run_as_before():
    config = copy.deepcopy(METHODS[0])
    config.layers_to_transform = [1]
    model = wrapped(config)
    assert {n.split(".")[2] for n in adapted_layers(model.get_base_model())} == {"1"}
    assert all(torch.isfinite(g).all() for g in gradients(model))
    config = LoraConfig(r=4, target_parameters=["experts.down_proj"])
    model = wrapped(config)
    assert {n.rpartition(".")[2] for n in adapted_layers(model.get_base_model())} == {"down_proj"}
    y = model(input_ids=ids()).logits
    model.merge_adapter()
    assert error(model(input_ids=ids()).logits, y) < 1e-5


def test_resized_embeddings(tmp_path):
    base = mixtral()
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(48)
    model = wrapped(METHODS[0], base)
    y = model(input_ids=ids()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again.resize_token_embeddings(48)
        again = halotune.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert error(again(input_ids=ids()).logits, y) < 1e-6


def in_four_bits(back: bool) -> nn.Module:
    """A base with experts in nf4; or in floats of the same values."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    torch.manual_seed(3)
    base = mixtral(hidden_size=64, intermediate_size=64)
    for layer in base.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
        for name in ("gate_up_proj", "down_proj") if back else ():
            W = getattr(layer.mlp.experts, name).detach()
            nn.utils.parametrize.remove_parametrizations(layer.mlp.experts, name, leave_parametrized=False)
            setattr(layer.mlp.experts, name, nn.Parameter(W))
    return base


def test_experts_in_four_bits():
    """bitsandbytes quantizes them in place; nothing of their size is kept for backward."""
    for config in (*METHODS[:1], *METHODS[4:]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a method that needs the weight says so
            model = wrapped(config, in_four_bits(back=False))
            due = wrapped(config, in_four_bits(back=True))
        assert error(model(input_ids=ids()).logits, due(input_ids=ids()).logits) < 1e-5
        assert max(map(error, gradients(model), gradients(due))) < 1e-4
        with pytest.raises(HalotuneError, match="quantized, say"):
            model.merge_adapter()
        weights = {(4, 128, 64), (4, 64, 128), (4, 64, 64)}
        assert not weights & {tuple(t.shape) for t in saved(model)}


def saved(model: nn.Module) -> list[Tensor]:
    """What a pass keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_ids=ids())
    return kept


def test_offloaded_experts(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = mixtral()
    model = wrapped(METHODS[0], copy.deepcopy(base))
    y = model(input_ids=ids()).logits
    model.export("lora", tmp_path / "here")
    adapters = halotune.get_peft_model_state_dict(model)
    away = accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    model = halotune.get_peft_model(away, copy.deepcopy(METHODS[0]))
    halotune.set_peft_model_state_dict(model, adapters)
    assert error(model(input_ids=ids()).logits, y) < 1e-6
    with pytest.raises(HalotuneError, match="offloaded"):
        model.merge_adapter()
    model.export("lora", tmp_path / "away")
    exported = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("away", "here")]
    assert all(error(exported[0][key], t) < 1e-6 for key, t in exported[1].items())


def test_the_registry_runs_adapted_experts_alone():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = adapted(METHODS[0].__class__(r=4))
    assert ALL_EXPERTS_FUNCTIONS["halotune"] is experts_forward
    own = model.get_base_model().experts.base_layer
    assert isinstance(own.config, SimpleNamespace)
    assert own.config._experts_implementation == "halotune"
    assert model.get_base_model().config._experts_implementation == "eager"
    assert error(model(sample()), dense(model, sample())) > 0


def test_a_block_without_other_targets():
    base = block()
    model = halotune.get_peft_model(base, on_experts(LoraConfig(r=2)))
    assert set(adapted_layers(model.get_base_model())) == {"experts.gate_up_proj", "experts.down_proj"}
