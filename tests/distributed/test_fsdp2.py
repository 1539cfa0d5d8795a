"""FSDP2 on two processes: training, generation, merging and files are those of one process.

All cases run in one group of processes; `python -m tests.distributed.test_fsdp2 --all` runs every method in every way.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import halotune
from halotune import HalotuneError
from halotune.core.layer import AdaptedLayer

from .cases import METHODS, adapted, batch, failures, randomized, same, steps, trained, whole
from .launch import spawn

WAYS = ["root", "block", "layer", "base", "nested", "kept", "offload", "checkpoint-inside", "checkpoint-outside", "compiled"]
WAYS += [f"adapters-{way}" for way in ("root", "block", "offload", "checkpoint-inside", "checkpoint-outside", "compiled")]
CHECKS = ["train", "generate", "merge", "files"]


def sharded(model: Any, way: str, device: str = "cpu", **how: Any) -> Any:
    """`fully_shard` in one of the ways that people use, with "adapters-" those as one unit; other arguments are `how`."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    how = {"mesh": mesh, **how}
    if together := way.startswith("adapters-"):
        way = way.removeprefix("adapters-")
    if way == "offload":
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device != "cpu")
    if way == "kept":
        how["reshard_after_forward"] = False
    if together:
        halotune.shard_adapters(model, **how)
    blocks = model.get_base_model().model.layers
    if way == "checkpoint-inside":  # the unit holds the checkpoint
        apply_activation_checkpointing(model, check_fn=lambda m: any(m is b for b in blocks))
        blocks = model.get_base_model().model.layers
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    if way in ("layer", "nested"):
        for layer in layers:
            fully_shard(layer, **how)
    if way == "base":
        for layer in layers:
            fully_shard(layer.base_layer, **how)
    if way not in ("root", "layer", "base"):
        for block in blocks:
            fully_shard(block, **how)
    if way == "checkpoint-outside":  # the checkpoint holds the unit
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block)
    if way == "compiled":
        for block in blocks:
            block.compile(backend="eager")
    return fully_shard(model, **how)


def case(rank: int, method: str, way: str, check: str, device: str = "cpu") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error" if check in ("merge", "files") else "default")
        warnings.filterwarnings("ignore", category=FutureWarning)
        RUN[check](rank, method, way, device)


def train(rank: int, method: str, way: str, device: str) -> None:
    expected = steps(adapted(method).to(device), lambda step: [batch(r + step, device) for r in range(2)])
    found = steps(sharded(adapted(method).to(device), way, device), lambda step: [batch(rank + step, device)])
    for step, (one, two) in enumerate(zip(expected, found, strict=True)):
        same(two[0][0], one[0][rank], what=f"step {step}: the loss")
        same(two[1], one[1], what=f"step {step}: the norm of all gradients")
        assert one[2].keys() == two[2].keys()
        for name, grad in one[2].items():
            same(two[2][name], grad, what=f"step {step}: the gradient of {name}")


