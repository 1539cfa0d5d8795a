"""`adapter_names=[…]`: every sample of a batch has its own adapter. In peft they are ignored for HRA, LoHa and MiSS."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from halotune import HalotuneError, PeftModel, PeftModelForSequenceClassification, TaskType, get_peft_model
from halotune.engine.injection.modules import adapted_layers, modules_to_save_wrappers

from .models import METHODS, MLP, adapted, close, composed, config, differ, every_method, layers, randomized

BASE = "__base__"
EVERYTHING = [BASE, *METHODS]
SAMPLES = len(EVERYTHING)


# -- forward


@torch.no_grad()
def test_all_methods_in_one_batch(crowd: PeftModel, plain: MLP):
    x = torch.randn(2 * SAMPLES, 3, 7, dtype=torch.float64)
    names = [*EVERYTHING, *EVERYTHING[::-1]]
    crowd.set_adapter("lora-r2")  # what is active does not matter
    y = crowd(x, adapter_names=names)
    expected = {n: composed(plain, crowd, [n])(x) for n in EVERYTHING}
    close(y, torch.stack([expected[n][i] for i, n in enumerate(names)]))
    assert all(differ(expected[n], expected[BASE]) for n in METHODS)
    close(crowd(x), expected["lora-r2"])  # nothing of the call is left


@every_method
@torch.no_grad()
def test_each_method_beside_the_base(crowd: PeftModel, plain: MLP, x: Tensor, method: str):
    expected, base = composed(plain, crowd, [method])(x), plain(x)
    for used in ([1, 0, 0, 1, 0], [0, 0, 1, 1, 1], [1] * 5, [0] * 5):
        y = crowd(x, adapter_names=[method if u else BASE for u in used])
        close(y, torch.where(torch.tensor(used, dtype=torch.bool)[:, None, None], expected, base))


@torch.no_grad()
def test_adapters_on_different_layers_with_scales(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4", ["up"]), b=config("bat-r3", ["stem", "down"]))
    model.set_scale("a", 0.3)
    model.set_scale("b", -1.2)
    a, b = (composed(plain, model, [n], {"a": 0.3, "b": -1.2})(x) for n in "ab")
    names = ["b", "a", BASE, "a", "b"]
    close(model(x, adapter_names=names), torch.stack([b[0], a[1], plain(x)[2], a[3], b[4]]))


class Classifier(nn.Module):
    """A trunk and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.score = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.trunk(x)))


@torch.no_grad()
def test_fully_fine_tuned_heads_go_with_their_samples():
    """Each adapter has its own copy of the head; the base, and an adapter without one, the original."""
    plain, x = Classifier().double(), torch.randn(5, 6, dtype=torch.float64)
    heads = {"modules_to_save": ["score"]}
    model = adapted(
        plain,
        a=config("hra-r4", ["trunk"], **heads),
        b=config("loha-r5", ["trunk"], **heads),
        c=config("bat-r3", ["trunk"]),
    )
    names = ["c", "b", BASE, "a", "b"]
    y = model(x, adapter_names=names)
    alone = {}
    for n in "abc":
        expected = composed(plain, model, [n])
        if n != "c":
            expected.score.load_state_dict(model.get_base_model().score.modules_to_save[n].state_dict())
        alone[n] = expected(x)
    alone[BASE] = plain(x)
    close(y, torch.stack([alone[n][i] for i, n in enumerate(names)]))
    assert differ(alone["a"], alone["b"]) and differ(alone["a"], composed(plain, model, ["a"])(x))


@torch.no_grad()
def test_a_language_model_that_classifies():
    plain = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=37,
            hidden_size=12,
            intermediate_size=18,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_labels=3,
            pad_token_id=0,
        )
    ).double()
    configs = {n: config(n, ["q_proj", "v_proj", "down_proj"], task_type=TaskType.SEQ_CLS) for n in METHODS}
    model = adapted(plain.eval(), **configs)
    assert isinstance(model, PeftModelForSequenceClassification)
    ids = torch.randint(3, 37, (SAMPLES, 6))
    mask = torch.ones_like(ids)
    ids[::3, 4:] = mask[::3, 4:] = 0
    y = model(input_ids=ids, attention_mask=mask, adapter_names=EVERYTHING).logits
    for i, name in enumerate(EVERYTHING):
        if name == BASE:
            alone = plain(input_ids=ids, attention_mask=mask).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids, attention_mask=mask).logits
        close(y[i], alone[i])
    with pytest.raises(HalotuneError, match="score: hra-r4, lora-r2 each hold a trained copy"):
        model.set_adapter(["hra-r4", "lora-r2"])  # every task adapter brings a head


