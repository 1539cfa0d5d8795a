"""Against lycoris-lora itself: its networks compute the same here, and ours there."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import halotune
from halotune import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from halotune.engine.injection.modules import adapted_layers

from .models import Layers, randomize, same

wrapper = pytest.importorskip("lycoris.wrapper")
ROWS = {"weight_decompose": True}
CHANNELS = {"weight_decompose": True, "wd_on_out": False}
KINDS = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "rs": {"rs_lora": True},
    "rows": ROWS,
    "rows-tucker": {**ROWS, "use_tucker": True},
    "channels": CHANNELS,
    "channels-all": {**CHANNELS, "use_tucker": True, "use_scalar": True, "rs_lora": True},
}
ALL = ["conv_in", "0", "1", "2", "time", "to_q", "proj"]
LAYERS = 8  # "proj" is the end of two names
NO_SCALAR = [kind for kind, options in KINDS.items() if not options.get("use_scalar")]  # files hold it within hada_w1_a


PRESET = {  # of the class: other tests may have left another there
    "enable_conv": True,
    "target_module": ["Linear", "Conv1d", "Conv2d"],
    "target_name": [],
    "exclude_name": [],
    "module_algo_map": {},
    "name_algo_map": {},
    "lora_prefix": "lycoris",
    "use_fnmatch": False,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    wrapper.LycorisNetwork.apply_preset(PRESET)


def network_on(model: nn.Module, **options) -> nn.Module:
    """A LyCORIS network in training, with alpha ≠ r and ranks of convolutions of their own."""
    usual = {"network_module": "loha", "lora_dim": 3, "conv_lora_dim": 2, "alpha": 5, "conv_alpha": 1.5}
    network = wrapper.LycorisNetwork(model, warn_on_unmatched=False, **{**usual, **options})
    network.apply_to()
    return randomize(network)


@pytest.mark.parametrize("kind", KINDS)
def test_their_networks_compute_the_same_here(kind: str, tmp_path: Path) -> None:
    plain, x = Layers(), Layers.sample()
    theirs = copy.deepcopy(plain)
    network = network_on(theirs, **KINDS[kind])
    assert len(network.loras) == LAYERS
    file = tmp_path / "their.safetensors"
    network.save_weights(str(file), None, {})
    expected, base_output = theirs(x), plain(x)

    model = halotune.load_lycoris(plain, file).eval()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (expected - base_output).abs().max() > 0.1
    halotune.save_lycoris(model, tmp_path / "ours.safetensors")
    assert same(tmp_path / "ours.safetensors", file)
    merged = model.merge_and_unload()  # LyCORIS' own applies alpha / r twice
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if "channels" not in k])
def test_our_adapters_compute_the_same_there(kind: str, tmp_path: Path) -> None:
    options = {**KINDS[kind]}
    config = LoHaConfig(
        r=3,
        alpha=5,
        rank_pattern={"conv_in": 2, r"down\..*": 2},
        alpha_pattern={"time": 1.5},
        use_effective_conv2d=options.pop("use_tucker", False),
        use_rslora=options.pop("rs_lora", False),
        target_modules=ALL,
        **options,
    )
    plain, x = Layers(), Layers.sample()
    model = randomize(get_peft_model(copy.deepcopy(plain), config))
    file = tmp_path / "ours.safetensors"
    halotune.save_lycoris(model, file)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), plain)
    assert len(network.loras) == LAYERS
    network.apply_to()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_lengths_of_channels_compute_the_same_there(tmp_path: Path) -> None:
    """`create_lycoris_from_weights` knows lengths of rows alone, so this network is made first."""
    config = LoHaConfig(r=3, alpha=5, target_modules=ALL, **CHANNELS)
    plain, x = Layers(), Layers.sample()
    model = randomize(get_peft_model(copy.deepcopy(plain), config))
    halotune.save_lycoris(model, tmp_path / "ours.safetensors")
    network = network_on(plain, conv_lora_dim=3, conv_alpha=5, **CHANNELS)
    assert network.load_weights(str(tmp_path / "ours.safetensors")) == {}
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NO_SCALAR)
def test_gradients_are_theirs(kind: str, tmp_path: Path) -> None:
    plain, x = Layers(), Layers.sample()
    theirs = copy.deepcopy(plain)
    network = network_on(theirs, **KINDS[kind])
    network.save_weights(str(tmp_path / "their.safetensors"), None, {})
    model = halotune.load_lycoris(plain, tmp_path / "their.safetensors", is_trainable=True)
    for m in (theirs, model):
        m(x).square().mean().backward()
    ours = {}
    for path, layer in adapted_layers(model.get_base_model()).items():
        for name, p in layer.adapters["default"].named_parameters():
            ours[f"lycoris_{path.replace('.', '_')}.{name.replace('hada_dora', 'dora')}"] = p.grad
    expected = {f"{m.lora_name}.{name}": p.grad for m in network.loras for name, p in m.named_parameters()}
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(ours[key].view_as(grad), grad, rtol=1e-4, atol=1e-5)


def test_lora_both_ways(tmp_path: Path) -> None:
    plain, x = Layers(), Layers.sample()
    theirs = copy.deepcopy(plain)
    network = network_on(theirs, network_module="locon")
    network.save_weights(str(tmp_path / "their.safetensors"), None, {})
    model = halotune.load_lycoris(plain, tmp_path / "their.safetensors")
    assert isinstance(model.active_peft_config, LoraConfig)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    halotune.save_lycoris(model, tmp_path / "ours.safetensors")
    assert same(tmp_path / "ours.safetensors", tmp_path / "their.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_trained_on_and_saved_for_peft(kind: str, tmp_path: Path) -> None:
    network_on(Layers(), **KINDS[kind]).save_weights(str(tmp_path / "their.safetensors"), None, {})
    plain, x = Layers(), Layers.sample()
    model = halotune.load_lycoris(copy.deepcopy(plain), tmp_path / "their.safetensors", is_trainable=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    first = model(x).square().mean()
    first.backward()
    optimizer.step()
    trained = model(x)
    assert trained.square().mean() < first
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path / "peft")
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path / "peft")(x), trained)
