"""torch.nn.MultiheadAttention and the modules of torch that hold it: adapted as weights, fused kernels included."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from halotune import HalotuneError, LoHaConfig, LoraConfig, MissConfig, PeftModel, get_peft_model
from halotune.core.attention import AdaptedAttention
from halotune.core.layer import AdaptedLayer

from ..several.models import adapted, close, config, differ, every_method, layers, same_state, state


class Block(nn.Module):
    """A model around an attention."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        return self.attn(q, k, v, **options)


def parameter(plain: nn.Module, path: str) -> nn.Parameter:
    """The weight that an adapted layer stands for, in a model that was never wrapped."""
    path = path.replace(".base_layer.", ".")
    owner, _, name = path.rpartition(".")
    attention = plain.get_submodule(owner)
    if isinstance(attention, nn.MultiheadAttention) and name != "out_proj":
        return getattr(attention, f"{name}_weight")
    return plain.get_submodule(path).weight


@torch.no_grad()
def composed(plain: nn.Module, model: PeftModel, names: Sequence[str]) -> nn.Module:
    """A copy of the plain model with the weights that these adapters make."""
    out = copy.deepcopy(plain)
    for path, layer in layers(model).items():
        W = parameter(out, path)
        for name in names:
            if name in layer.adapters:
                W.copy_(layer.adapters[name].weight(W))
    return out


def frozen(module: nn.Module) -> nn.Module:
    """In float64, in eval mode, with no bias that is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.double().eval().requires_grad_(False)


def tensor(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


# -- the module itself

KINDS: dict[str, tuple[dict, Sequence[tuple[int, ...]], list[str]]] = {
    "self": ({}, [(5, 3, 6)], ["in_proj", "out_proj"]),
    "batch first": ({"batch_first": True}, [(3, 5, 6)], ["in_proj", "out_proj"]),
    "unbatched": ({}, [(5, 6)], ["in_proj"]),
    "no bias": ({"bias": False, "batch_first": True}, [(3, 5, 6)], ["in_proj", "out_proj"]),
    "bias_kv": ({"add_bias_kv": True, "add_zero_attn": True}, [(5, 3, 6)], ["in_proj", "out_proj"]),
    "cross": ({}, [(4, 3, 6), (5, 3, 6), (5, 3, 6)], ["in_proj"]),
    "out_proj": ({"batch_first": True}, [(3, 5, 6)], ["out_proj"]),
    "whole": ({}, [(5, 3, 6)], ["attn"]),
    "kdim": (
        {"kdim": 9, "vdim": 3},
        [(4, 3, 6), (5, 3, 9), (5, 3, 3)],
        ["q_proj", "k_proj", "v_proj", "out_proj"],
    ),
    "k alone": ({"kdim": 9, "vdim": 3, "batch_first": True}, [(3, 4, 6), (3, 5, 9), (3, 5, 3)], ["k_proj"]),
    "kdim whole": ({"kdim": 9, "vdim": 3}, [(4, 3, 6), (5, 3, 9), (5, 3, 3)], ["attn"]),
}


def inputs(sizes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    tensors = tuple(tensor(*size) for size in sizes)
    return tensors if len(tensors) == 3 else tensors * 3


@pytest.mark.parametrize("kind", KINDS)
@every_method
def test_is_the_attention_with_other_weights(method: str, kind: str):
    """Output, attention weights, gradients of the inputs and of the adapter; in training and in eval."""
    options, sizes, targets = KINDS[kind]
    plain, qkv = frozen(Block(**options)), inputs(sizes)
    model = adapted(plain, default=config(method, targets))
    expected = composed(plain, model, ["default"])
    names = {path.rpartition(".")[2] for path in layers(model)}
    whole = ["q_proj", "k_proj", "v_proj", "out_proj"] if "kdim" in options else ["in_proj", "out_proj"]
    assert names == set(whole if targets == ["attn"] else targets)
    for grad in (False, True):  # without a gradient torch takes a fused path where there is one
        with torch.set_grad_enabled(grad):
            for y, e in zip(model(*qkv), expected(*qkv), strict=True):
                close(y, e)
            assert model(*qkv, need_weights=False)[1] is None
            close(model(*qkv, need_weights=False)[0], expected(*qkv)[0])
    assert differ(expected(*qkv)[0], plain(*qkv)[0])
    assert isinstance(model.train().get_base_model().attn, AdaptedAttention)
    close(model(*qkv)[0], expected(*qkv)[0])


@pytest.mark.parametrize("kind", ["batch first", "kdim"])
@every_method
def test_gradients(method: str, kind: str):
    """Those of torch's own attention over weights built by definition."""
    options, sizes, targets = KINDS[kind]
    plain = frozen(Block(**options))
    qkv = tuple(t.requires_grad_() for t in inputs(sizes))
    model = adapted(plain, default=config(method, targets)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 0
    made = {
        path.replace(".base_layer.", "."): layer.adapters["default"].weight(parameter(plain, path).detach())
        for path, layer in layers(model).items()
    }
    named = {p.replace("_proj", "_proj_weight").replace("out_proj_weight", "out_proj.weight"): W for p, W in made.items()}
    expected, y = torch.func.functional_call(plain, named, qkv)[0], model(*qkv)[0]
    leaves = [*dict.fromkeys(qkv), *trained]
    probe = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, leaves, probe) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    assert all(g.abs().max() > 0 for g in ours)


