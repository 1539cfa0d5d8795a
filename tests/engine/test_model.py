"""The API that PEFT's users know."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halotune
from halotune import (
    BoneConfig,
    HalotuneError,
    HRAConfig,
    HRAModel,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from halotune.core.layer import AdaptedLayer

from ..interop.models import IDS, MLP, base, error, inputs, output, randomize, snapshot

HRA = HRAConfig(r=4, target_modules=["0", "1"])
LOHA = LoHaConfig(r=2, target_modules=["1"])
Q = HRAConfig(r=4, target_modules=["q_proj"])


def wrap(kind: str = "mlp", config=HRA, **kwargs) -> PeftModel:
    """A model with a trained adapter; the same each time."""
    torch.manual_seed(0)
    return randomize(halotune.get_peft_model(base(kind), config, **kwargs))


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# -- the wrapper


@pytest.mark.parametrize("kind", ["mlp", "llama", "bert_classifier"])
def test_forward_has_the_bases_own_signature(kind: str) -> None:
    config = {"mlp": HRA, "llama": Q}.get(kind, HRAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model, plain = wrap(kind, config), base(kind)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == plain.forward.__doc__
    x = inputs(plain)
    assert torch.equal(output(model, x), output(model.get_base_model(), x))


def test_two_bases_keep_their_own_signatures() -> None:
    class Other(MLP):
        def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
            return super().forward(super().forward(x) if twice else x)

    other = halotune.get_peft_model(Other(), HRA)
    assert "twice" in inspect.signature(other.forward).parameters
    assert "twice" not in inspect.signature(wrap().forward).parameters
    assert type(other).__name__ == type(wrap()).__name__ == "PeftModel"
    assert other(torch.ones(1, 8), twice=True).shape == (1, 8)


TASKS = {
    "CAUSAL_LM": ("llama", "q_proj", "PeftModelForCausalLM", None),
    "SEQ_2_SEQ_LM": ("t5", "q", "PeftModelForSeq2SeqLM", None),
    "SEQ_CLS": ("bert_classifier", "query", "PeftModelForSequenceClassification", "classifier"),
    "TOKEN_CLS": ("bert_tagger", "query", "PeftModelForTokenClassification", "classifier"),
    "QUESTION_ANS": ("bert_reader", "query", "PeftModelForQuestionAnswering", "qa_outputs"),
    "FEATURE_EXTRACTION": ("bert", "query", "PeftModelForFeatureExtraction", None),
}


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_task_type_chooses_the_class_and_trains_the_head(task: str, tmp_path) -> None:
    kind, target, name, head = TASKS[task]
    for given in (task, halotune.TaskType(task)):
        model = wrap(kind, HRAConfig(r=2, target_modules=[target], task_type=given))
        assert type(model).__name__ == name and isinstance(model, getattr(halotune, name))
    heads = {n for n in trainable(model) if not n.endswith(".hra_u")}
    prefix = f"base_model.model.{head}"
    assert heads == ({f"{prefix}.modules_to_save.default.{p}" for p in ("weight", "bias")} if head else set())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k for k in stored if not k.endswith(".hra_u")} == ({f"{prefix}.{p}" for p in ("weight", "bias")} if head else set())
    again = PeftModel.from_pretrained(base(kind), tmp_path)
    assert type(again).__name__ == name
    assert error(output(again), output(model)) < 1e-6
    with model.disable_adapter():
        assert torch.equal(output(model), output(base(kind)))


@torch.no_grad()
def test_head_called_score() -> None:
    model = wrap("llama_classifier", HRAConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert "base_model.model.score.modules_to_save.default.weight" in trainable(model)
    assert {k for k in halotune.get_peft_model_state_dict(model) if "score" in k} == {"base_model.model.score.weight"}


SMALL = {"vocab_size": 32, "pad_token_id": 0}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "eos_token_id": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "eos_token_id": 2, "decoder_start_token_id": 0}
DEBERTA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
HEADS = {
    "Bart": (BART | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}, ["q_proj"], {"classification_head"}),
    "T5": (T5, ["q"], {"classification_head"}),
    "DebertaV2": (DEBERTA, ["query_proj"], {"classifier", "pooler"}),
    "XLNet": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, ["layer_1"], {"logits_proj", "sequence_summary"}),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_of_other_names_are_trained_and_saved(name: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes, targets, heads = HEADS[name]

    def classifier(seed: int, layers: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForSequenceClassification")(
            getattr(transformers, f"{name}Config")(**SMALL | sizes)
        )
        if layers is not None:  # everything but the head
            kept = {k: t for k, t in layers.state_dict().items() if k.split(".")[0] not in heads}
            model.load_state_dict(kept, strict=False)
        return model.eval()

    ids = torch.tensor([[5, 6, 7, 2]])
    model = randomize(
        halotune.get_peft_model(classifier(0), HRAConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    ).eval()
    whole = {n.split(".")[2] for n in trainable(model) if not n.endswith(".hra_u")}
    assert whole == heads
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(1, classifier(0)), tmp_path)
    assert error(again(input_ids=ids).logits, model(input_ids=ids).logits) < 1e-6


def test_a_task_without_a_head_is_an_error() -> None:
    config = HRAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(
        HalotuneError, match=r"BertModel has no head of a usual name \(classifier.*Name the head in modules_to_save"
    ):
        halotune.get_peft_model(base("bert"), config)
    named = HRAConfig(r=2, target_modules=["0"], task_type="SEQ_CLS", modules_to_save=["layers.1"])
    assert "base_model.model.layers.1.modules_to_save.default.weight" in trainable(wrap("mlp", named))


def test_attributes_of_the_base_are_reached() -> None:
    model = wrap("llama", Q)
    inner = model.get_base_model()
    assert model.config is inner.config and model.device == inner.device and model.dtype == inner.dtype
    assert model.base_model.model is inner
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in model.state_dict()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_generate_with_and_without_the_adapter() -> None:
    model = wrap("llama", HRAConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with model.disable_adapter():
        assert torch.equal(model.generate(IDS, **options), base("llama").generate(IDS, **options))
    new = model.generate(input_ids=IDS, **options)
    assert not torch.equal(new, base("llama").generate(IDS, **options))
    assert torch.equal(new, model.merge_and_unload().generate(IDS, **options))


def test_configuration_is_not_changed_by_its_use() -> None:
    config = HRAConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    before = config.to_dict()
    first, second = (halotune.get_peft_model(base(k), config) for k in ("bert_classifier", "llama_classifier"))
    assert config.to_dict() == before
    assert first.peft_config["default"].target_modules != second.peft_config["default"].target_modules


def test_names_of_the_base_model_and_its_revision_are_written_down() -> None:
    model = halotune.get_peft_model(base("llama"), Q, revision="v2", mixed=True)
    assert model.peft_config["default"].base_model_name_or_path == base("llama").name_or_path
    assert model.peft_config["default"].revision == "v2"
    assert halotune.get_peft_model(base("mlp"), HRA).peft_config["default"].base_model_name_or_path is None


@torch.no_grad()
def test_deepcopy_and_pickle() -> None:
    model = wrap("llama", HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(output(again), output(model))
        assert trainable(again) == trainable(model)
        randomize(again, seed=1)
        assert not torch.equal(output(again), output(model))


# -- what is trained


@pytest.mark.parametrize(
    "bias, biases",
    [
        ("none", set()),
        ("hra_only", {"layers.0.base_layer.bias"}),
        ("all", {"layers.0.base_layer.bias", "layers.1.bias"}),
    ],
)
def test_exactly_the_adapter_and_its_biases_are_trained(bias: str, biases: set[str]) -> None:
    model = wrap(config=HRAConfig(r=2, target_modules=["0"], bias=bias))
    assert trainable(model) == {f"base_model.model.{n}" for n in {"layers.0.adapters.default.hra_u"} | biases}
    output(model).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)


def test_inference_mode_trains_nothing() -> None:
    assert trainable(wrap(config=HRAConfig(r=2, target_modules=["0"], bias="all", inference_mode=True))) == set()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_is_trained_on_request(is_trainable: bool, tmp_path) -> None:
    wrap().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base("mlp"), tmp_path, is_trainable=is_trainable)
    assert bool(trainable(model)) == is_trainable
    assert model.peft_config["default"].inference_mode != is_trainable


def test_loading_draws_no_random_number(tmp_path) -> None:
    wrap(config=LOHA).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    PeftModel.from_pretrained(base("mlp"), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_counting_and_printing(capsys) -> None:
    model = wrap()
    base_size = sum(p.numel() for p in base("mlp").parameters())
    assert model.get_nb_trainable_parameters() == (2 * 8 * 4, 2 * 8 * 4 + base_size)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 64 || all params: 208 || trainable%: 30.7692\n"


def test_penalty_is_the_sum_over_layers() -> None:
    assert wrap().penalty() == 0.0
    model = wrap(config=HRAConfig(r=2, target_modules=["0", "1"], orthogonality_weight=0.5))
    expected = 0.0
    for layer in model.get_base_model().layers:
        u = nn.functional.normalize(layer.adapters["default"].hra_u.detach(), dim=0)
        expected += 0.5 * (u.mT @ u - torch.eye(2)).square().sum()
    assert model.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
    model.penalty().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_penalty_that_nobody_adds_is_missed() -> None:
    config = HRAConfig(r=4, target_modules="all-linear", orthogonality_weight=1e-3)

    def train(model: PeftModel, passes: int, *, add: bool = False) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(passes):
                loss = model(torch.randn(2, 8)).sum()
                (loss + model.penalty() if add else loss).backward()
        return [str(w.message) for w in said if "penalty" in str(w.message)]

    def wrapped(config: HRAConfig) -> PeftModel:
        return get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)

    said = train(wrapped(config).train(), 100)
    assert len(said) == 1 and "model.penalty()" in said[0] and "AdapterTrainer" in said[0]
    assert not train(wrapped(config).train(), 100, add=True)
    assert not train(wrapped(config).train(), 20)  # several passes may make a step
    assert not train(wrapped(config).eval(), 100)
    assert not train(wrapped(HRAConfig(r=4, target_modules="all-linear")).train(), 100)


def test_parameter_groups_decay_what_has_a_scale() -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], bias="hra_only", modules_to_save=["lm_head"])
    model = wrap("llama", config)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = halotune.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"base_model.model.lm_head.modules_to_save.default.weight"}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in kept["params"]} == {"hra_u", "bias"}
    assert {id(p) for g in (decayed, kept) for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW([decayed, kept], lr=1e-3)
    (only,) = halotune.parameter_groups(wrap(config=LOHA), 0.1)
    assert only["weight_decay"] == 0.1 and len(only["params"]) == 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_adapters_in_checkpointed_blocks_of_images(use_reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, hidden_dropout_prob=0.0)
    vit = transformers.ViTForImageClassification(config)
    model = randomize(halotune.get_peft_model(vit, HRAConfig(r=2, target_modules="all-linear"))).train()
    x = torch.ones(1, 3, 16, 16)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=x).logits.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_reach_adapters_in_checkpointed_blocks(when: str) -> None:
    def turn_on(model: nn.Module, use_reentrant: bool) -> None:
        name = "activation_checkpointing_enable"  # transformers 5's
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": use_reentrant})

    expected = wrap("llama", Q).train()
    output(expected).sum().backward()
    inner = base("llama").train()
    if when == "before":
        turn_on(inner, use_reentrant=True)
    torch.manual_seed(0)
    model = randomize(halotune.get_peft_model(inner, Q)).train()
    if when == "after":
        turn_on(model, use_reentrant=False)
    assert all(layer.gradient_checkpointing for layer in inner.model.layers)
    output(model).sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
        assert p.grad is None or error(p.grad, q.grad) < 1e-5


# -- several adapters


def test_adapters_come_and_go(tmp_path) -> None:
    model = wrap()
    y = output(model)
    model.add_adapter("second", LOHA)
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert all(".second." not in n for n in trainable(model))
    assert torch.equal(output(model), y)

    model.set_adapter("second")
    alone = output(randomize(model, seed=1))
    assert model.active_adapter == "second" and model.peft_type == "LOHA"
    assert model.active_peft_config is model.peft_config["second"]
    assert trainable(model) and all(".second." in n for n in trainable(model))

    model.set_adapter(["default", "second"])
    assert model.active_adapter == ["default", "second"]
    both = output(model)
    assert not torch.equal(both, y)
    model.set_adapter(["default", "second"], inference_mode=True)
    assert trainable(model) == set() and torch.equal(output(model), both)

    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "third")
    assert set(model.peft_config) == {"default", "second", "third"} and "third" not in model.active_adapters
    model.set_adapter(["default", "third"])
    assert torch.equal(output(model), both)

    with pytest.warns(UserWarning, match="'second' is active now"):
        model.delete_adapter("default"), model.delete_adapter("third")
    assert model.active_adapters == ["second"] and set(model.peft_config) == {"second"}
    assert torch.equal(output(model), alone)
    model.delete_adapter("second")
    assert model.peft_config == {} and model.active_adapters == []
    assert torch.equal(output(model), output(base("mlp")))


def test_active_adapters_apply_one_after_the_other() -> None:
    model = halotune.get_peft_model(base("mlp"), HRA, "a")
    model.add_adapter("b", BoneConfig(r=4, init_weights="bat", target_modules=["0", "1"]))
    model.set_adapter(["a", "b"])
    randomize(model)
    x = inputs(base("mlp"))
    for order in (["a", "b"], ["b", "a"]):
        model.set_adapter(order)
        y = x
        for layer in model.get_base_model().layers:
            W = layer.base_layer.weight
            for name in order:
                W = layer.adapters[name].weight(W)
            y = nn.functional.linear(y, W, layer.base_layer.bias).tanh()
        assert error(model(x), y) < 1e-5


@torch.no_grad()
def test_batch_with_an_adapter_for_each_sample() -> None:
    """In peft the names are ignored for HRA, LoHa and MiSS."""
    model = wrap()
    model.add_adapter("second", LOHA)
    model.set_adapter("second")
    randomize(model, seed=1)
    x = inputs(base("mlp"))
    y = model(x, adapter_names=["second", "__base__", "default"])
    assert error(y[:1], model(x[:1])) < 1e-6
    assert error(y[1:2], base("mlp")(x[1:2])) < 1e-6
    model.set_adapter("default")
    assert error(y[2:], model(x[2:])) < 1e-6


def test_deleting_an_adapter_leaves_no_trace() -> None:
    model = wrap(config=LOHA)
    untouched = snapshot(model)
    model.add_adapter("second", HRAConfig(r=2, target_modules=["0", "1"]))
    model.delete_adapter("second")
    untouched()


def test_new_weights_under_an_old_name_need_the_same_configuration(tmp_path) -> None:
    wrap(config=LOHA).save_pretrained(tmp_path)
    model = wrap(config=LoHaConfig(r=2, alpha=3, target_modules=["1"]))
    untouched = snapshot(model)
    with pytest.raises(HalotuneError, match=r"'default', whose configuration differs \(alpha: 3 here, 8 there\)"):
        model.load_adapter(tmp_path, "default")
    untouched()
    model = halotune.get_peft_model(base("mlp"), LOHA)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(output(model), output(wrap(config=LOHA)))


def test_only_one_trained_copy_of_a_module_can_run() -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = wrap("llama", config)
    model.add_adapter("second", config)
    y = output(model)
    with pytest.raises(HalotuneError, match=r"lm_head: default, second each hold a trained copy.*Activate one of them"):
        model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"] and torch.equal(output(model), y)
    model.set_adapter("second")
    assert torch.equal(model.get_base_model().lm_head.weight, base("llama").lm_head.weight)


def test_disable_adapter_ends_with_an_error_inside() -> None:
    model = wrap()
    y = output(model)
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(output(model), output(base("mlp")))
        raise KeyError
    assert torch.equal(output(model), y)


# -- statuses


def test_layer_status() -> None:
    config = HRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = wrap("llama", config)
    model.add_adapter("other", LoHaConfig(r=2, target_modules=["layers.1.self_attn.q_proj"]))
    first, second, head = model.get_layer_status()
    assert [s.name for s in (first, second, head)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    assert first.module_type == "Linear" and first.enabled and first.quantization_backend is None
    assert (first.active_adapters, first.available_adapters, first.merged_adapters) == (["default"], ["default"], [])
    assert second.available_adapters == ["default", "other"]
    assert second.requires_grad == {"default": True, "other": False}
    assert second.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert head.requires_grad == {"default": True}
    model.merge_adapter()
    assert model.get_layer_status()[0].merged_adapters == ["default"]
    with model.disable_adapter():
        assert not any(s.enabled for s in model.get_layer_status())


def test_model_status() -> None:
    model = wrap("llama", HRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    status = model.get_model_status()
    trainable, total = model.get_nb_trainable_parameters()
    assert vars(status) == {
        "base_model_type": "LlamaForCausalLM",
        "adapter_model_type": "HRAModel",
        "peft_types": {"default": "HRA"},
        "trainable_params": trainable,
        "total_params": total,
        "num_adapter_layers": 2,
        "enabled": True,
        "active_adapters": ["default"],
        "merged_adapters": [],
        "requires_grad": {"default": True},
        "available_adapters": ["default"],
        "devices": {"default": ["cpu"]},
        "quantization_backend": None,
        "form": {"default": "auto"},
    }
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    layers[0].adapters["default"].requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}
    layers[0].active_adapters = []
    layers[0].enabled = False
    status = model.get_model_status()
    assert status.active_adapters == status.enabled == "irregular"


def test_the_status_shows_the_form() -> None:
    model = wrap("mlp", HRAConfig(r=2, target_modules=["0", "1"]))
    for form in ("weights", "activations", "auto"):
        model.set_adapter_form(form)
        assert [status.form for status in model.get_layer_status()] == [{"default": form}] * 2
        assert model.get_model_status().form == {"default": form}
    model.set_adapter_form("weights", budget_gib=0)  # no room for W'
    assert model.get_model_status().form == {"default": "activations"}
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))
    layer.adapters["default"].form = "auto"
    assert model.get_model_status().form == {"default": "irregular"}


# -- without the wrapper


def test_inject_adapter_in_model_gives_the_same_object_back(tmp_path) -> None:
    model = base("mlp")
    injected = halotune.inject_adapter_in_model(HRA, model, "one")
    assert injected is model and type(model) is MLP
    assert trainable(model) == {f"layers.{i}.adapters.one.hra_u" for i in range(2)}
    randomize(model)
    tensors = halotune.get_peft_model_state_dict(model, adapter_name="one")
    assert set(tensors) == {"layers.0.hra_u", "layers.1.hra_u"}
    save_file(tensors, tmp_path / "adapter.safetensors")

    other = halotune.inject_adapter_in_model(HRA, base("mlp"))
    result = halotune.set_peft_model_state_dict(other, load_file(tmp_path / "adapter.safetensors"))
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(output(other), output(model))

    halotune.inject_adapter_in_model(LOHA, model, "two")
    assert set(model.peft_config) == {"one", "two"}
    with pytest.raises(HalotuneError, match=r"no adapter named 'three'; the model has \['one', 'two'\]"):
        halotune.get_peft_model_state_dict(model, adapter_name="three")


def test_inject_where_a_state_dict_says() -> None:
    source = halotune.inject_adapter_in_model(HRAConfig(r=2, target_modules=["1"]), base("mlp"))
    tensors = halotune.get_peft_model_state_dict(randomize(source))
    config = HRAConfig(r=2, target_modules=["0"])  # what the state dict says goes before
    model = halotune.inject_adapter_in_model(config, base("mlp"), state_dict=tensors, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if "hra_u" in n)
    halotune.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    assert torch.equal(output(model), output(source))


def test_state_dict_round_trip_of_a_wrapped_model() -> None:
    model, other = wrap(), halotune.get_peft_model(base("mlp"), HRA, "other")
    tensors = halotune.get_peft_model_state_dict(model)
    assert set(tensors) == {f"base_model.model.layers.{i}.hra_u" for i in range(2)}
    halotune.set_peft_model_state_dict(other, tensors, "other")
    assert torch.equal(output(other), output(model))
    with pytest.raises(halotune.AdapterFileError, match=r"the state dict: .*missing"):
        halotune.set_peft_model_state_dict(other, dict(list(tensors.items())[:1]), "other")


METHODS = {
    "HRAModel": (HRAConfig, "hra_"),
    "LoHaModel": (LoHaConfig, "hada_"),
    "BoneModel": (BoneConfig, "bone_"),
    "MissModel": (MissConfig, "miss_"),
    "LoraModel": (LoraConfig, "lora_"),
}


@pytest.mark.parametrize("name", METHODS)
def test_method_models_on_any_module(name: str) -> None:
    config, prefix = METHODS[name]
    cls, inner = getattr(halotune, name), base("mlp")
    model = randomize(cls(inner, config(r=2, target_modules=["0"]), "one"))
    assert model.model is inner and model.prefix == prefix and cls.__module__ == "halotune" and cls.__doc__
    assert list(model.peft_config) == ["one"] and model.active_adapters == ["one"]
    assert issubclass(model.tuner_layer_cls, AdaptedLayer) and isinstance(inner.layers[0], model.tuner_layer_cls)
    assert model.target_module_mapping["llama"] == ("q_proj", "v_proj")
    assert all(prefix in n for n in trainable(model)) and trainable(model)
    y = output(model)
    assert error(y, output(base("mlp"))) > 1e-3
    model.delete_adapter("one")
    assert torch.equal(output(model), output(base("mlp")))

    model = randomize(cls(base("mlp"), {n: config(r=2, target_modules=["0"]) for n in ("one", "two")}))
    assert list(model.peft_config) == ["one", "two"] and model.active_adapters == ["one"]
    y = output(model)
    plain = model.merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["one"])
    assert type(plain) is MLP and error(output(plain), y) < 1e-5
    assert type(cls(base("mlp"), config(r=2, target_modules=["0"])).unload()) is MLP


def test_method_model_without_initialising() -> None:
    source = halotune.HRAModel(base("mlp"), HRA)
    model = halotune.HRAModel(base("mlp"), HRA, "default", low_cpu_mem_usage=True, state_dict=source.state_dict())
    assert all(p.is_meta for n, p in model.named_parameters() if "hra_u" in n)


def test_low_cpu_mem_usage() -> None:
    model = halotune.get_peft_model(base("mlp"), HRA, low_cpu_mem_usage=True)
    assert all(p.is_meta == ("hra_u" in n) for n, p in model.named_parameters())
    model.add_adapter("second", LOHA, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in model.named_parameters() if ".second." in n)
    halotune.set_peft_model_state_dict(model, halotune.get_peft_model_state_dict(wrap()), low_cpu_mem_usage=True)
    assert torch.equal(output(model), output(wrap()))
    assert trainable(model) == trainable(wrap())


# -- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_adapters_over_a_half_precision_base(dtype: torch.dtype, tmp_path) -> None:
    def dtypes(model: nn.Module) -> set[torch.dtype]:
        return {p.dtype for n, p in model.named_parameters() if ".adapters." in n}

    model = randomize(halotune.get_peft_model(base("mlp", dtype), HRA))
    assert dtypes(model) == {torch.float32} and output(model).dtype == dtype
    half = randomize(halotune.get_peft_model(base("mlp", dtype), HRA, autocast_adapter_dtype=False))
    assert dtypes(half) == {dtype} and output(half).dtype == dtype
    half.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    for of_base in (dtype, torch.float32):
        loaded = PeftModel.from_pretrained(base("mlp", of_base), tmp_path)
        assert dtypes(loaded) == {torch.float32} and output(loaded).dtype == of_base
        assert error(output(loaded), output(half)) < 2e-2
        kept = PeftModel.from_pretrained(base("mlp", of_base), tmp_path, autocast_adapter_dtype=False)
        assert dtypes(kept) == {dtype} and output(kept).dtype == of_base
    assert torch.equal(output(kept.to(dtype)), output(half))


def test_double_precision_stays() -> None:
    model = halotune.get_peft_model(base("mlp", torch.float64), HRA)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and output(model).dtype == torch.float64


@pytest.mark.parametrize("checkpointing", [True, False])
def test_prepare_model_for_kbit_training(checkpointing: bool) -> None:
    plain = base("llama", torch.bfloat16).train()
    model = halotune.prepare_model_for_kbit_training(plain, use_gradient_checkpointing=checkpointing)
    assert model is plain and trainable(model) == set()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.layers[0].gradient_checkpointing == checkpointing
    assert model.model.embed_tokens(IDS).requires_grad == checkpointing
    wrapped = halotune.get_peft_model(model, Q)
    output(wrapped).sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def test_prepare_a_plain_module() -> None:
    model = halotune.prepare_model_for_kbit_training(base("mlp"))  # no checkpointing to turn on
    assert trainable(model) == set()


def test_module_that_is_used_twice_is_adapted_once() -> None:
    model = base("mlp")
    model.again = model.layers[1]
    model.forward = types.MethodType(lambda self, x: self.again(self.layers[1](x)), model)
    wrapped = randomize(halotune.get_peft_model(model, HRAConfig(r=2, target_modules=["1"])))
    assert wrapped.get_base_model().again is wrapped.get_base_model().layers[1]
    assert wrapped.get_nb_trainable_parameters()[0] == 16
    assert error(output(wrapped), output(copy.deepcopy(wrapped).merge_and_unload())) < 1e-5


def test_an_adapter_model_saves_the_adapter_alone(tmp_path):
    """And its files are those that a PeftModel writes; tensors load under either's prefix."""
    base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    tuner = HRAModel(copy.deepcopy(base), HRAConfig(r=2, target_modules=["0"], init_weights=False))
    tuner.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert list(tensors) == ["base_model.model.0.hra_u"]
    x = torch.randn(3, 5)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), tuner(x))
    again = HRAModel(copy.deepcopy(base), HRAConfig(r=2, target_modules=["0"]))
    set_peft_model_state_dict(again, tensors)
    assert torch.equal(again(x), tuner(x))


def test_warnings_point_at_the_users_line():
    with pytest.warns(UserWarning, match="even r") as caught:
        get_peft_model(nn.Sequential(nn.Linear(5, 6)), HRAConfig(r=3, target_modules=["0"]))
    assert [w.filename for w in caught] == [__file__]
