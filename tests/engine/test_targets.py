"""Which modules a configuration names, and what it says where it names none."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from torch import nn

import halotune
from halotune import HalotuneError, HRAConfig, LoHaConfig
from halotune.engine.injection.modules import adapted_layers

from ..interop.models import base, error, output, randomize

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wrap(model: nn.Module | str, target_modules=..., **kwargs) -> halotune.PeftModel:
    targets = {} if target_modules is ... else {"target_modules": target_modules}
    return halotune.get_peft_model(base(model) if isinstance(model, str) else model, HRAConfig(r=2, **targets, **kwargs))


def adapted(*args, **kwargs) -> list[str]:
    """The paths that are adapted, with the layers' lists cut off the front."""
    found = adapted_layers(wrap(*args, **kwargs).get_base_model())
    return [re.sub(r"^(model|transformer|bert)\.(decoder\.|encoder\.)?(layers|layer|h)\.", "", p) for p in found]


class Blocks(nn.Module):
    """A list of layers at the root, and names that are each other's endings."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(4, 4), "score": nn.Linear(4, 4), "experts": self._experts()}) for _ in range(3)
        )
        self.reproj = nn.Linear(4, 4)
        self.score = nn.Linear(4, 2)

    @staticmethod
    def _experts() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))


# -- names


@pytest.mark.parametrize("kind", [list, set, tuple])
def test_names_match_as_endings_in_whole_components(kind) -> None:
    assert adapted("llama", kind(["q_proj"])) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert adapted("llama", kind(["self_attn.q_proj", "mlp.up_proj"])) == [
        f"{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert adapted("llama", kind(["model.layers.1.mlp.up_proj"])) == ["1.mlp.up_proj"]
    assert adapted(Blocks(), kind(["proj"])) == ["layers.0.proj", "layers.1.proj", "layers.2.proj"]  # not reproj


def test_string_is_a_regular_expression_for_the_whole_path() -> None:
    assert adapted("llama", r".*\.1\..*\.[qv]_proj") == ["1.self_attn.q_proj", "1.self_attn.v_proj"]
    with pytest.raises(HalotuneError, match=r"target_modules='q_proj': no module.*list names.*closest names are q_proj"):
        wrap("llama", "q_proj")


@pytest.mark.parametrize(
    "field, value",
    [("target_modules", "*.q_proj"), ("exclude_modules", "(q"), ("rank_pattern", {"[a": 2})],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_string_that_is_no_regular_expression(field: str, value) -> None:
    with pytest.raises(HalotuneError, match=rf"HRAConfig\.{field}: .*is no regular expression.*list names"):
        HRAConfig(**{field: value})


def test_none_matched_is_an_error_with_the_closest_names() -> None:
    with pytest.raises(HalotuneError, match=r"\['qproj'\]: no module of the model matches.*closest names are q_proj"):
        wrap("llama", ["qproj"])
    with pytest.raises(HalotuneError, match=r"no module of the model matches.*can be adapted: .*down_proj.*up_proj"):
        wrap("llama", ["xyz"])


def test_some_unmatched_is_one_warning_with_the_closest_names() -> None:
    """PEFT's own OPT example names o_proj, which OPT lacks; there it is silent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(adapted("opt", ["q_proj", "o_proj"])) == 2
    (warning,) = caught
    assert "no module matches o_proj" in str(warning.message) and "out_proj" in str(warning.message)


# -- all-linear