@pytest.mark.parametrize("mask", ["attn_mask", "float", "key_padding_mask", "both", "causal", "per head"])
@torch.no_grad()
def test_masks(mask: str):
    plain, x = frozen(Block(batch_first=True)), tensor(3, 5, 6)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[0, 3:] = hidden[1, 4:] = True
    upper = torch.ones(5, 5, dtype=torch.bool).triu(1)
    options = {
        "attn_mask": {"attn_mask": upper},
        "float": {"attn_mask": tensor(5, 5)},
        "key_padding_mask": {"key_padding_mask": hidden},
        "both": {"attn_mask": upper, "key_padding_mask": hidden},
        "causal": {"attn_mask": upper, "is_causal": True, "need_weights": False},
        "per head": {"attn_mask": tensor(6, 5, 5), "average_attn_weights": False},
    }[mask]
    model = adapted(plain, default=config("hra-r4", ["attn"]))
    expected = composed(plain, model, ["default"])
    for y, e in zip(model(x, x, x, **options), expected(x, x, x, **options), strict=True):
        assert (y is None and e is None) or close(y, e) is None
    assert differ(model(x, x, x, **options)[0], model(x, x, x)[0])


@torch.no_grad()
def test_several_and_scaled():
    plain, qkv = frozen(Block()), inputs([(5, 3, 6)])
    model = adapted(plain, a=config("hra-r4", ["attn"]), b=config("bat-r3", ["in_proj"]), c=config("hra-r3", ["out_proj"]))
    for names in (["a", "b", "c"], ["c", "b", "a"], ["b"], ["c"]):
        model.set_adapter(names)
        close(model(*qkv)[0], composed(plain, model, names)(*qkv)[0])
    model.set_scale("c", 0)
    close(model(*qkv)[0], plain(*qkv)[0])
    with model.disable_adapter():
        assert torch.equal(model(*qkv)[0], plain(*qkv)[0])
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    close(model(*qkv)[0], composed(plain, model, ["b"])(*qkv)[0])


# -- merging, files, copies


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["batch first", "kdim"])
@every_method
@torch.no_grad()
def test_merge_and_unmerge(method: str, kind: str, dtype: torch.dtype):
    options, sizes, targets = KINDS[kind]
    plain, qkv = frozen(Block(**options)).to(dtype), tuple(t.to(dtype) for t in inputs(sizes))
    model = adapted(plain, default=config(method, targets))
    before, y = state(model), model(*qkv)[0]
    report = model.merge_adapter()
    assert set(report.layers) == set(layers(model))
    for path, layer in layers(model).items():
        W = parameter(plain, path)
        exact = layer.adapters["default"].weight(W.to(torch.float64 if dtype == torch.float64 else torch.float32))
        assert torch.equal(layer.base.weight(), exact.to(dtype))
    if dtype == torch.float64:
        close(model(*qkv)[0], y)
    model.unmerge_adapter()
    assert same_state(model, before) and torch.equal(model(*qkv)[0], y)

    model.merge_adapter()
    merged = model(*qkv)[0]
    model.unmerge_adapter()
    out = model.merge_and_unload()
    assert type(out.attn) is nn.MultiheadAttention and out.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(out(*qkv)[0], merged) and not same_state(out, state(plain))


@torch.no_grad()
def test_unload_gives_the_original_back():
    plain, qkv = frozen(Block()), inputs([(5, 3, 6)])
    original, before = plain.attn, state(plain)
    model = get_peft_model(plain, config("bat-r3", ["attn"]))
    model.merge_adapter()
    assert model.unload() is plain and plain.attn is original
    assert same_state(plain, before) and model is not None
    assert type(original.out_proj).__name__ == "NonDynamicallyQuantizableLinear" and plain(*qkv)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["self", "kdim", "out_proj"])
