"""Checkpoints of adapters and their optimizer under FSDP2: training goes on, on any number of processes, as if nothing was."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from .cases import adapted, batch, failures, randomized, same, steps, trained
from .launch import spawn
from .test_fsdp2 import report, sharded


@contextmanager
def shared_folder() -> Iterator[Path]:
    """One for all processes, gone when all have left it."""
    with TemporaryDirectory() as own:
        name: list[Any] = [own]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()  # not after an error, which is to be seen


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=0.01)


def both(step: int) -> list[dict[str, Any]]:
    return [batch(rank + step) for rank in range(2)]


def agree(found: list[Any], wanted: list[Any], rank: int | None = None) -> None:
    """Losses (of one process, or of all) and norms of gradients of some steps."""
    for (loss, norm, _), (due, due_norm, _) in zip(found, wanted, strict=True):
        same(loss, due if rank is None else due[rank : rank + 1], what="loss")
        same(norm, due_norm, what="norm of the gradients")


# -- torch's own


def distributed_checkpoint(rank: int) -> None:
    """torch.distributed.checkpoint, of the adapter alone: one process, two, and one again."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(ignore_frozen_params=True)

    def state(model: Any, optimizer: Any) -> dict[str, Any]:
        own, its = get_state_dict(model, optimizer, options=options)
        return {"model": own, "optimizer": its}

    def resumed(model: Any, folder: Path, alone: bool = False) -> torch.optim.Optimizer:
        optimizer = optimizer_of(model)
        found = state(model, optimizer)
        dcp.load(found, checkpoint_id=folder, no_dist=alone)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=found["model"],
            optim_state_dict=found["optimizer"],
            options=StateDictOptions(strict=False),
        )
        return optimizer

    for method, way in (("hra", "block"), ("bat", "block"), ("lora", "block"), ("hra", "adapters-block")):
        wanted = steps(adapted(method), both, 6)
        with shared_folder() as folder:
            one = adapted(method)
            optimizer = optimizer_of(one)
            steps(one, both, 2, optimizer)
            if rank == 0:
                dcp.save(state(one, optimizer), checkpoint_id=folder / "one", no_dist=True)
            dist.barrier()
            two = sharded(randomized(adapted(method), 2), way)
            optimizer = resumed(two, folder / "one")
            agree(steps(two, lambda s: [batch(rank + s + 2)], 2, optimizer), wanted[2:4], rank)
            dcp.save(state(two, optimizer), checkpoint_id=folder / "two")
            kept = dcp.FileSystemReader(folder / "two").read_metadata().state_dict_metadata
            assert all(".adapters.default." in key or key.startswith("optimizer.param_groups") for key in kept), sorted(kept)
            one = randomized(adapted(method), 3)
            optimizer = resumed(one, folder / "two", alone=True)
            agree(steps(one, lambda s: both(s + 4), 2, optimizer), wanted[4:])


# -- accelerate and the Trainer


@contextmanager
def fsdp2_on_cpus(**options: Any) -> Iterator[Any]:
    """A new accelerator with a plugin for FSDP2, which accelerate itself takes for GPUs alone."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", **options}
    plugin = FullyShardedDataParallelPlugin(**options)

    def with_plugin(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", with_plugin)
        yield plugin
    AcceleratorState._reset_state()
    PartialState._reset_state()


def accelerated(method: str, seed: int = 1) -> tuple[Any, Any, Any]:
    from accelerate import Accelerator

    model = randomized(adapted(method), seed)
    accelerator = Accelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, optimizer_of(model))


def accelerate_checkpoint(rank: int) -> None:
    """`save_state` and `load_state`, in parts and whole; then adapters alone, as the Trainer does."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    for method, how in (("hra", "SHARDED_STATE_DICT"), ("lora", "FULL_STATE_DICT")):
        wanted = steps(adapted(method), both, 4)
        with shared_folder() as folder:
            with fsdp2_on_cpus(state_dict_type=how) as plugin:
                accelerator, model, optimizer = accelerated(method)
                agree(steps(model, lambda s: [batch(rank + s)], 2, optimizer), wanted[:2], rank)
                accelerator.save_state(folder / "state")
                save_fsdp_model(plugin, accelerator, model, folder / "adapter", adapter_only=True)
                save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / "adapter")
                model.save_pretrained(folder / "file", is_main_process=rank == 0, state_dict=accelerator.get_state_dict(model))
            with fsdp2_on_cpus(state_dict_type=how):
                accelerator, model, optimizer = accelerated(method, 2)
                accelerator.load_state(folder / "state")
                agree(steps(model, lambda s: [batch(rank + s + 2)], 2, optimizer), wanted[2:], rank)
            with fsdp2_on_cpus(state_dict_type=how) as plugin:
                accelerator, model, optimizer = accelerated(method, 2)
                load_fsdp_model(plugin, accelerator, model, folder / "adapter", adapter_only=True)
                load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / "adapter")
                agree(steps(model, lambda s: [batch(rank + s + 2)], 2, optimizer), wanted[2:], rank)