def generate(rank: int, method: str, way: str, device: str) -> None:
    ids, how = batch(rank, device)["input_ids"], {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = adapted(method).to(device).eval().generate(input_ids=ids, **how)
    model = sharded(adapted(method).to(device), way, device).eval()
    for _ in range(2):  # and the model goes on being one that trains
        assert torch.equal(model.generate(input_ids=ids, **how), expected)
        model(**batch(rank, device)).loss.backward()


@torch.no_grad()
def merge(rank: int, method: str, way: str, device: str) -> None:
    one, given = adapted(method).to(device).eval(), batch(rank, device)
    expected, plain = one(**given).logits, one.get_base_model().state_dict()
    model = sharded(adapted(method).to(device), way, device).eval()
    same(model(**given).logits, expected, what="before the merge")  # which leaves the root whole
    report = model.merge_adapter()
    assert report.total().delta > 0
    same(model(**given).logits, expected, what="merged")
    with pytest.raises(AssertionError):  # the adapter does something, and merging took it in
        with model.disable_adapter():
            same(model(**given).logits, expected)
    same(model(**given).logits, expected, what="merged again")
    model.unmerge_adapter()
    same(model(**given).logits, expected, what="unmerged")
    with whole_state(model) as state:
        for key, t in plain.items():
            assert torch.equal(state[f"base_model.model.{key}"].cpu(), t.cpu()), f"{key} is not as it was"


class whole_state:
    """All of the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {key: whole(t) for key, t in model.state_dict().items()}

    def __enter__(self) -> dict[str, Any]:
        return self.state

    def __exit__(self, *_: Any) -> None:
        self.state.clear()


def files(rank: int, method: str, way: str, device: str) -> None:
    shared: list[Any] = [TemporaryDirectory() if rank == 0 else None]
    names = [shared[0].name if rank == 0 else None]
    dist.broadcast_object_list(names)
    folder, given = Path(str(names[0])), batch(rank, device)
    one = adapted(method).to(device)
    one.save_pretrained(folder / f"one-{rank}")
    expected = load_file(folder / f"one-{rank}" / "adapter_model.safetensors")
    model = sharded(adapted(method).to(device), way, device)
    model(**given).loss.backward()
    # save: on every process, then with a state dict of torch's, then of parts alone
    model.save_pretrained(folder / "two", is_main_process=rank == 0)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    how = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=how)
    model.save_pretrained(folder / "state", is_main_process=rank == 0, state_dict=state)
    with pytest.raises(HalotuneError, match=r"is a DTensor .*Call save_pretrained on every process"):
        model.save_pretrained(folder / "parts", state_dict=model.state_dict())
    dist.barrier()
    for name in ("two", "state"):
        found = load_file(folder / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for key, t in expected.items():
            assert torch.equal(found[key], t), f"{name}: {key}"
    assert not (folder / "parts").exists()
    # load: another adapter's numbers, then these again
    other = sharded(randomized(adapted(method), 2).to(device), way, device)
    for _ in range(2):
        other.load_adapter(folder / "two", "default", is_trainable=True)
        for key, p in trained(other).items():
            same(whole(p), trained(one)[key], what=f"loaded: {key}", tolerance=0)
        with torch.no_grad():  # which leaves the root whole
            same(other(**given).logits, one(**given).logits, what="loaded: logits")
    # export, which needs the base's weights too
    if not method.startswith(("bat", "oft")):
        one.export("lora", folder / f"lora-{rank}")
        model.export("lora", folder / "lora")
        dist.barrier()
        lora = load_file(folder / "lora" / "adapter_model.safetensors")
        for key, t in load_file(folder / f"lora-{rank}" / "adapter_model.safetensors").items():
            same(lora[key], t, what=f"exported: {key}")
    dist.barrier()
    if rank == 0:
        shared[0].cleanup()


RUN = {"train": train, "generate": generate, "merge": merge, "files": files}
ALL = [(method, way, check) for way in WAYS for method in METHODS for check in CHECKS]
# Each method by blocks, as most people do; each way with two methods of different kinds.
CASES = [(method, "block", check) for method in METHODS for check in ("train", "files")]
CASES += [(method, "block", check) for method in ("hra", "bat") for check in ("generate", "merge")]
CASES += [(method, way, "train") for way in WAYS if way != "block" for method in ("hra", "bat")]
CASES += [("hra", "root", "generate"), ("hra", "layer", "merge"), ("bat", "base", "merge"), ("loha", "base", "files")]
CASES += [("lora", "offload", "files"), ("bat", "offload", "merge")]
CASES += [(method, "adapters-block", "train") for method in METHODS]
CASES += [("hra", "adapters-block", check) for check in ("generate", "merge", "files")] + [("bone", "adapters-block", "files")]
CASES += [("hra", f"adapters-{way}", "train") for way in ("offload", "checkpoint-inside", "checkpoint-outside", "compiled")]
CASES += [(f"{method}-experts", "block", check) for method in ("hra", "bat", "lora") for check in ("train", "merge", "files")]
CASES += [("hra-experts", "base", "merge"), ("lora-experts", "adapters-block", "files")]


def report(found: list[dict[tuple[Any, ...], str]], cases: list[tuple[Any, ...]]) -> None:
    for case in cases:
        wrong = [f"process {rank}: {failed[case]}" for rank, failed in enumerate(found) if case in failed]
        print(*case, "FAILED" if wrong else "ok")
        print("".join(wrong[:1]), end="")


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    return spawn(2, failures, CASES, case, timeout=300)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_as_in_one_process(case: tuple[Any, ...], found: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found):
        if case in failed:
            pytest.fail(f"process {rank}: {failed[case]}")


if __name__ == "__main__":
    parts = [part for part in sys.argv[1:] if part != "--all"]
    chosen = [c for c in (ALL if "--all" in sys.argv else CASES) if all(part in c for part in parts)]
    report(spawn(2, failures, chosen, case, timeout=3000), chosen)