@every_method
@torch.no_grad()
def test_saved_and_loaded(tmp_path, method: str, kind: str):
    options, sizes, targets = KINDS[kind]
    plain, qkv = frozen(Block(**options)), inputs(sizes)
    model = adapted(plain, default=config(method, targets))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert torch.equal(loaded(*qkv)[0], model(*qkv)[0]) and differ(loaded(*qkv)[0], plain(*qkv)[0])
    assert same_state(loaded, state(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_method
@torch.no_grad()
def test_copies_are_their_own(method: str, copied):
    plain, qkv = frozen(Block()), inputs([(5, 3, 6)])
    model = adapted(plain, default=config(method, ["attn"]))
    y = model(*qkv)[0]
    duplicate = copied(model)
    assert torch.equal(duplicate(*qkv)[0], y)
    assert not {id(p) for p in duplicate.parameters()} & {id(p) for p in model.parameters()}
    duplicate.merge_adapter()
    for p in duplicate.parameters():
        p.zero_()
    assert torch.equal(model(*qkv)[0], y) and differ(duplicate(*qkv)[0], y)
    model.merge_adapter()  # the original writes to its own weights still
    close(model.merge_and_unload()(*qkv)[0], y)


# -- what is refused


@pytest.mark.parametrize(
    "options",
    [
        LoraConfig(lora_dropout=0.1),
        LoHaConfig(rank_dropout=0.1),
        LoHaConfig(module_dropout=0.1),
        MissConfig(miss_dropout=0.1),
    ],
    ids=["lora", "loha rank", "loha module", "miss"],
)
@pytest.mark.parametrize("target", ["in_proj", "out_proj", "attn"])
def test_dropout(options, target: str):
    plain = Block()
    options.target_modules = {target}
    before = dict(plain.named_modules())
    with pytest.raises(HalotuneError, match=r"attn.*adapted as weights, where dropout is not defined; got 0.1"):
        get_peft_model(plain, options)
    assert dict(plain.named_modules()) == before


@torch.no_grad()
def test_adapter_names():
    plain, qkv = frozen(Block(batch_first=True)), inputs([(3, 5, 6)])
    for target in ("in_proj", "out_proj"):
        model = adapted(plain, a=config("hra-r4", [target]))
        with pytest.raises(HalotuneError, match="adapted as weights, which all samples share"):
            model(*qkv, adapter_names=["a", "a", "__base__"])
        close(model(*qkv)[0], composed(plain, model, ["a"])(*qkv)[0])


@pytest.mark.parametrize("target", ["in_proj", "out_proj"])
def test_an_attention_that_is_the_model_itself(target: str):
    """It could not be replaced by the module that applies adapters, which would do nothing."""
    attention = nn.MultiheadAttention(6, 2)
    with pytest.raises(HalotuneError, match=r"itself is a torch\.nn\.MultiheadAttention.*Make it a submodule"):
        get_peft_model(attention, config("hra-r4", [target]))
    assert type(attention.out_proj) is not AdaptedLayer


def test_unknown_projections_are_named():
    with pytest.raises(HalotuneError, match="The closest names are in_proj"):
        get_peft_model(Block(), config("hra-r4", ["inn_proj"]))


# -- torch's encoder, whose fused path reads weights and passes modules by


def encoder(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(6, 2, 9, batch_first=True, **options)
    return frozen(nn.TransformerEncoder(layer, 2))


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
ENCODER_TARGETS = {
    "all": ["in_proj", "out_proj", "linear1", "linear2"],
    "attention": ["self_attn"],
    "in_proj": ["in_proj"],
    "out_proj": ["out_proj"],
    "linear": ["linear1"],
    "second layer": ["layers.1.self_attn"],
}


def slow(run: Callable[[], Tensor]) -> Tensor:
    """Without torch's fused paths."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return run()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own use of them
@pytest.mark.parametrize("targets", ENCODER_TARGETS)
@every_method
@torch.no_grad()
def test_encoder(method: str, targets: str):
    plain, x = encoder(), tensor(3, 5, 6)
    model = adapted(plain, default=config(method, ENCODER_TARGETS[targets]))
    expected = composed(plain, model, ["default"])
    y, masked = model(x), model(x, src_key_padding_mask=PADDED)
    close(y, slow(lambda: expected(x)))
    close(masked[~PADDED], slow(lambda: expected(x, src_key_padding_mask=PADDED))[~PADDED])
    close(masked[~PADDED], expected(x, src_key_padding_mask=PADDED)[~PADDED])  # nested tensors
    assert differ(y, plain(x)) and differ(masked[~PADDED], plain(x, src_key_padding_mask=PADDED)[~PADDED])

    out = model.merge_and_unload()
    close(out(x), y)
    close(out(x, src_key_padding_mask=PADDED)[~PADDED], masked[~PADDED])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("how", ["unload", "merge_and_unload", "delete_adapter"])
@torch.no_grad()
def test_the_fused_path_is_taken_again_afterwards(monkeypatch, how: str):
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    plain, x = encoder(), tensor(3, 5, 6)
    attributes = [copy.copy(vars(m)) for m in plain.modules()]
    plain(x, src_key_padding_mask=PADDED)
    assert len(calls) == 2  # this is how we know that torch has such a path

    model = get_peft_model(plain, config("hra-r4", ["linear2"]))
    model(x, src_key_padding_mask=PADDED)
    assert len(calls) == 2
    getattr(model, how)(*["default"] if how == "delete_adapter" else [])
    plain(x, src_key_padding_mask=PADDED)
    assert len(calls) == 4
    assert [vars(m).keys() for m in plain.modules()] == [a.keys() for a in attributes]
    assert not any(isinstance(m, (AdaptedLayer, AdaptedAttention)) for m in plain.modules())
    assert plain.use_nested_tensor and plain.layers[0].activation_relu_or_gelu == 1


@every_method
def test_encoder_in_training(method: str):
    plain = encoder(dropout=0.0, activation="gelu").train()
    model = adapted(plain, default=config(method, ENCODER_TARGETS["all"]))
    x = tensor(3, 5, 6)
    y = model(x, src_key_padding_mask=PADDED)
    with torch.no_grad():
        close(y, composed(plain, model, ["default"])(x, src_key_padding_mask=PADDED))
    y[~PADDED].square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(layers(model)) == 8 and all(g is not None and g.abs().max() > 0 for g in gradients.values())


@torch.no_grad()
def test_a_whole_transformer_all_linear(tmp_path):
    """Decoder layers have two attentions, and their own targets."""
    plain = frozen(nn.Transformer(6, 2, 1, 1, 9, batch_first=True))
    a = config("bat-r3")
    a.target_modules = "all-linear"
    model = adapted(plain, a=a, b=config("hra-r4", ["multihead_attn"]))
    assert len(layers(model)) == 10
    source, target = tensor(2, 5, 6), tensor(2, 4, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for names in (["a"], ["b", "a"]):
        model.set_adapter(names)
        y = model(source, target, tgt_mask=mask)
        close(y, slow(lambda names=names: composed(plain, model, names)(source, target, tgt_mask=mask)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "b", "b")
    loaded.load_adapter(tmp_path / "a", "a")
    loaded.set_adapter(["b", "a"])
    assert torch.equal(loaded(source, target, tgt_mask=mask), y)


@pytest.mark.parametrize("targets", [["attn"], ["0.attn"], ["0.attn.in_proj", "1.attn.out_proj"]])
@torch.no_grad()
def test_an_attention_of_two_names(targets: list[str]):
    """Shared by two layers before, shared by them afterwards, whichever name is used."""
    first, second = Block(), Block()
    second.attn = first.attn
    plain = frozen(nn.ModuleList([first, second]))
    model = adapted(plain, a=config("hra-r4", targets), b=config("bat-r3", ["1.attn"]))
    assert all(set(layer.adapters) == {"a", "b"} for layer in layers(model).values()) and len(layers(model)) == 2
    blocks, qkv = model.get_base_model(), inputs([(5, 3, 6)])
    assert blocks[0].attn is blocks[1].attn and isinstance(blocks[0].attn, AdaptedAttention)
    model.set_adapter(["a", "b"])
    expected = composed(plain, model, ["a", "b"])
    for i in range(2):
        close(blocks[i](*qkv)[0], expected[0](*qkv)[0])
    out = model.merge_and_unload()
    assert out[0].attn is out[1].attn
    close(out[1](*qkv)[0], expected[0](*qkv)[0])


class Calling(nn.MultiheadAttention):
    """Calls its output projection, where torch's own reads its weight."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> tuple[Tensor, None]:  # type: ignore[override]
        q, k, v = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v)), None


@pytest.mark.parametrize("targets", [["in_proj", "out_proj"], ["out_proj"]], ids=str)
@every_method
@torch.no_grad()
def test_a_forward_of_its_own_that_calls_the_output_projection(method: str, targets: list[str]):
    plain, x = Block(), tensor(5, 3, 6)
    plain.attn = Calling(6, 2)
    frozen(plain)
    model = adapted(copy.deepcopy(plain), a=config(method, targets))
    expected = composed(plain, model, ["a"])(x, x, x)[0]
    close(model(x, x, x)[0], expected)
    close(model(x, x, x)[0], expected)
    close(model.merge_and_unload()(x, x, x)[0], expected)


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj"])
def test_projections_that_are_computed_are_refused(name: str):
    plain = Block()
    if name == "out_proj":
        nn.utils.parametrizations.weight_norm(plain.attn.out_proj)
    else:
        nn.utils.parametrizations.weight_norm(plain.attn, name)
    with pytest.raises(HalotuneError, match=rf"^attn.{name.removesuffix('_weight')}: .* computed from other parameters"):
        get_peft_model(plain, LoraConfig(target_modules=[name.removesuffix("_weight")]))
