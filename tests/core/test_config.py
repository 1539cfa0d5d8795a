"""Configurations: PEFT's names and defaults, and checks that name the field."""

from __future__ import annotations

import json
import re
from enum import Enum

import peft
import pytest

from halotune import (
    AdapterFileError,
    BoneConfig,
    HalotuneError,
    HRAConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    TaskType,
    get_peft_model,
)
from halotune.engine.injection.modules import adapted_layers
from halotune.methods.registry import methods

EVERY = pytest.mark.parametrize("config", [m.config for m in methods()], ids=lambda c: c.__name__)
WITH_COUNTERPART = pytest.mark.parametrize("config", [HRAConfig, LoHaConfig, MissConfig], ids=lambda c: c.__name__)


def plain(entries):
    """As they stand in peft's file, but for the version of peft."""

    def jsonable(value):
        if isinstance(value, set):
            return sorted(value)
        return value.value if isinstance(value, Enum) else value

    return {k: jsonable(v) for k, v in entries.items() if k != "peft_version"}


def counterpart(config):
    return getattr(peft, config.__name__)


# -- PEFT's parameters


@WITH_COUNTERPART
def test_entries_and_defaults_are_pefts(config):
    assert plain(config().to_dict()) == plain(counterpart(config)().to_dict())


def test_entries_of_lora_are_among_pefts():
    theirs = plain(peft.LoraConfig().to_dict())
    ours = plain(LoraConfig().to_dict())
    assert ours == {k: theirs[k] for k in ours}
    assert {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"} <= ours.keys()


def test_bone_has_the_entries_of_miss_but_two():
    """peft 0.15, the last with Bone, is not installed beside the one that has MiSS; its documentation names these."""
    expected = plain(peft.MissConfig().to_dict()) | {"peft_type": "BONE"}
    del expected["mini_r"], expected["miss_dropout"]
    assert plain(BoneConfig().to_dict()) == expected
    assert (expected["r"], expected["init_weights"], expected["bias"]) == (64, True, "none")


@pytest.mark.parametrize(
    "given",
    [
        HRAConfig(r=6, apply_GS=True, bias="hra_only", layers_to_transform=[0, 2], layers_pattern="layers"),
        LoHaConfig(r=4, alpha=2.5, rank_dropout=0.1, module_dropout=0.2, use_effective_conv2d=True),
        LoHaConfig(rank_pattern={"a": 2}, alpha_pattern={"b": 3}, target_modules="all-linear"),
        MissConfig(r=3, mini_r=2, miss_dropout=0.5, init_weights="mini", bias="MiSS_only"),
        HRAConfig(task_type="CAUSAL_LM", target_modules=["b", "a"], exclude_modules=("c",), modules_to_save=["head"]),
    ],
    ids=["hra", "loha", "loha-patterns", "miss", "common"],
)
def test_peft_means_the_same_by_the_same_arguments(given):
    entries = {k: v for k, v in given.to_dict().items() if k != "peft_type"}
    assert plain(counterpart(type(given))(**entries).to_dict()) == plain(given.to_dict())


# -- to a file and back


@EVERY
def test_round_trip(config, tmp_path):
    given = config(
        r=6,
        target_modules=["q", "v"],
        exclude_modules=r".*\.lm_head",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        rank_pattern={"q": 2},
        inference_mode=True,
        base_model_name_or_path="some/base",
    )
    given.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert entries["target_modules"] == ["q", "v"] and entries["rank_pattern"] == {"q": 2}
    assert PeftConfig.from_pretrained(tmp_path) == given
    assert config.from_pretrained(tmp_path) == given


@EVERY
def test_fields_beyond_peft_are_written_only_where_set(config):
    in_peft = hasattr(peft, config.__name__) and "rank_pattern" in counterpart(config)().to_dict()
    assert ("rank_pattern" in config().to_dict()) is in_peft
    assert config(rank_pattern={"a": 2}).to_dict()["rank_pattern"] == {"a": 2}


def test_the_regulariser_is_written_only_where_set():
    def written(**kwargs):
        return {k: v for k, v in HRAConfig(**kwargs).to_dict().items() if k.startswith("orthogonality")}

    assert written() == written(orthogonality_norm="unsquared") == {}
    assert written(orthogonality_weight=1e-4) == {"orthogonality_weight": 1e-4}
    both = {"orthogonality_weight": 1e-4, "orthogonality_norm": "unsquared"}
    assert written(**both) == both
    assert HRAConfig.from_dict(HRAConfig(**both).to_dict()) == HRAConfig(**both)


@pytest.mark.parametrize("theirs", [peft.HRAConfig, peft.LoHaConfig, peft.MissConfig, peft.LoraConfig])
def test_what_peft_writes_is_read(theirs, tmp_path):
    theirs(r=4, target_modules=["a"]).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.r == 4 and config.target_modules == {"a"}


@pytest.mark.parametrize(
    "entry",
    [{"use_dora": False}, {"loftq_config": {}}, {"eva_config": None}, {"megatron_core": "megatron.core"}],
    ids=lambda e: next(iter(e)),
)
def test_entries_that_mean_nothing_are_accepted(entry):
    assert LoraConfig.from_dict({"r": 4, **entry}) == LoraConfig(r=4)


@pytest.mark.parametrize(
    ("config", "entry", "says"),
    [
        (
            LoraConfig,
            {"use_dora": True},
            "LoraConfig.use_dora: set to True: .* is DoRA.*not supported.*peft reads it: merge",
        ),
        (LoraConfig, {"layer_replication": [[0, 2]]}, "layer_replication.*layers are repeated.*peft reads it"),
        (
            LoraConfig,
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4'.*over other base .*peft.*path_initial",
        ),
        (LoraConfig, {"init_lora_weights": "olora"}, "'olora'.*over other base weights"),
        (LoraConfig, {"megatron_core": "other"}, "megatron_core: not supported"),
        (HRAConfig, {"apply_gs": True}, "apply_gs: not supported.*Did you mean 'apply_GS'"),
        (HRAConfig, {"zeal": 0.5}, "zeal: not supported"),
    ],
    ids=["dora", "replication", "pissa", "olora", "megatron", "misspelt", "unknown"],
)
def test_entries_that_mean_something_else_are_refused(config, entry, says):
    with pytest.raises(HalotuneError, match=says):
        config.from_dict({"r": 4, **entry})


# What peft 0.21 has beside our own, set so that it means something.
PEFTS_OWN = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "use_bdlora": {"target_modules_bd_a": ["q"]},
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [3],
    "megatron_config": {"a": 1},
    "arrow_config": {"top_k": 2},
    **{f"init_lora_weights/{i}": i for i in ("pissa", "olora", "corda", "loftq")},
}


