"""Saving where something goes wrong: nothing half written, nothing that cannot be read, and errors that say why."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import halotune
from halotune import HalotuneError, HRAConfig, PeftModel, get_peft_model

from ..interop.models import randomize
from .kinds import QV, compiled, config, layers, llama, output

WEIGHTS = "adapter_model.safetensors"


def adapted(seed: int = 0, base: nn.Module | None = None, **options: Any) -> PeftModel:
    model = get_peft_model(base or llama(), config("hra", **{"target_modules": QV, **options}))
    return randomize(model, seed).eval()  # type: ignore[return-value]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- refused, and nothing written


def no_tensor(model: PeftModel) -> dict[str, Any]:
    state = model.state_dict()
    return {"state_dict": {k: t for k, t in state.items() if "layers.1" not in k}}


def other_shape(model: PeftModel) -> dict[str, Any]:
    return {"state_dict": {k: t.flatten() if "hra_u" in k else t for k, t in model.state_dict().items()}}


def diverged(model: PeftModel) -> dict[str, Any]:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = float("nan")
    return {}


def other_rank(model: PeftModel) -> dict[str, Any]:
    model.peft_config["default"].r = 4
    return {}


def other_targets(model: PeftModel) -> dict[str, Any]:
    model.peft_config["default"].target_modules = {"q_proj"}
    return {}


def more_targets(model: PeftModel) -> dict[str, Any]:
    model.peft_config["default"].target_modules = {*QV, "k_proj"}
    return {}


def on_meta(model: PeftModel) -> dict[str, Any]:
    return {"state_dict": {k: t.to("meta") for k, t in model.state_dict().items()}}


REFUSED = {
    no_tensor: r"could not be read back: .*layers\.1.* missing\. Pass the state dict of the whole model",
    other_shape: r"hra_u has \(32,\) where \(16, 2\) is asked for. Call save_pretrained on every process",
    diverged: r"hra_u holds values that are not finite. The training has diverged",
    other_rank: r"hra_u has \(16, 2\) where \(16, 4\) is asked for",
    other_targets: r"asks for other tensors than the adapter has .*v_proj.*change none of them after wrapping",
    more_targets: r"k_proj.* missing",
    on_meta: r"is on the meta device where",
}


@pytest.mark.parametrize("how", REFUSED, ids=lambda f: f.__name__)
def test_what_could_not_be_read_is_not_written(how: Any, tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    arguments = how(model)
    with pytest.raises(HalotuneError, match=REFUSED[how]):
        model.save_pretrained(tmp_path, **arguments)
    assert contents(tmp_path) == before


def test_a_module_compiled_by_itself_is_refused() -> None:
    """torch.compile's wrapper goes on calling what it was put around."""
    base: Any = llama()
    base.model.layers[0].self_attn.q_proj = compiled(base.model.layers[0].self_attn.q_proj)
    with pytest.raises(HalotuneError, match=r"q_proj: torch.compile wraps this module itself.*model\.model\.layers"):
        get_peft_model(base, config("hra", target_modules=QV))


def test_a_copy_with_another_adapter_in_it_is_refused() -> None:
    model = adapted(target_modules=["lm_head"])
    with pytest.raises(HalotuneError, match="modules_to_save: 'lm_head' would be copied with the adapters"):
        model.add_adapter("second", config("hra", target_modules=QV, modules_to_save=["lm_head"]))


def test_an_adapter_inside_what_another_one_trains_whole(tmp_path: Path) -> None:
    """The first trains a block whole, the second adapts a layer in it: each file is as if it were alone."""
    model = adapted(target_modules=["up_proj"], modules_to_save=["self_attn"])
    model.add_adapter("second", config("hra", target_modules=["q_proj"]))
    model.set_adapter("second")
    randomize(model, 4)
    expected = output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path / "second")), expected)
    model.set_adapter("default")
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