@pytest.mark.parametrize(
    "kind, names",
    [
        ("llama", LLAMA_LINEAR),  # without lm_head
        ("tied", LLAMA_LINEAR),
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),  # transformers' Conv1D
        ("opt", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
        ("bert_classifier", ["query", "key", "value", "dense"]),  # without classifier
        ("bert_reader", ["query", "key", "value", "dense"]),  # without qa_outputs
        ("t5", ["q", "k", "v", "o", "wi", "wo"]),
    ],
)
def test_all_linear_leaves_the_output_layer_out_and_is_written_as_names(kind: str, names: list[str], tmp_path) -> None:
    model = wrap(kind, "all-linear")
    linear = [n for n, m in base(kind).named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    heads = {"lm_head", "classifier", "qa_outputs"}
    paths = adapted_layers(model.get_base_model())
    assert list(paths) == [n for n in linear if n not in heads] and len(paths) < len(linear) + (kind == "gpt2")
    assert model.peft_config["default"].target_modules == set(names)
    randomize(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)
    again = halotune.PeftModel.from_pretrained(base(kind), tmp_path)
    assert list(adapted_layers(again.get_base_model())) == list(paths)
    with torch.no_grad():
        assert error(output(again), output(model.eval())) < 1e-6


def test_all_linear_is_written_so_that_it_matches_nothing_else() -> None:
    model = wrap(Blocks(), "all-linear", exclude_modules=["up"])
    assert model.peft_config["default"].target_modules >= {"proj", "reproj"}
    again = wrap(Blocks(), model.peft_config["default"].target_modules, exclude_modules=["up"])
    paths = list(adapted_layers(again.get_base_model()))
    assert paths == list(adapted_layers(model.get_base_model()))
    assert "score" not in paths and "layers.0.score" in paths


# -- by architecture


@pytest.mark.parametrize(
    "kind, names",
    [
        ("llama", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("bert", {"query", "value"}),
        ("opt", {"q_proj", "v_proj"}),
        ("t5", {"q", "v"}),
    ],
)
def test_none_means_the_architectures_usual_modules(kind: str, names: set[str], tmp_path) -> None:
    model = wrap(kind)
    assert model.peft_config["default"].target_modules == names
    assert {p.rsplit(".", 1)[-1] for p in adapted_layers(model.get_base_model())} == names
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_unknown_architecture_is_an_error_that_suggests_names() -> None:
    with pytest.raises(HalotuneError, match=r"no default for 'ConvNet'.*for example from: c1d, conv1.*'all-linear'"):
        wrap("convnet")
    model = base("llama")
    model.config.model_type = "brand_new"
    with pytest.raises(HalotuneError, match=r"no default for 'brand_new'.*down_proj, gate_proj, k_proj"):
        wrap(model)


# -- leaving out


@pytest.mark.parametrize("exclude", [["0.self_attn.q_proj"], ("model.layers.0.self_attn.q_proj",), r".*\.0\..*"])
def test_exclude_modules(exclude) -> None:
    assert adapted("llama", ["q_proj"], exclude_modules=exclude) == ["1.self_attn.q_proj"]


def test_exclude_modules_from_all_linear() -> None:
    assert {p.rsplit(".", 1)[-1] for p in adapted("llama", "all-linear", exclude_modules=["up_proj", "o_proj"])} == {
        *LLAMA_LINEAR
    } - {"up_proj", "o_proj"}


def test_exclude_that_matches_nothing_is_silent() -> None:
    assert len(adapted("llama", ["q_proj"], exclude_modules=["vision_tower", "lm_head"])) == 2


def test_exclude_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(HalotuneError, match=r"exclude_modules=\['self_attn.q_proj'\] leaves none of the 2.*Exclude fewer"):
        wrap("llama", ["q_proj"], exclude_modules=["self_attn.q_proj"])


# -- layers


@pytest.mark.parametrize("layers, pattern", [(1, None), ([1], None), ([1], "layers"), ([1], ["h", "layers"])])
def test_layers_to_transform(layers, pattern) -> None:
    found = adapted("llama", ["q_proj"], layers_to_transform=layers, layers_pattern=pattern)
    assert found == ["1.self_attn.q_proj"]


def test_layers_of_a_list_at_the_root() -> None:
    for pattern in (None, "layers"):
        found = adapted(Blocks(), ["proj"], layers_to_transform=[0, 2], layers_pattern=pattern)
        assert found == ["layers.0.proj", "layers.2.proj"]


def test_without_a_pattern_the_first_list_counts_and_with_one_the_one_named() -> None:
    first = adapted(Blocks(), ["up"], layers_to_transform=[1])
    assert first == ["layers.1.experts.0.up", "layers.1.experts.1.up"]
    named = adapted(Blocks(), ["up"], layers_to_transform=[1], layers_pattern="experts")
    assert named == [f"layers.{i}.experts.1.up" for i in range(3)]


def test_layers_that_are_not_there() -> None:
    with pytest.raises(HalotuneError, match=r"layers_to_transform=\[7\].*no layer.*The targets lie in layers \[0, 1\]"):
        wrap("llama", ["q_proj"], layers_to_transform=[7])
    with pytest.raises(HalotuneError, match=r"layers_pattern='blocks'.*No target lies in a numbered list of that name"):
        wrap("llama", ["q_proj"], layers_to_transform=[0], layers_pattern="blocks")


def test_layers_need_names_and_patterns_need_layers() -> None:
    with pytest.raises(HalotuneError, match=r"layers_pattern: needs layers_to_transform.*Give the layers' indices"):
        HRAConfig(target_modules=["q_proj"], layers_pattern="layers")
    with pytest.raises(HalotuneError, match=r"layers_to_transform: works with a list.*Write the indices into"):
        HRAConfig(target_modules=".*q_proj", layers_to_transform=[0])


# -- modules fully fine-tuned


def test_fully_fine_tuned_modules_are_not_adapted_too() -> None:
    assert adapted("llama", ["q_proj", "lm_head"], modules_to_save=["lm_head"]) == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
    ]
    inside = adapted("llama", ["q_proj", "up_proj"], modules_to_save=["mlp"])
    assert inside == ["0.self_attn.q_proj", "1.self_attn.q_proj"]


@pytest.mark.parametrize("container", [nn.ModuleList, lambda heads: nn.ModuleDict({str(i): h for i, h in enumerate(heads)})])
def test_modules_to_save_that_are_containers_are_an_error(container) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.heads = container([nn.Linear(4, 2), nn.Linear(4, 3)])
    config = HRAConfig(r=2, target_modules=["0"], modules_to_save=["heads"])
    with pytest.raises(
        HalotuneError, match=r"modules_to_save: heads is a Module.*never run. Name what it holds: heads.0, heads.1"
    ):
        halotune.get_peft_model(model, config)
    assert not any("hra" in name for name, _ in model.named_parameters())


def test_modules_to_save_that_match_nothing_are_an_error() -> None:
    with pytest.raises(HalotuneError, match=r"modules_to_save: no module matches 'haed'.*top modules are model, lm_head"):
        wrap("llama", ["q_proj"], modules_to_save=["haed"])


# -- one configuration, several ranks


@pytest.mark.parametrize(
    "pattern, ranks",
    [
        ({"q_proj": 4}, [4, 2, 4, 2]),
        ({r"layers\.1\..*": 6}, [2, 2, 6, 6]),
        ({"model.layers.0.self_attn.v_proj": 8, "v_proj": 4}, [2, 8, 2, 4]),  # the first that matches
    ],
)
def test_rank_pattern(pattern: dict[str, int], ranks: list[int], tmp_path) -> None:
    """In peft HRA has none."""
    model = wrap("llama", ["q_proj", "v_proj"], rank_pattern=pattern)
    layers = adapted_layers(model.get_base_model()).values()
    assert [layer.adapters["default"].hra_u.shape[1] for layer in layers] == ranks
    randomize(model).save_pretrained(tmp_path)
    again = halotune.PeftModel.from_pretrained(base("llama"), tmp_path)
    with torch.no_grad():
        assert error(output(again), output(model)) < 1e-6


def test_alpha_pattern() -> None:
    config = LoHaConfig(r=2, alpha=2, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 6})
    model = halotune.get_peft_model(base("llama"), config)
    scales = {p: m.adapters["default"].scaling for p, m in adapted_layers(model.get_base_model()).items()}
    assert {s for p, s in scales.items() if "v_proj" in p} == {3.0}
    assert {s for p, s in scales.items() if "q_proj" in p} == {1.0}


def test_all_linear_reaches_fused_experts_and_names_the_routers_that_it_leaves_out():
    """peft's "all-linear" on Mixtral adapts the attention and no expert, silently."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=32, num_local_experts=3, **sizes))
    if not any(p.dim() == 3 for p in model.parameters()):
        pytest.skip("this transformers keeps experts as linear layers")
    with pytest.warns(UserWarning, match=r"1 routers of experts .* model\.layers\.0\.mlp\.gate .*modules_to_save=\['gate'\]"):
        adapted = halotune.get_peft_model(model, HRAConfig(r=2, target_modules="all-linear"))
    assert adapted.peft_config["default"].target_parameters == {"experts.gate_up_proj", "experts.down_proj"}
    assert {f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")} <= set(
        adapted_layers(adapted.get_base_model())
    )


def test_experts_of_a_kind_that_is_not_known_are_left_out_with_a_warning():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 4))

    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "experts": Experts()})
    with pytest.warns(UserWarning, match="1 modules hold several matrices .* experts"):
        halotune.get_peft_model(model, HRAConfig(r=2, target_modules="all-linear"))


def test_a_parametrized_convolution_is_no_experts():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2))
    halotune.get_peft_model(model, HRAConfig(r=2, target_modules="all-linear"))