@pytest.mark.parametrize("entry", PEFTS_OWN)
def test_variants_of_peft_are_told_by_their_names(entry, tmp_path):
    """No unrelated word is proposed, and nothing is to be mended."""
    text = {"peft_type": "LORA", "r": 4, entry.partition("/")[0]: PEFTS_OWN[entry]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    with pytest.raises(AdapterFileError) as caught:
        PeftConfig.from_pretrained(tmp_path)
    said = str(caught.value)
    assert repr(PEFTS_OWN[entry]) in said and "the adapter is " in said and "peft reads it" in said
    assert not re.search("Did you mean|Mend|Fix the file", said)


@pytest.mark.parametrize("start", ["eva", "orthogonal", "lora_ga", "gaussian"])
def test_a_start_that_leaves_the_base_alone_is_a_plain_lora(start):
    """As peft writes it, with how it was started beside it."""
    config = LoraConfig.from_dict({"r": 4, "init_lora_weights": start, "eva_config": {"rho": 2.0}})
    assert config == LoraConfig(r=4)


def test_a_file_of_another_method_is_told_from_this_one(tmp_path):
    HRAConfig().save_pretrained(tmp_path)
    with pytest.raises(HalotuneError, match="holds a HRA adapter, not a LoHaConfig"):
        LoHaConfig.from_pretrained(tmp_path)


def test_a_bad_entry_names_the_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "HRA", "r": "4"}')
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: HRAConfig\.r: expected int; got '4'"):
        PeftConfig.from_pretrained(tmp_path)


# -- checks


@EVERY
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "4"),
        ("r", True),
        ("r", 4.0),
        ("r", None),
        ("r", 0),
        ("r", -2),
        ("rank_pattern", {"a": "4"}),
        ("rank_pattern", {"a": 0}),
        ("rank_pattern", ["a"]),
        ("target_modules", 3),
        ("target_modules", [1]),
        ("exclude_modules", 3),
        ("layers_to_transform", "0"),
        ("modules_to_save", "head"),
        ("inference_mode", "no"),
        ("init_weights", "yes"),
        ("init_weights", None),
        ("task_type", "CAUSAL"),
        ("peft_type", "VERA"),
    ],
    ids=repr,
)
def test_wrong_values_name_the_field(config, field, value):
    if config().r == value:
        pytest.skip("its size has another name")
    name = "(rank_pattern|a)" if field == "rank_pattern" else field
    with pytest.raises(HalotuneError, match=rf"{config.__name__}(\.|: ){name}"):
        config(**{field: value})


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (LoHaConfig, "alpha", "8"),
        (LoHaConfig, "alpha", True),
        (LoHaConfig, "rank_dropout", 1.0),
        (LoHaConfig, "module_dropout", -0.1),
        (LoHaConfig, "use_effective_conv2d", 1),
        (HRAConfig, "apply_GS", "yes"),
        (HRAConfig, "orthogonality_weight", -1e-4),
        (HRAConfig, "orthogonality_norm", "square"),
        (MissConfig, "miss_dropout", 1.5),
        (MissConfig, "mini_r", 0),
        (LoraConfig, "lora_dropout", 2.0),
        (LoraConfig, "lora_alpha", None),
    ],
    ids=lambda v: getattr(v, "__name__", repr(v)),
)
def test_wrong_values_of_a_methods_own_fields(config, field, value):
    with pytest.raises(HalotuneError, match=rf"{config.__name__}\.{field}"):
        config(**{field: value})


