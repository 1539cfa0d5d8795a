"""The orthogonality penalty in the Trainer: one gradient, however many steps and processes share the batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halotune import HRAConfig, PeftModel

from .models import adapted, arguments, language_model, losses, tensors, texts

pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from halotune.integrations.transformers import AdapterTrainer  # noqa: E402

WEIGHT = 0.05


def penalized(weight: float = WEIGHT) -> PeftModel:
    """With vectors that are far from orthogonal, so that the penalty has a gradient to speak of."""
    config = HRAConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", orthogonality_weight=weight)
    model = adapted(config, language_model())
    rng = torch.Generator().manual_seed(2)
    for name in tensors(model):
        model.get_parameter(name).data = torch.randn(model.get_parameter(name).shape, generator=rng) + 1
    return model


class Gradients(transformers.TrainerCallback):
    """Keeps those that the optimizer's first step gets."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradients(folder: Path, model: PeftModel, *, items: bool = True, kind: Any = AdapterTrainer, **kwargs: Any) -> Any:
    """The first step's gradients over eight samples, and the Trainer."""
    kept = Gradients()
    args = arguments(folder, max_steps=2, max_grad_norm=0.0, **kwargs)
    trainer = kind(model, args, train_dataset=texts(16), callbacks=[kept])
    trainer.model_accepts_loss_kwargs = items  # else the Trainer divides by the accumulation steps itself
    trainer.train()
    return kept.found, trainer


def expected(model: PeftModel, folder: Path, **kwargs: Any) -> dict[str, Tensor]:
    """The stock Trainer's gradient of the task, and autograd's of the penalty."""
    plain, _ = gradients(folder, penalized(weight=0.0), kind=transformers.Trainer, per_device_train_batch_size=8, **kwargs)
    penalty = model.penalty()
    assert isinstance(penalty, Tensor)
    names = list(tensors(model))
    own = torch.autograd.grad(penalty, [model.get_parameter(n) for n in names])
    assert all(g.norm() > 0.05 * plain[n].norm() for n, g in zip(names, own, strict=True))
    return {n: plain[n] + g for n, g in zip(names, own, strict=True)}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-6) for n in wanted)


@pytest.mark.parametrize("items", [True, False], ids=["tokens counted", "mean of each batch"])
@pytest.mark.parametrize("steps", [1, 8])
def test_one_gradient_for_any_accumulation(steps, items, tmp_path):
    model = penalized()
    wanted = expected(model, tmp_path, items=items)
    found, _ = gradients(
        tmp_path, model, items=items, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps
    )
    assert agree(found, wanted)


STEPS = (1, 4)


def _worker(rank: int, port: int, folder: str) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in here.items()})
    torch.set_num_threads(1)
    for steps in STEPS:
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        found, trainer = gradients(Path(folder), penalized(), ddp_backend="gloo", **sizes)
        torch.save((found, losses(trainer, "penalty")), Path(folder) / f"{rank}-{steps}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking a gloo group down can deadlock: its thread wants the interpreter's lock, which its destructor holds


def test_one_gradient_for_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    model = penalized()
    wanted = expected(model, tmp_path)
    for steps in STEPS:
        found, logged = torch.load(tmp_path / f"0-{steps}.pt")
        other, _ = torch.load(tmp_path / f"1-{steps}.pt")
        assert agree({n.removeprefix("module."): g for n, g in found.items()}, wanted) and agree(other, found)
        assert logged[0] == pytest.approx(model.penalty().item(), rel=1e-5)


def test_it_has_a_column_of_its_own(tmp_path):
    model, first = penalized(), penalized().penalty().item()
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer = AdapterTrainer(model, args, train_dataset=texts(), eval_dataset=texts())
    trainer.train()
    plain = transformers.Trainer(penalized(), args, train_dataset=texts(), eval_dataset=texts())
    plain.train()
    assert first > 0.1
    assert losses(trainer, "penalty")[0] == pytest.approx(first, rel=1e-5)
    assert len(losses(trainer, "penalty")) == 2 and losses(trainer, "penalty")[1] < first
    assert losses(trainer)[0] == losses(plain)[0] and losses(trainer)[1] != losses(plain)[1]
    assert losses(trainer, "eval_loss")[0] == losses(plain, "eval_loss")[0]
    assert all("penalty" not in entry for entry in trainer.state.log_history if "eval_loss" in entry)


def test_without_a_weight_nothing_is_added(tmp_path):
    found = [gradients(tmp_path, penalized(0.0), kind=kind)[0] for kind in (AdapterTrainer, transformers.Trainer)]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])
