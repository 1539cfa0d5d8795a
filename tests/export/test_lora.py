"""What an adapter computes, a LoRA that was exported from it computes too: in peft, and in our own LoRA."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from halotune import BoneConfig, HalotuneError, HRAConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from halotune.core.operator import WeightShape
from halotune.engine.injection.modules import adapted_layers
from halotune.export.factors import SKETCHED, TRUNCATED, factors_of, laid_out, sketched, truncated

from ..laws.cases import BASES, VARIANTS, Base, Case, Model, Variant, fits, matrix, relative, wrap
from ..several.models import randomized

BAT = [v for v in VARIANTS if v.rank is None]
LOW_RANK = [v for v in VARIANTS if v.rank is not None]
NOT_PEFTS = {"conv2d-strided": "dilation", "conv2d-grouped": "padding mode", "conv2d-reflect": "padding mode"}


def trained(case: Case) -> tuple[nn.Module, PeftModel]:
    """A plain model, and a copy of it with an adapter somewhere in training."""
    plain = Model(case.module()).eval()
    return plain, randomized(wrap(copy.deepcopy(plain), case.variant.config)).eval()


def in_peft(plain: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


def cells(variants: list[Variant], bases: list[Base]) -> pytest.MarkDecorator:
    found = [Case(v, b, torch.float32) for v in variants for b in bases if fits(v, b)]
    return pytest.mark.parametrize("case", found, ids=lambda c: c.id)


GROUPED = Base("conv2d-groups-zeros", lambda: nn.Conv2d(12, 18, (3, 2), groups=3, padding=1), (2, 12, 5, 4))
DEPTHWISE = Base("conv1d-depthwise", lambda: nn.Conv1d(6, 6, 3, groups=6, padding="same"), (2, 6, 5))


@cells(LOW_RANK, [*(b for b in BASES if b.name not in NOT_PEFTS), GROUPED, DEPTHWISE])
@torch.no_grad()
def test_peft_computes_the_same(case: Case, tmp_path: Path):
    plain, model = trained(case)
    report = model.export("lora", tmp_path)
    x = case.input()
    theirs = in_peft(plain, tmp_path)(x)
    assert relative(model(x), plain(x)) > 1e-3
    assert relative(theirs, model(x)) < 1e-5
    shape = next(iter(adapted_layers(model).values())).base.shape
    needed = min(case.variant.rank or 0, shape.out_features, shape.in_features)
    assert report.exact and report.rank == needed * shape.groups


@cells(LOW_RANK, [*BASES, GROUPED, DEPTHWISE])
@torch.no_grad()
def test_our_own_lora_computes_the_same(case: Case, tmp_path: Path):
    plain, model = trained(case)
    model.export("lora", tmp_path, runtime="halotune")
    x = case.input()
    assert relative(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), model(x)) < 1e-5


@cells(LOW_RANK[:1], [b for b in BASES if b.name in NOT_PEFTS])
def test_what_peft_gets_wrong_is_refused_by_name(case: Case, tmp_path: Path):
    _, model = trained(case)
    with pytest.raises(HalotuneError, match=rf"peft cannot represent .*{NOT_PEFTS[case.base.name]}.*: layer\. .*halotune"):
        model.export("lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@cells(LOW_RANK, BASES)
def test_comfyuis_product_is_the_delta(case: Case, tmp_path: Path):
    """`mm(up.flatten(1), down.flatten(1)).reshape(weight.shape)`, for every convolution."""
    _, model = trained(case)
    model.export("lora", tmp_path, runtime="comfyui", component="transformer")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    up, down = (tensors[f"transformer.layer.lora_{f}.weight"].flatten(1) for f in "BA")
    (layer,) = adapted_layers(model).values()
    W = matrix(layer.base_layer)
    assert relative(up @ down, layer.adapters["default"].weight(W) - W) < 1e-5


# -- the rank


def dense(B: Tensor, A: Tensor, rank: int) -> float:
    """The least relative error that any matrix of this rank has."""
    s = torch.linalg.svdvals(B @ A)
    return float(s[rank:].norm() / s.norm())


@pytest.mark.parametrize(("out", "k", "n_in", "rank"), [(30, 8, 20, 3), (9, 25, 40, 4), (40, 25, 9, 1), (12, 12, 12, 12)])
def test_truncation_is_the_best_of_its_rank_and_knows_its_error(out, k, n_in, rank):
    B, A = torch.randn(out, k, dtype=torch.float64), torch.randn(k, n_in, dtype=torch.float64)
    found = truncated(B, A, rank)
    assert found.B.shape == (out, rank) and found.A.shape == (rank, n_in)
    assert relative(found.B @ found.A, B @ A) == pytest.approx(found.error, abs=1e-10)
    assert found.error == pytest.approx(dense(B, A, rank), abs=1e-10)


def test_more_columns_than_the_matrix_has_are_cut_without_an_error():
    B, A = torch.randn(6, 25, dtype=torch.float64), torch.randn(25, 9, dtype=torch.float64)
    found = truncated(B, A)
    assert found.rank == 6 and found.error == 0 and found.how == "exact"
    assert relative(found.B @ found.A, B @ A) < 1e-12


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize(("out", "n_in", "rank"), [(90, 60, 8), (60, 90, 8), (12, 20, 40)])
def test_a_sketch_is_nearly_the_best_of_its_rank_and_knows_its_error(out, n_in, rank, decay):
    values = torch.arange(1, 1 + min(out, n_in), dtype=torch.float64) ** -decay
    U, V = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (out, n_in))
    delta = (U * values) @ V.mT
    state = torch.get_rng_state()
    found = sketched(delta, rank)
    assert torch.equal(torch.get_rng_state(), state)
    best = float(values[rank:].norm() / values.norm())
    assert relative(found.B @ found.A, delta) == pytest.approx(found.error, abs=1e-7)
    assert best - 1e-9 <= found.error <= best * 1.03 + 1e-7


@cells(BAT, [b for b in BASES if b.name in ("linear", "gpt2-conv1d", "conv2d-grouped")])
def test_bat_is_sketched_to_the_rank_given(case: Case, tmp_path: Path):
    plain, model = trained(case)
    with pytest.raises(HalotuneError, match=r"full rank.*Give a rank"):
        model.export("lora", tmp_path, runtime="halotune")
    report = model.export("lora", tmp_path, runtime="halotune", rank=4)
    (layer,) = report.layers.values()
    assert layer.how == SKETCHED and 0.01 < layer.error < 1 and not report.exact
    assert "randomised SVD" in str(report) and f"{layer.error:.2e}" in str(report)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    W = matrix(plain.layer)
    ours, theirs = (next(iter(adapted_layers(m).values())).adapters["default"].weight(W) - W for m in (model, loaded))
    assert relative(theirs, ours) == pytest.approx(layer.error, rel=1e-4)


def test_a_rank_cuts_and_reports_each_layer(mlp, tmp_path):
    model = randomized(get_peft_model(copy.deepcopy(mlp), LoHaConfig(r=3, target_modules=["up", "down"])))
    report = model.export("lora", tmp_path, rank=4)
    assert report.rank == 4 and len(report.layers) == 4
    for path, layer in report.layers.items():
        adapter = adapted_layers(model.get_base_model())[path].adapters["default"]
        B, A = (t.detach() for t in adapter.factors(torch.empty(0)))
        assert layer.how == TRUNCATED and layer.error == pytest.approx(dense(B.double(), A.double(), 4), rel=1e-4)
        assert path in str(report) and f"{layer.error:.2e}" in str(report)
    assert report.to_dict()["layers"]["blocks.0.up"] == {
        "rank": 4,
        "error": report.layers["blocks.0.up"].error,
        "how": TRUNCATED,
    }


def test_one_rank_for_all_layers_filled_up_with_zeros(mlp, tmp_path):
    config = HRAConfig(r=2, rank_pattern={"up": 6}, target_modules=["up", "down"], init_weights=False)
    model = randomized(get_peft_model(mlp, config))
    assert model.export("lora", tmp_path).rank == 6
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.blocks.1.down.lora_{f}.weight"] for f in "AB")
    assert A.shape == (6, 15) and B.shape == (6, 6)
    assert A[:2].abs().min() > 0 and not A[2:].any() and not B[:, 2:].any()


@pytest.mark.parametrize(("r", "rank", "expected"), [(1, None, 1), (3, None, 8), (9, None, 16), (14, 4, 8), (3, 30, 32)])
def test_ranks_are_those_of_vllm(r, rank, expected, tmp_path):
    model = randomized(get_peft_model(nn.Sequential(nn.Linear(40, 30)), BoneConfig(r=r, target_modules=["0"])))
    report = model.export("lora", tmp_path, runtime="vllm", rank=rank)
    assert report.rank == expected
    A = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.lora_A.weight"]
    assert A.shape[0] == expected and int(A.any(1).sum()) <= min(r, rank or r)


def test_a_rank_that_vllm_does_not_serve_is_refused(tmp_path):
    plain = nn.Sequential(nn.Linear(600, 600))
    model = randomized(get_peft_model(plain, LoHaConfig(r=23, target_modules=["0"])))
    with pytest.raises(HalotuneError, match=r"up to 512.*rank 529.*rank=512 or less"):
        model.export("lora", tmp_path, runtime="vllm")
    assert model.export("lora", tmp_path, runtime="vllm", rank=512).rank == 512


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_must_fit_the_groups(rank, tmp_path):
    _, model = trained(Case(LOW_RANK[0], GROUPED, torch.float32))
    with pytest.raises(HalotuneError, match=rf"positive multiple of 3 \(the groups of convolutions\); got {rank}"):
        model.export("lora", tmp_path, rank=rank)
    assert model.export("lora", tmp_path, rank=9).rank == 9


def test_blocks_are_pefts_grouped_form():
    shape = WeightShape(6, 4, (2,), groups=3)
    B, A = torch.randn(6, 2), torch.randn(2, 4)
    lora_A, lora_B = laid_out(truncated(B, A), shape, 9, blocks=True)
    assert lora_A.shape == (9, 6, 2) and lora_B.shape == (6, 3, 1)
    x = torch.randn(1, 6, 5)
    expected = nn.functional.conv1d(x, (B @ A).reshape(6, 2, 2), groups=3)
    torch.testing.assert_close(nn.functional.conv1d(nn.functional.conv1d(x, lora_A), lora_B, groups=3), expected)


# -- several adapters, scales


@pytest.fixture
def two(mlp) -> tuple[nn.Module, PeftModel]:
    plain = copy.deepcopy(mlp).eval()
    model = get_peft_model(mlp, HRAConfig(r=2, target_modules=["up", "stem"], init_weights=False))
    model.add_adapter("second", LoHaConfig(r=2, alpha=5, target_modules=["up", "head"]))
    model.add_adapter("third", HRAConfig(r=3, target_modules=["up"], init_weights=False))
    randomized(model)
    model.set_scale("default", 0.7)
    model.set_scale("third", -1.5)
    return plain, model.eval()


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second", "third"], ["third", "default"]])
@torch.no_grad()
def test_the_active_adapters_in_their_order_with_their_scales(active, two, tmp_path):
    plain, model = two
    model.set_adapter(active)
    report = model.export("lora", tmp_path)
    x = plain.sample()
    assert relative(model(x), plain(x)) > 1e-3
    assert relative(in_peft(plain, tmp_path)(x), model(x)) < 1e-5
    assert report.exact and report.layers["blocks.0.up"].rank == min(
        sum({"default": 2, "second": 4, "third": 3}[name] for name in active), 6
    )


@torch.no_grad()
def test_an_adapter_named_need_not_be_active(two, tmp_path):
    plain, model = two
    model.export("lora", tmp_path, adapter_name="third")
    model.set_adapter("third")
    x = plain.sample()
    assert relative(in_peft(plain, tmp_path)(x), model(x)) < 1e-5


def test_a_delta_of_full_rank_composes_with_nothing(mlp, tmp_path):
    model = get_peft_model(mlp, BoneConfig(r=3, init_weights="bat", target_modules=["up"]))
    model.add_adapter("second", HRAConfig(r=2, target_modules=["up"]))
    with pytest.raises(HalotuneError, match=r"blocks\.0\.up: the delta of Bat .* Export one adapter at a time"):
        model.export("lora", tmp_path, adapter_name=["default", "second"], rank=2)


# -- refusals: nothing is written


def refused(model: PeftModel, folder: Path, match: str, **arguments) -> None:
    with pytest.raises(HalotuneError, match=match):
        model.export("lora", folder / "out", **arguments)
    assert not (folder / "out").exists()


def test_refusals(two, tmp_path):
    _, model = two
    refused(model, tmp_path, "expected different names out of .*'default'.*got .*'other'", adapter_name="other")
    refused(model, tmp_path, "expected different names", adapter_name=["default", "default"])
    refused(model, tmp_path, "expected one of peft, .*got 'vlm'. Did you mean 'vllm'", runtime="vlm")
    refused(model, tmp_path, "vllm cannot represent .*convolutions: stem", runtime="vllm")
    refused(model, tmp_path, "cannot tell which part of a pipeline a MLP is", runtime="diffusers", adapter_name="third")
    (tmp_path / "file").touch()
    with pytest.raises(HalotuneError, match="is a file"):
        model.export("lora", tmp_path / "file")
    with pytest.raises(HalotuneError, match="expected the format 'lora'; got 'loha'"):
        model.export("loha", tmp_path)  # type: ignore[arg-type]
    model.merge_adapter()
    refused(model, tmp_path, r"default is merged.*unmerge_adapter\(\)")


def test_trained_biases_are_refused(mlp, tmp_path):
    refused(get_peft_model(mlp, HRAConfig(r=2, target_modules=["up"], bias="hra_only")), tmp_path, "trains biases .*merge")


def test_values_that_the_dtype_cannot_hold_are_refused(mlp, tmp_path):
    model = randomized(get_peft_model(mlp, BoneConfig(r=2, target_modules=["up"])))
    model.set_scale("default", 1e6)
    refused(model, tmp_path, r"blocks\.0\.up: values that are not finite in torch.float16", dtype=torch.float16)
    assert model.export("lora", tmp_path / "fp32").exact


class Attention(nn.Module):
    def __init__(self, **arguments) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., : self.attention.kdim], x)[0]


@pytest.mark.parametrize(
    ("targets", "arguments"),
    [(["attention"], {}), (["in_proj"], {}), (["out_proj"], {}), (["attention"], {"kdim": 4})],
)
@torch.no_grad()
def test_attention_is_ours_alone(targets, arguments, tmp_path):
    plain = Attention(**arguments)
    model = randomized(get_peft_model(copy.deepcopy(plain), HRAConfig(r=2, target_modules=targets)))
    refused(model, tmp_path, r"peft .*reads no LoRA of torch\.nn\.MultiheadAttention, or reads it wrong: attention\.")
    model.export("lora", tmp_path, runtime="halotune")
    x = torch.randn(2, 3, 8)
    assert relative(model(x), plain(x)) > 1e-3
    assert relative(PeftModel.from_pretrained(plain, tmp_path)(x), model(x)) < 1e-5


@torch.no_grad()
def test_peft_adds_the_output_projections_lora_twice():
    """Why attention is refused for peft. Where this fails, peft has fixed it."""
    plain = Attention()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attention"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    tensors = peft.get_peft_model_state_dict(model)

    def delta(path: str) -> Tensor:
        return tensors[f"base_model.model.{path}.lora_B.weight"] @ tensors[f"base_model.model.{path}.lora_A.weight"]

    plain.attention.in_proj_weight += delta("attention")
    plain.attention.out_proj.weight += 2 * delta("attention.base_layer.out_proj")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), plain(x))


# -- what lies beside the adapters


@torch.no_grad()
def test_fully_fine_tuned_modules_go_to_runtimes_that_read_them(mlp, tmp_path):
    plain = copy.deepcopy(mlp).eval()
    model = get_peft_model(mlp, HRAConfig(r=2, target_modules=["up"], init_weights=False, modules_to_save=["head"])).eval()
    model.base_model.model.head.modules_to_save["default"].weight.normal_()
    refused(model, tmp_path, "vllm reads a LoRA alone, .*fully fine-tuned modules: head", runtime="vllm")
    x = plain.sample()
    for runtime, load in (("peft", in_peft), ("halotune", PeftModel.from_pretrained)):
        model.export("lora", tmp_path / runtime, runtime=runtime)
        assert relative(load(copy.deepcopy(plain), tmp_path / runtime)(x), model(x)) < 1e-5


@torch.no_grad()
def test_tied_and_resized_embeddings(language_model, tmp_path):
    """An adapted head exports without its base; a resized vocabulary is a whole module."""
    language_model.save_pretrained(tmp_path / "base")
    language_model.name_or_path = str(tmp_path / "base")
    plain = copy.deepcopy(language_model)
    config = BoneConfig(r=2, target_modules=["lm_head", "q_proj"])
    model = randomized(get_peft_model(copy.deepcopy(plain), config)).eval()
    model.export("lora", tmp_path / "out", runtime="vllm")
    ids = torch.arange(12).reshape(2, 6)
    assert relative(in_peft(plain, tmp_path / "out")(ids).logits, model(ids).logits) < 1e-5
    plain.resize_token_embeddings(40)
    resized = get_peft_model(plain, config)
    refused(resized, tmp_path / "no", "fully fine-tuned modules: lm_head.base_layer, model.embed_tokens", runtime="vllm")


@torch.no_grad()
def test_a_layer_under_two_names(tmp_path):
    """Written under both; peft would wrap it at the first alone."""
    shared = nn.Linear(6, 6)
    plain = nn.Sequential(shared, nn.Tanh(), shared)
    model = randomized(get_peft_model(copy.deepcopy(plain), BoneConfig(r=2, target_modules=["0", "2"])))
    refused(model, tmp_path, "several names .*: 0, 2")
    model.export("lora", tmp_path, runtime="halotune")
    x = torch.randn(3, 6)
    expected = model(x)
    assert relative(expected, plain(x)) > 1e-3
    assert relative(PeftModel.from_pretrained(plain, tmp_path)(x), expected) < 1e-5


# -- the tensors


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_adapters_or_the_one_asked_for(dtype, mlp, tmp_path):
    model = randomized(get_peft_model(mlp.bfloat16(), HRAConfig(r=2, target_modules=["up", "stem"])))
    model.export("lora", tmp_path, dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype or torch.float32}


def test_factors_are_found_in_float64():
    """Above the rounding of the fp32 parameters there is nothing."""
    layer = Case(VARIANTS[0], BASES[0], torch.float32).layer()
    (found,) = factors_of(layer, ["default"], None)
    adapter = copy.deepcopy(layer.adapters["default"]).double()
    W = layer.base_layer.weight.detach().double()
    assert relative(found.B @ found.A, adapter.weight(W) - W) < 1e-13
    assert layer.adapters["default"].hra_u.dtype == torch.float32  # untouched


def test_a_lora_exports_as_itself(mlp, tmp_path):
    """With patterns and rsLoRA, which many readers ignore, made plain."""
    config = LoraConfig(r=2, lora_alpha=5, use_rslora=True, rank_pattern={"down": 4}, alpha_pattern={"up": 3})
    config.target_modules = {"up", "down", "stem"}
    plain = copy.deepcopy(mlp).eval()
    model = randomized(get_peft_model(mlp, config)).eval()
    assert model.export("lora", tmp_path).rank == 4
    written = LoraConfig.from_pretrained(tmp_path)
    assert (written.r, written.lora_alpha, written.use_rslora) == (4, 4, False)
    assert not written.rank_pattern and not written.alpha_pattern and written.target_modules == {"up", "down", "stem"}
    x = plain.sample()
    assert relative(in_peft(plain, tmp_path)(x), model(x)) < 1e-5
