"""The law of files: whatever the method, the model and the way to save it, what is written can be read, or is refused.

A trained model is saved; a fresh base, with what a new process draws anew, and the file give the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import halotune
from halotune import PeftModel
from halotune.engine.injection.modules import unwrapped
from halotune.engine.injection.surgery import swap
from halotune.integrations.transformers import AdapterTrainer

from .kinds import KINDS, METHODS, config, output

pytestmark = pytest.mark.filterwarnings("ignore")  # each kind has its own; they are tested where they belong
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process alone, for DistributedDataParallel."""
    store = f"file://{tmp_path_factory.mktemp('group')}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    trained.cache_clear()
    yield
    trained.cache_clear()
    torch.distributed.destroy_process_group()


@cache
def trained(kind: str, method: str) -> tuple[nn.Module, PeftModel, Tensor]:
    """The model in what is around it, itself, and its outputs."""
    wrapped = KINDS[kind].wrapped(method)
    model = unwrapped(wrapped)
    assert isinstance(model, PeftModel)
    return wrapped, model, output(model)


# -- ways to save


def save_pretrained(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)


def own_state_dict(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=wrapped.state_dict())


def inner_state_dict(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=model.get_base_model().state_dict())


def no_state_dict(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, state_dict={})


def trainer(wrapped: nn.Module, model: PeftModel, folder: Path, kind: Any = AdapterTrainer) -> None:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True)
    (Trainer if kind is None else kind)(model, args).save_model(str(folder))


def stock_trainer(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    trainer(wrapped, model, folder, None)


def accelerate(wrapped: nn.Module, model: PeftModel, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    state = accelerator.get_state_dict(wrapped)
    accelerator.unwrap_model(wrapped).save_pretrained(folder, state_dict=state, save_function=accelerator.save)


WAYS: list[Callable[[nn.Module, PeftModel, Path], None]] = [
    save_pretrained,
    own_state_dict,
    inner_state_dict,
    no_state_dict,
    trainer,
    stock_trainer,
    accelerate,
]


def loaded(kind: str, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(KINDS[kind].base(1), folder)
    if KINDS[kind].second:
        model.load_adapter(folder / "second", "second")
        model.set_adapter(["default", "second"])
    return model.eval()


def pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Kinds and methods; what is around a model does not know the method, and compiling takes a second."""
    return [(k, m) for k in KINDS for m in methods if m == "hra" or not k.startswith(("compiled", "parallel"))]


@pytest.mark.parametrize(("kind", "method"), pairs(METHODS))
def test_what_is_written_can_be_read(kind: str, method: str, tmp_path: Path) -> None:
    wrapped, model, expected = trained(kind, method)
    for i, way in enumerate(WAYS):
        folder = tmp_path / way.__name__
        way(wrapped, model, folder)
        if i == 0:
            assert torch.allclose(output(loaded(kind, folder)), expected, atol=1e-6), way.__name__
            continue
        first = load_file(tmp_path / WAYS[0].__name__ / "adapter_model.safetensors")
        again = load_file(folder / "adapter_model.safetensors")
        assert first.keys() == again.keys() and all(torch.equal(t, first[k]) for k, t in again.items()), way.__name__


@pytest.mark.parametrize("functions", [peft, halotune], ids=["peft", "halotune"])
@pytest.mark.parametrize(("kind", "method"), pairs(["hra", "bone", "lora"]))  # peft does not know bone's type
def test_state_dicts_go_from_model_to_model(kind: str, method: str, functions: Any) -> None:
    _, model, expected = trained(kind, method)
    fresh = halotune.get_peft_model(KINDS[kind].before(KINDS[kind].base(1)), config(method, **KINDS[kind].options)).eval()
    if KINDS[kind].second:
        fresh.add_adapter("second", config(method, target_modules=KINDS[kind].second))
        fresh.set_adapter(["default", "second"])
    for name in model.peft_config:
        found = functions.get_peft_model_state_dict(model, adapter_name=name)
        functions.set_peft_model_state_dict(fresh, {k: t.clone() for k, t in found.items()}, adapter_name=name)
    assert torch.allclose(output(fresh), expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "method"), [(k, m) for k, m in pairs(["hra", "lora"]) if k != "layers"])
def test_a_merged_model_is_what_its_folder_says(kind: str, method: str, tmp_path: Path) -> None:
    model = unwrapped(KINDS[kind].wrapped(method))
    assert isinstance(model, PeftModel)
    expected = output(model)
    merged: Any = unwrapped(model.merge_and_unload())
    assert torch.allclose(output(merged), expected, atol=1e-5)
    for layer in [m for m in merged.modules() if "_orig_mod" in m._modules]:
        swap(merged, {layer: unwrapped(layer)})  # transformers' own writer keeps the names
    merged.save_pretrained(tmp_path)
    again, report = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.allclose(output(again.eval()), expected, atol=1e-5)
    if kind == "seq2seq-head-whole":
        return  # a T5 that is not tied computes other outputs, which the merge says
    again.tie_weights()  # what a reader does that believes the configuration alone
    assert torch.allclose(output(again), expected, atol=1e-5)
