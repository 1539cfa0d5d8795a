"""Bases that accelerate keeps on the CPU or on disk, and bases on the meta device: adapters live where they run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from safetensors.torch import load_file
from torch import Tensor, nn

from halotune import HalotuneError, HRAConfig, PeftModel, get_peft_model, hotswap_adapter
from halotune.core.kinds import Dense

from ..laws.cases import matrix
from ..several.models import METHODS, MLP, adapted, config, differ, every_method, layers, randomized, same_state, state

Offload = Callable[[nn.Module], nn.Module]


@pytest.fixture(params=["cpu", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    """Leaves a model's weights on the meta device, and brings each to the CPU for the time of a call."""
    if request.param == "cpu":
        return lambda model: cpu_offload(model, execution_device=torch.device("cpu"))
    return lambda model: disk_offload(model, tmp_path / "offloaded", execution_device=torch.device("cpu"))


@pytest.fixture
def plain() -> MLP:
    return MLP().eval().requires_grad_(False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 7)


def pair(plain: nn.Module, offload: Offload, **configs) -> tuple[PeftModel, PeftModel]:
    """The same adapters on an offloaded copy of a model, and on one that is all there."""
    (first, *others) = configs.items()
    ours = get_peft_model(offload(copy.deepcopy(plain)), first[1], first[0])
    for name, other in others:
        ours.add_adapter(name, other)
    theirs = adapted(plain, **configs)
    for a, b in zip(layers(ours).values(), layers(theirs).values(), strict=True):
        a.adapters.load_state_dict(b.adapters.state_dict())
    return ours.train(plain.training), theirs


def assert_lives_where_it_runs(model: PeftModel) -> None:
    """No base weight has come back to stay, and no adapter was left behind."""
    for name, p in model.named_parameters():
        assert p.is_meta is (".adapters." not in name), name


def near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: over weights that are all there, the sums are fused otherwise."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm()) <= 1e-5 * float(b.norm())


# -- every method


@every_method
def test_outputs_and_gradients_are_the_same(plain: MLP, x: Tensor, offload: Offload, method: str):
    ours, theirs = pair(plain, offload, default=config(method))
    assert_lives_where_it_runs(ours)
    x = x.requires_grad_()
    found = []
    for model in (ours, theirs):
        y = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    assert len(found[0]) > 6 and all(near(a, b) for a, b in zip(*found, strict=True))
    assert_lives_where_it_runs(ours)
    assert differ(found[0][0], plain(x))


@every_method
@torch.no_grad()
def test_merge_disable_unmerge(plain: MLP, x: Tensor, offload: Offload, method: str):
    ours, theirs = pair(plain, offload, default=config(method))
    y = ours(x)
    reports = [model.merge_adapter().to_dict() for model in (ours, theirs)]
    assert reports[0] == reports[1] and reports[0]["total"]["delta"] > 0
    assert torch.equal(ours(x), theirs(x))
    assert_lives_where_it_runs(ours)
    with ours.disable_adapter():
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours(x), theirs(x))  # merged again
    ours.unmerge_adapter()
    assert torch.equal(ours(x), y)
    with ours.disable_adapter():
        assert torch.equal(ours(x), plain(x))

    theirs.unmerge_adapter()
    out, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert torch.equal(out(x), expected(x)) and differ(out(x), plain(x))
    assert all(p.is_meta for p in out.parameters()) and out.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_unload_gives_the_offloaded_model_back(plain: MLP, x: Tensor, offload: Offload):
    ours, _ = pair(plain, offload, default=config("bat-r3"))
    ours.merge_adapter()
    out = ours.unload()
    assert torch.equal(out(x), plain(x)) and all(p.is_meta for p in out.parameters())


@torch.no_grad()
def test_the_offloaded_weights_are_never_written_to(plain: MLP, x: Tensor, offload: Offload):
    """A merge lies over them: another model may share them, and on disk they cannot be restored."""
    ours, _ = pair(plain, offload, default=config("hra-r4"))
    maps = {p: layer.base_layer._hf_hook.weights_map for p, layer in layers(ours).items()}
    ours.merge_adapter()
    for path, weights_map in maps.items():
        assert torch.equal(weights_map["weight"], plain.get_submodule(path).weight)
        base = layers(ours)[path].base_layer
        now, others = base._hf_hook.weights_map, {n for n, _ in base.named_parameters()} - {"weight"}
        assert differ(now["weight"], weights_map["weight"]) and all(torch.equal(now[n], weights_map[n]) for n in others)


# -- several adapters