def test_targets_that_a_state_dict_names_are_in_the_configuration(tmp_path: Path) -> None:
    model = halotune.AdapterModel(
        llama(), HRAConfig(r=2, target_modules=["up_proj"]), state_dict={"model.layers.1.self_attn.q_proj.hra_u": torch.ones(1)}
    )
    randomize(model).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


# -- the disk


def test_twice_and_into_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for seed in (0, 1):
        model = adapted(seed)
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(contents(tmp_path)) == 4


def test_threads_that_save_into_one_folder(tmp_path: Path) -> None:
    """Whoever is last, the file is whole, and no temporary one is left."""
    models = [adapted(seed) for seed in range(4)]
    errors: list[BaseException] = []

    def save(model: PeftModel) -> None:
        try:
            for _ in range(5):
                model.save_pretrained(tmp_path)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors and len(contents(tmp_path)) == 3
    found = output(PeftModel.from_pretrained(llama(), tmp_path))
    assert any(torch.equal(found, output(model)) for model in models)


def test_no_adapter_is_written_where_one_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", config("hra", target_modules=QV))
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.adapters["second"].hra_u.fill_(float("inf"))  # type: ignore
    with pytest.raises(HalotuneError, match="not finite"):
        model.save_pretrained(tmp_path)
    assert not contents(tmp_path)


def test_weights_and_configuration_are_renamed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another rank over an old one: where its configuration cannot be written, the old one is whole."""
    adapted().save_pretrained(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(Path, "write_text", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        adapted(r=4).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupted", "full"])
def test_a_write_that_ends_early(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(0).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def half(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    model = adapted(1)
    with pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        adapted().save_pretrained(tmp_path)
    tmp_path.chmod(0o700)
    assert not contents(tmp_path)


# -- merged


def test_saved_while_merged_and_merged_twice(tmp_path: Path) -> None:
    """A merged adapter is saved as it is unmerged; two merges are one after the other."""
    model = adapted(modules_to_save=["lm_head"])
    expected = output(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    model.merge_adapter()
    base: Any = model.merge_and_unload()
    assert torch.allclose(output(base), expected, atol=1e-6)
    again = PeftModel.from_pretrained(base, tmp_path / ".")  # on the merged one, once more
    second: Any = again.merge_and_unload()
    second.save_pretrained(tmp_path / "merged")
    assert torch.allclose(output(type(second).from_pretrained(tmp_path / "merged")), output(second), atol=1e-6)


@pytest.mark.filterwarnings("ignore:lm_head shares its weight")
def test_a_tied_head_that_is_merged_and_taken_back(tmp_path: Path) -> None:
    """The configuration follows: not tied while it is merged, tied again afterwards; unload leaves it as it was."""
    model = adapted(base=llama(tie_word_embeddings=True), target_modules=["lm_head"])
    config, expected = model.get_base_model().config, output(model)
    model.merge_adapter()
    assert config.tie_word_embeddings is False
    model.tie_weights()
    assert torch.allclose(output(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert config.tie_word_embeddings is True
    base: Any = model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight and "tie_weights" not in base.__dict__


def test_a_base_in_shards(tmp_path: Path) -> None:
    base: Any = llama()
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = adapted(base=type(base).from_pretrained(tmp_path / "base"))
    expected = output(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        output(PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")), expected
    )
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="4KB")
    assert torch.allclose(output(type(base).from_pretrained(tmp_path / "merged")), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:model.embed_tokens shares its weight")
def test_a_pickled_model_still_ties_its_own_weights() -> None:
    import copy
    import pickle

    model = adapted(base=llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"])
    expected = output(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.tie_weights()
        assert torch.equal(output(other), expected)
        assert other.get_base_model().lm_head.weight is not model.get_base_model().lm_head.weight


def test_other_layers_are_written_as_they_are_read(tmp_path: Path) -> None:
    """Names of a layer that is there twice, and of attention's projections, with a pattern of ranks."""
    options = {"target_modules": ["attention", "again"], "rank_pattern": {"out_proj": 4, "again": 3}}
    model = adapted(base=layers(), **options)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(layers(), tmp_path)), output(model))