# -- generate


@pytest.fixture(scope="module")
def writer() -> PeftModel:
    """A language model with every method."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(2)
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=12,
            intermediate_size=18,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return adapted(plain.double().eval(), **{n: config(n, ["q_proj", "v_proj", "down_proj"]) for n in METHODS})


HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "all beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    # The most likely of one candidate: sampling that can be compared.
    "sampling": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
}


@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_generate(writer: PeftModel, how: str):
    options = {**HOW[how], "max_new_tokens": 4, "pad_token_id": 0}
    ids = torch.randint(1, 37, (SAMPLES, 5))
    together = writer.generate(input_ids=ids, adapter_names=EVERYTHING, **options)
    each = together.view(SAMPLES, -1, 9)
    assert each.shape[1] == options.get("num_return_sequences", 1)
    for i, name in enumerate(EVERYTHING):
        if name == BASE:
            with writer.disable_adapter():
                alone = writer.generate(input_ids=ids[i : i + 1], **options)
        else:
            writer.set_adapter(name)
            alone = writer.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(each[i], alone), name
    with writer.disable_adapter():
        base = writer.generate(input_ids=ids, **options).view(SAMPLES, -1, 9)
    changed = sum(not torch.equal(each[i], base[i]) for i in range(1, SAMPLES))
    assert changed > SAMPLES // 2 and torch.equal(each[0], base[0])


@torch.no_grad()
def test_generate_with_an_encoder():
    """The encoder sees a row per sample, the decoder a row per beam."""
    plain = T5ForConditionalGeneration(
        T5Config(vocab_size=37, d_model=12, d_kv=6, d_ff=18, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    plain.generation_config.eos_token_id = None
    model = adapted(plain.double().eval(), a=config("hra-r4", ["q", "wo"]), b=config("bat-r3", ["v", "wi"]))
    ids, names = torch.randint(1, 37, (4, 5)), ["b", "a", BASE, "b"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = model.generate(ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        alone = composed(plain, model, [] if name == BASE else [name]).generate(ids[i : i + 1], **options)
        assert torch.equal(together[i : i + 1], alone)


# -- training


@every_method
def test_gradients_are_those_of_the_samples(plain: MLP, x: Tensor, method: str):
    model = adapted(plain, a=config(method), b=config("hra-r3", ["up", "down"]), c=config(method))
    model.set_adapter(["a", "b", "c"])
    names = ["a", "b", BASE, "a", "b"]
    model(x, adapter_names=names).square().sum().backward()
    mixed = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".adapters.")[1][0] for n in mixed} == {"a", "b"}  # nothing for c
    model.zero_grad()
    for name in "ab":
        model.set_adapter(name)
        model(x[[i for i, n in enumerate(names) if n == name]]).square().sum().backward()
    alone = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    for n in mixed:
        close(mixed[n], alone[n])


# -- what is refused


@torch.no_grad()
def test_unknown_names(crowd: PeftModel, x: Tensor):
    known = ", ".join(f"'{n}'" for n in sorted(METHODS))
    with pytest.raises(HalotuneError, match=rf"\['bose'\]; the model has \[{known}\], and '__base__' for none"):
        crowd(x, adapter_names=["hra-r4", "bose", BASE, BASE, BASE])
    with pytest.raises(HalotuneError, match="adapter_names: empty"):
        crowd(x=x, adapter_names=[])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@torch.no_grad()
def test_wrong_count(writer: PeftModel, n: int):
    """Also a divisor of the batch, which could pass for samples that have become several rows."""
    ids = torch.randint(1, 37, (6, 5))
    for call in (
        lambda: writer(ids, adapter_names=["hra-r4"] * n),
        lambda: writer(input_ids=ids, adapter_names=["hra-r4"] * n),
        lambda: writer(inputs_embeds=torch.zeros(6, 5, 12).double(), adapter_names=["hra-r4"] * n),
        lambda: writer.generate(ids, adapter_names=["hra-r4"] * n, max_new_tokens=1),
        lambda: writer.generate(inputs=ids, adapter_names=["hra-r4"] * n, max_new_tokens=1),
    ):
        with pytest.raises(HalotuneError, match=f"{n} names for a batch of 6 samples. Give one name per sample"):
            call()


@torch.no_grad()
def test_a_count_that_only_a_layer_can_tell(crowd: PeftModel, plain: MLP, x: Tensor):
    with pytest.raises(HalotuneError, match=r"2 names, but stem got 5 rows.*one name per sample"):
        crowd(x=x, adapter_names=["hra-r4", BASE])  # an argument that we do not know by name
    crowd.set_adapter("hra-r4")
    close(crowd(x), composed(plain, crowd, ["hra-r4"])(x))  # nothing of the failed call is left


@torch.no_grad()
def test_not_while_merged_or_disabled(plain: MLP, x: Tensor):
    model = adapted(plain, a=config("hra-r4", ["up"]), b=config("lora-r2", ["down"]))
    model.merge_adapter(["a"])
    with pytest.raises(HalotuneError, match=r"adapters are merged.*unmerge_adapter\(\)"):
        model(x, adapter_names=["b"] * 5)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(HalotuneError, match=r"disabled.*name '__base__'"):
        model(x, adapter_names=["b"] * 5)
    close(model(x, adapter_names=["b"] * 5), composed(plain, model, ["b"])(x))


@torch.no_grad()
def test_threads_have_batches_of_their_own(crowd: PeftModel, x: Tensor):
    """Some with names, of several sizes, some without, on one model at once."""
    crowd.set_adapter("lora-r2")
    calls = [(x, {}), (x, {"adapter_names": ["hra-r4", BASE] * 2 + ["lora-r2"]}), (x[:2], {"adapter_names": [BASE, "hra-r4"]})]
    expected = [crowd(x, **kwargs) for x, kwargs in calls]
    wrong: list[str] = []

    def run(i: int) -> None:
        for _ in range(30):
            try:
                close(crowd(calls[i][0], **calls[i][1]), expected[i])
            except Exception as e:
                wrong.append(repr(e))

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1, 2) * 2]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, (len(wrong), wrong[0])


def test_not_with_checkpointed_blocks(writer: PeftModel):
    model = copy.deepcopy(writer).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # transformers 5's name
    ids = torch.randint(1, 37, (2, 5))
    with pytest.raises(HalotuneError, match="gradient checkpointing off, or train one adapter at a time"):
        model(input_ids=ids, adapter_names=["hra-r4", BASE])
    model.eval()
    with torch.no_grad():
        assert differ(*model(input_ids=ids[[0, 0]], adapter_names=["hra-r4", BASE]).logits)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(6, 9), nn.Bilinear(9, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.up(x), x)


@torch.no_grad()
def test_not_through_a_fully_fine_tuned_module_of_two_inputs():
    model = get_peft_model(TwoInputs(), config("hra-r4", ["up"], modules_to_save=["mix"]), "a")
    randomized(model)
    x = torch.randn(2, 6)
    assert model(x).shape == (2, 4)
    with pytest.raises(HalotuneError, match="Bilinear, fully fine-tuned, is called with more than one input"):
        model(x, adapter_names=["a", BASE])
    layers_and_wholes = [*adapted_layers(model).values(), *modules_to_save_wrappers(model).values()]
    assert [m.rows for m in layers_and_wholes] == [None, None] and len(layers(model)) == 1


# -- where the first dimension is not the batch, or may not be


class Layout(nn.Module):
    """Tokens, then a layer that sees them in some layout."""

    def __init__(self, how: str, batch_first: bool | None = None) -> None:
        super().__init__()
        self.emb, self.layer, self.how = nn.Embedding(20, 6), nn.Linear(6, 6), how
        if batch_first is not None:
            self.batch_first = batch_first

    def forward(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        x = self.emb(input_ids)
        if self.how == "sequence first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "flat":
            return self.layer(x.flatten(0, 1)).view_as(x)
        if self.how == "windows":
            return self.layer(x.unflatten(1, (2, -1)).flatten(0, 1)).view_as(x)
        if self.how == "images":
            assert pixels is not None
            return x + self.layer(pixels).mean()
        if self.how == "pooled":
            return self.layer(x.mean(1))
        return self.layer(x)


def run_mixed(model: nn.Module, samples: int, tokens: int, **kwargs) -> None:
    """Every sample by its own adapter, or an error."""
    names = ["a", "b"] * (samples // 2)
    model = adapted(model.double().eval(), a=config("hra-r4", ["layer"]), b=config("bat-r3", ["layer"]))
    ids = torch.randint(20, (samples, tokens))
    expected = {}
    for n in "ab":
        model.set_adapter(n)
        expected[n] = model(input_ids=ids, **kwargs)
    y = model(input_ids=ids, adapter_names=names, **kwargs)
    close(y, torch.stack([expected[n][i] for i, n in enumerate(names)]))


NOT_PROVEN = r"adapter_names: layer got an input .* do not prove that the first dimension is the batch"


@pytest.mark.parametrize("how", ["batch first", "flat", "pooled"])
@pytest.mark.parametrize("tokens", [3, 4, 8])
@torch.no_grad()
def test_sizes_prove_the_batch(how: str, tokens: int):
    run_mixed(Layout(how), 2, tokens)
    run_mixed(Layout(how), 4, tokens + 2)


@torch.no_grad()
def test_several_rows_of_a_sample_where_the_model_says_so():
    run_mixed(Layout("windows", batch_first=True), 2, 8)


@pytest.mark.parametrize("how", ["sequence first", "windows"])
@pytest.mark.parametrize("tokens", [4, 8])
@torch.no_grad()
def test_another_first_dimension_is_refused(how: str, tokens: int):
    with pytest.raises(HalotuneError, match=NOT_PROVEN):
        run_mixed(Layout(how), 2, tokens)


@torch.no_grad()
def test_sizes_that_are_equal_by_chance():
    """As many tokens as samples: what the model says decides."""
    for how in ("batch first", "sequence first"):
        with pytest.raises(HalotuneError, match=NOT_PROVEN):
            run_mixed(Layout(how), 4, 4)
    run_mixed(Layout("batch first", batch_first=True), 4, 4)
    with pytest.raises(HalotuneError, match=NOT_PROVEN):
        run_mixed(Layout("sequence first", batch_first=False), 4, 4)
    with pytest.raises(HalotuneError, match=NOT_PROVEN):
        run_mixed(Layout("flat", batch_first=False), 4, 3)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@torch.no_grad()
def test_models_of_transformers_have_the_batch_first(compiled: bool):
    """Where nothing else decides. There are as many tokens as samples."""
    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=37, **sizes)).double().eval()
    run = torch.compile(plain, backend="eager") if compiled else plain
    model = adapted(run, a=config("hra-r4", ["q_proj", "down_proj"]), b=config("bat-r3", ["q_proj", "down_proj"]))
    ids, expected = torch.randint(3, 37, (2, 2)), {}
    for n in "ab":
        model.set_adapter(n)
        expected[n] = model(input_ids=ids).logits
    close(model(input_ids=ids, adapter_names=["a", "b"]).logits, torch.stack([expected["a"][0], expected["b"][1]]))


@torch.no_grad()
def test_so_have_models_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    kind: type[Layout] = type("Model", (Layout, diffusers.ModelMixin), {})
    run_mixed(kind("batch first"), 4, 4)


@torch.no_grad()
def test_but_for_those_that_transpose():
    plain = XLNetModel(XLNetConfig(d_model=12, vocab_size=37, d_inner=18, n_layer=1, n_head=2)).eval()
    model = adapted(plain, a=config("hra-r4", ["layer_1"]), b=config("hra-r4", ["layer_1"]))
    with pytest.raises(HalotuneError, match=NOT_PROVEN.replace("layer", r"layer\.0\.ff\.layer_1")):
        model(input_ids=torch.randint(3, 37, (2, 2)), adapter_names=["a", "b"])


@torch.no_grad()
def test_packed_images_are_refused_though_they_are_as_many_as_tokens():
    with pytest.raises(HalotuneError, match=NOT_PROVEN):
        run_mixed(Layout("images"), 2, 4, pixels=torch.randn(8, 6, dtype=torch.float64))


class Routed(nn.Module):
    """Two experts, each with as many tokens as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.experts = nn.Embedding(20, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids).flatten(0, 1)
        return torch.cat([self.experts[0](x[:2]), self.experts[1](x[2:])])


@torch.no_grad()
def test_what_an_expert_got_is_refused():
    model = adapted(Routed().double(), a=config("hra-r4", ["0", "1"]), b=config("hra-r4", ["0", "1"]))
    with pytest.raises(HalotuneError, match=r"adapter_names: experts\.0 got an input \(2, 6\) for a batch of 2"):
        model(input_ids=torch.randint(20, (2, 2)), adapter_names=["a", "b"])