@torch.no_grad()
def test_several(plain: MLP, x: Tensor, offload: Offload):
    ours, theirs = pair(plain, offload, **{n: config(n) for n in METHODS})
    names = ["hra-r4", "bat-r3", "loha-r5"]
    mixed = ["bone-r7", "__base__", "hra-r3", "loha-r2", "miss-bat-r3"]
    found = []
    for model in (ours, theirs):
        model.set_adapter(names)
        found.append([model(x), model(x, adapter_names=mixed)])
        model.set_scale("bat-r3", 0.3)
        model.merge_adapter(["hra-r4"])
        model.merge_adapter(["bat-r3"])  # over a weight that was merged into
        found[-1].append(model(x))
        model.unmerge_adapter()
        model.add_weighted_adapter(["hra-r4", "loha-r2"], [0.5, 2], "sum", "lora")
        model.set_adapter("sum")
        found[-1].append(model(x))
        model.delete_adapter("hra-r4")
        found[-1].append(model(x))
    assert all(near(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == 5
    assert_lives_where_it_runs(ours)


# -- files


@every_method
@torch.no_grad()
def test_an_adapter_loaded_onto_an_offloaded_base(plain: MLP, x: Tensor, offload: Offload, tmp_path, method: str):
    trained = adapted(plain, default=config(method))
    trained.save_pretrained(tmp_path / "a")
    ours = PeftModel.from_pretrained(offload(copy.deepcopy(plain)), tmp_path / "a")
    assert near(ours(x), trained(x))
    assert_lives_where_it_runs(ours)

    ours.save_pretrained(tmp_path / "again")  # nothing of the base is needed
    assert near(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "again")(x), trained(x))
    ours.load_adapter(tmp_path / "a", "b")
    randomized(trained)
    trained.save_pretrained(tmp_path / "a")
    hotswap_adapter(ours, tmp_path / "a", "b")
    ours.set_adapter("b")
    assert near(ours(x), trained(x))
    assert_lives_where_it_runs(ours)


# -- memory


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


LAYERS = {
    "linear": (lambda: nn.Linear(15, 21), (20, 15)),
    "conv": (lambda: nn.Conv1d(6, 9, 2), (3, 6, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", ["bat-r3", "miss-bat-r3", "loha-r5"])
def test_the_dense_form_keeps_no_copy_of_the_weight_for_backward(offload: Offload, method: str, layer: str):
    build, size = LAYERS[layer]
    plain = OneLayer(build()).requires_grad_(False)
    ours, theirs = pair(plain, offload, default=config(method, ["up"]))
    assert isinstance(layers(ours)["up"].adapters["default"], Dense)
    W, x, kept, gradients = matrix(plain.up), torch.randn(size, requires_grad=True), [], []

    def pack(t: Tensor) -> Tensor:
        kept[-1].append(t.numel())
        return t

    for model in (ours, theirs):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *trained]))
    assert x.numel() != W.numel() != y.numel()
    assert W.numel() not in kept[0] and W.numel() in kept[1]  # there it is the parameter itself
    assert all(near(a, b) for a, b in zip(*gradients, strict=True))


# -- accelerate's other ways


@torch.no_grad()
def test_a_device_map(language_model, tmp_path):
    """Some blocks offloaded, others at home."""
    plain, ids = language_model.requires_grad_(False), torch.randint(3, 37, (2, 5))
    adapter = config("hra-r4", ["q_proj", "down_proj"])
    theirs = adapted(plain, default=adapter)
    theirs.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    base = dispatch_model(copy.deepcopy(plain), places, main_device="cpu", offload_dir=tmp_path / "offloaded")
    assert base.model.layers[0].mlp.down_proj.weight.is_meta and not base.model.layers[1].mlp.down_proj.weight.is_meta
    ours = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert near(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert differ(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    for model in (ours, theirs):
        model.merge_adapter()
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["hra-r4", "loha-r2", "loha-r5", "bone-r7", "bat-r3", "oft-b3", "lora-r2"])
def test_a_model_larger_than_memory(language_model, tmp_path, method: str):
    """`device_map="auto"`: transformers keeps on disk what no device has room for. Trained, generating, saved, merged."""
    plain, ids = language_model.requires_grad_(False), torch.randint(3, 37, (2, 5))
    plain.save_pretrained(tmp_path / "base")
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    where = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": tmp_path / "disk"}
    base = type(plain).from_pretrained(tmp_path / "base", **where)
    assert {"cpu", "disk"} == set(base.hf_device_map.values())
    away = {name for name, p in base.named_parameters() if p.is_meta}
    adapter = config(method, ["q_proj", "o_proj"] if method == "bat-r3" else ["q_proj", "down_proj", "lm_head"])
    theirs = adapted(plain, default=adapter)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    losses: list[Tensor] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    assert all(near(a, b) for a, b in zip(losses[:3], losses[3:], strict=True)) and losses[2] < losses[0]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    ours.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "trained")
    with torch.no_grad():
        y = ours(input_ids=ids).logits
        assert near(again(input_ids=ids).logits, y) and differ(y, plain(input_ids=ids).logits)
        if method not in ("bat-r3", "oft-b3"):  # whose deltas are of full rank
            ours.export("lora", tmp_path / "lora")
            exported = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")
            assert torch.allclose(exported(input_ids=ids).logits, y, atol=1e-4)
        assert torch.allclose(ours.merge_and_unload()(input_ids=ids).logits, y, atol=1e-4)
    assert {name for name, p in base.named_parameters() if p.is_meta} == away  # and nothing has come to stay


@torch.no_grad()
def test_embeddings_of_a_file_and_an_offloaded_base(language_model, tmp_path):
    """Those that the base has already need no place; others have none."""
    model = adapted(language_model, default=config("hra-r4", ["lm_head"]))
    model.save_pretrained(tmp_path / "same")
    model.get_base_model().lm_head.weight[3] = 1.0
    model.save_pretrained(tmp_path / "other")
    base = cpu_offload(language_model, execution_device=torch.device("cpu"))
    ours = PeftModel.from_pretrained(base, tmp_path / "same")
    ours.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("same", "again"))
    assert first.keys() == again.keys() and all(torch.equal(t, again[key]) for key, t in first.items()) and len(first) == 2
    with pytest.raises(
        HalotuneError, match=r"lm_head\.base_layer\.weight: embeddings that differ .* out of accelerate's offloading"
    ):
        ours.load_adapter(tmp_path / "other", "b")
    assert list(ours.peft_config) == ["default"]