@pytest.mark.parametrize(
    ("config", "bias", "choices"),
    [
        (HRAConfig, "hra", "'none', 'all', 'hra_only'"),
        (BoneConfig, "miss_only", "'none', 'all', 'bone_only'"),
        (MissConfig, "miss_only", "'none', 'all', 'MiSS_only'"),
        (LoraConfig, "None", "'none', 'all', 'lora_only'"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_misspelt_bias_names_the_choices(config, bias, choices):
    with pytest.raises(HalotuneError, match=f"bias: expected one of {choices}.*{bias}"):
        config(bias=bias)


@pytest.mark.parametrize("config", [BoneConfig, MissConfig])
@pytest.mark.parametrize("kind", ["Bat", "balance", "True"])
def test_a_misspelt_kind_names_the_choices(config, kind):
    with pytest.raises(HalotuneError, match=f"init_weights: expected one of True, False, 'bat'.*{kind}"):
        config(init_weights=kind)


def test_a_tasks_name_is_suggested():
    with pytest.raises(HalotuneError, match="Did you mean 'CAUSAL_LM'"):
        HRAConfig(task_type="CAUSAL-LM")
    assert HRAConfig(task_type=TaskType.CAUSAL_LM) == HRAConfig(task_type="CAUSAL_LM")


def test_a_misspelt_choice_is_answered_with_the_nearest():
    with pytest.raises(HalotuneError, match=r"HRAConfig\.bias: expected one of .*got 'hra_onyl'.* Did you mean 'hra_only'\?"):
        HRAConfig(bias="hra_onyl")


# -- alpha's other name


def test_lora_alpha_is_alpha():
    config = LoHaConfig(lora_alpha=32)
    assert config == LoHaConfig(alpha=32) == LoHaConfig(alpha=32, lora_alpha=32)
    assert config.to_dict()["alpha"] == 32 and "lora_alpha" not in config.to_dict()
    assert LoHaConfig().alpha == 8


@pytest.mark.parametrize("alpha", [16, 8])  # 8 is the default, but given
def test_lora_alpha_and_another_alpha_is_an_error(alpha):
    with pytest.raises(HalotuneError, match=f"lora_alpha: is another name of alpha; got alpha={alpha}, lora_alpha=32"):
        LoHaConfig(alpha=alpha, lora_alpha=32)


# -- which layers


def test_layers_pattern_needs_layers():
    with pytest.raises(HalotuneError, match="layers_pattern: needs layers_to_transform"):
        HRAConfig(target_modules=["up"], layers_pattern="blocks")


def test_layers_need_a_list_of_names():
    with pytest.raises(HalotuneError, match=r"layers_to_transform: works with a list.*'all-linear'"):
        HRAConfig(target_modules="all-linear", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("layers", "pattern", "found"),
    [
        ([0, 1], None, ["blocks.0.up", "blocks.1.up"]),
        (1, None, ["blocks.1.up"]),
        ([1, 7], "blocks", ["blocks.1.up"]),
        ([0], ["layers", "blocks"], ["blocks.0.up"]),
    ],
    ids=repr,
)
def test_layers_to_transform(mlp, layers, pattern, found):
    get_peft_model(mlp, HRAConfig(target_modules=["up"], layers_to_transform=layers, layers_pattern=pattern))
    assert list(adapted_layers(mlp)) == found


@pytest.mark.parametrize(("layers", "pattern", "says"), [([5], None, "layers \\[0, 1\\]"), ([0], "h", "No target lies")])
def test_no_such_layer_is_an_error(mlp, layers, pattern, says):
    with pytest.raises(HalotuneError, match=f"no layer of these matches. .*{says}"):
        get_peft_model(mlp, HRAConfig(target_modules=["up"], layers_to_transform=layers, layers_pattern=pattern))
    assert not adapted_layers(mlp)


# -- one module's share


@pytest.mark.parametrize(
    ("pattern", "r"),
    [
        ("down", 2),
        ("blocks.1.down", 2),
        (r"blocks\.\d+\.down", 2),
        (r".*\.down", 2),
        ("own", 8),
        ("blocks.1", 8),
        ("down.x", 8),
    ],
)
def test_a_pattern_is_a_suffix_or_a_regular_expression(pattern, r):
    assert HRAConfig(rank_pattern={pattern: 2}).at("blocks.1.down").r == r


def test_the_first_pattern_that_matches_counts():
    config = HRAConfig(rank_pattern={"x": 6, r"0\.down": 4, "down": 2})
    assert [config.at(f"blocks.{i}.down").r for i in (0, 1)] == [4, 2]
    assert config.r == 8