def trainer(rank: int) -> None:
    """transformers' Trainer, and ours with HRA's penalty: numbers and files of one process, also from a checkpoint on."""
    from accelerate.utils import merge_fsdp_weights
    from transformers import PrinterCallback, Trainer

    from halotune.integrations.transformers import AdapterTrainer
    from tests.integrations.models import arguments, losses, texts

    def made(kind: Any, folder: Path, batch_size: int, seed: int = 1, **options: Any) -> Any:
        model = adapted("hra", **({"orthogonality_weight": 0.05} if kind is AdapterTrainer else {}))
        sizes = {"max_steps": 4, "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 4}
        often = {"eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.1}
        out = kind(
            randomized(model, seed),
            arguments(folder, **sizes, **often, **options),
            train_dataset=texts(32),
            eval_dataset=texts(8),
        )
        out.remove_callback(PrinterCallback)
        return out

    def numbers(trainer: Any) -> dict[str, torch.Tensor]:
        return {key: torch.tensor(losses(trainer, key)) for key in ("loss", "eval_loss", "grad_norm", "penalty")}

    saving = {"save_strategy": "steps", "save_steps": 2}
    for kind, how in ((Trainer, "SHARDED_STATE_DICT"), (AdapterTrainer, "FULL_STATE_DICT")):
        with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as alone:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.delenv(name)
            one = made(kind, Path(alone), 8)
            one.train()
        wanted = numbers(one)
        assert len(wanted["loss"]) == 4 and bool(len(wanted["penalty"])) is (kind is AdapterTrainer)
        with shared_folder() as folder:
            with fsdp2_on_cpus(state_dict_type=how):
                best = how == "FULL_STATE_DICT"  # of parts the Trainer looks for before they are written
                two = made(kind, folder, 4, load_best_model_at_end=best, **saving)
                two.train()
                two.save_model()
                two.model.save_pretrained(folder / "file", is_main_process=rank == 0)
            for key, found in numbers(two).items():
                same(found, wanted[key], what=f"{kind.__name__}: {key}")
            dist.barrier()
            file = load_file(folder / "file" / "adapter_model.safetensors")
            if best:
                kept = [load_file(Path(f) / "adapter_model.safetensors") for f in (two.state.best_model_checkpoint, folder)]
            else:  # what `accelerate merge-weights` does
                if rank == 0:
                    merge_fsdp_weights(str(folder / "checkpoint-4" / "pytorch_model_fsdp_0"), str(folder / "merged"))
                dist.barrier()
                kept = [load_file(folder / "merged" / "model.safetensors")]
            for tensors in kept:
                assert tensors.keys() == file.keys() and all(torch.equal(t, file[key]) for key, t in tensors.items())
            with fsdp2_on_cpus(state_dict_type=how):
                again = made(kind, folder / "again", 4, seed=2)
                again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            for key, found in numbers(again).items():
                same(found, wanted[key], what=f"{kind.__name__}, resumed: {key}")


def recipe(rank: int) -> None:
    """A recipe with checkpoints in parts, stopped and gone on with, against one with whole ones that runs through."""
    from tests.recipes.jobs import run
    from tests.recipes.problems import base_folder, write_problems
    from tests.recipes.test_processes import USUAL

    with shared_folder() as folder:
        if rank == 0:
            base_folder(folder / "llama")
            write_problems(folder / "train.jsonl", range(40))
        dist.barrier()
        data = {"model": str(folder / "llama"), "template": "plain", "data": str(folder / "train.jsonl"), "evaluation": 0.2}
        sizes = {"max_length": 96, "batch_size": 4, "max_steps": 4, "save_every": 2, "evaluate_every": 2, "adapter": {"r": 4}}
        for how, stops in (("FULL_STATE_DICT", [None]), ("SHARDED_STATE_DICT", [3, None])):
            for stop in stops:
                with fsdp2_on_cpus(state_dict_type=how):
                    run("train_sft", {**data, **sizes, **USUAL, "output": str(folder / how)}, stop)
        dist.barrier()
        lines = [(folder / f"{how}_STATE_DICT" / "metrics.jsonl").read_text().splitlines() for how in ("FULL", "SHARDED")]
        numbers = [[line.get("loss") or line["evaluation"]["loss"] for line in map(json.loads, found)] for found in lines]
        assert len(numbers[0]) == 6
        same(torch.tensor(numbers[1]), torch.tensor(numbers[0]), what="losses")
        for name in ("adapter", "best"):
            one, two = (
                load_file(folder / f"{how}_STATE_DICT" / name / "adapter_model.safetensors") for how in ("FULL", "SHARDED")
            )
            assert one.keys() == two.keys() != set()
            for key, t in one.items():
                same(two[key], t, what=f"{name}: {key}")


CASES = {f.__name__: f for f in (distributed_checkpoint, accelerate_checkpoint, trainer, recipe)}


def case(rank: int, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES[name](rank)


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    names = [(name,) for name in CASES if name != "recipe" or find_spec("trl")]
    return spawn(2, failures, names, case, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name: str, found: list[dict[tuple[Any, ...], str]]) -> None:
    if name == "recipe" and not find_spec("trl"):
        pytest.skip("needs trl")
    for rank, failed in enumerate(found):
        if (name,) in failed:
            pytest.fail(f"process {rank}: {failed[name,]}")


if __name__ == "__main__":
    names = [(name,) for name in sys.argv[1:] or CASES]
    report(spawn(2, failures, names, case, timeout=120), names)