# -- what is refused: it would get no gradient, or would not run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "hra_only"}, r"bias='hra_only': 'stem' is offloaded by accelerate, so its bias cannot be trained"),
        ({"bias": "all"}, r"bias='all': 'stem' is offloaded"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' is offloaded by accelerate, so no copy of it can be"),
        ({"modules_to_save": ["blocks.1.up"]}, r"modules_to_save: 'blocks\.1\.up' is offloaded"),
    ],
)
def test_training_parts_of_the_base(plain: MLP, x: Tensor, offload: Offload, changes: dict, message: str):
    base = offload(copy.deepcopy(plain))
    modules = list(base.modules())
    with pytest.raises(HalotuneError, match=message):
        get_peft_model(base, HRAConfig(r=4, target_modules=["stem", "up"], **changes))
    assert list(base.modules()) == modules and torch.equal(base(x), plain(x))


def test_training_biases_elsewhere(plain: MLP, x: Tensor):
    """What is not offloaded can be trained."""
    cpu_offload(plain.head, execution_device=torch.device("cpu"))
    model = get_peft_model(plain, HRAConfig(r=4, target_modules=["up"], bias="hra_only"))
    model(x).sum().backward()
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert trained == {"bias", "hra_u"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("target", ["in_proj", "out_proj", "attn"])
@pytest.mark.parametrize("preload", [None, ["MultiheadAttention"]])
def test_offloaded_attention(target: str, preload: list[str] | None):
    base = cpu_offload(Attention(), execution_device=torch.device("cpu"), preload_module_classes=preload)
    with pytest.raises(HalotuneError, match=r"'attn\.\w+': accelerate offloads 'attn(\.out_proj)?'"):
        get_peft_model(base, config("hra-r4", [target]))


def test_a_block_offloaded_as_one(plain: MLP, x: Tensor):
    base = nn.ModuleList([copy.deepcopy(plain)])
    base.forward = lambda x: base[0](x)
    cpu_offload(base, execution_device=torch.device("cpu"), preload_module_classes=["MLP"])
    with pytest.raises(HalotuneError, match=r"'0\.stem': accelerate offloads '0' as one block.*preload_module_classes"):
        get_peft_model(base, config("hra-r4"))
    assert torch.equal(base(x), plain(x))


# -- the meta device


@every_method
@torch.no_grad()
def test_a_base_on_the_meta_device(plain: MLP, x: Tensor, method: str):
    """The model is laid out before there are weights, which then come from a state dict."""
    with torch.device("meta"):
        base = MLP()
    model = get_peft_model(base.eval(), config(method))
    assert all(p.is_meta for p in model.parameters())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [n for n, _ in model.named_parameters() if ".adapters." in n] != []
    assert model(x.to("meta")).shape == (5, 7, 4)

    filled = adapted(plain, default=config(method))
    model.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(model(x), filled(x)) and same_state(model, state(filled))
