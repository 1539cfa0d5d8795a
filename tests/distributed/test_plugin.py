"""FSDP2 as accelerate's plugin sets it up, on CPUs or with a GPU for each process: what is trained and saved is as in one.

`python -m tests.distributed.test_plugin N [part of a case …]` runs all cases on N processes of the CPU.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from halotune import PeftModel

from .cases import METHODS, adapted, batch, failures, llama, same, steps, trained
from .launch import spawn
from .test_checkpoints import fsdp2_on_cpus, shared_folder
from .test_fsdp2 import report

GPUS = torch.cuda.device_count()
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def accelerator(device: str, precision: str, offload: bool) -> Iterator[Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed.fsdp import CPUOffloadPolicy

    how = {"cpu_offload": CPUOffloadPolicy(pin_memory=device != "cpu") if offload else False}
    if device == "cpu":
        with fsdp2_on_cpus(mixed_precision_policy=None if precision == "no" else precision, **how):
            yield Accelerator(cpu=True, mixed_precision=precision)
        return
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **how)
    yield Accelerator(fsdp_plugin=plugin, mixed_precision=precision)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def case(rank: int, method: str, precision: str, offload: bool, device: str = "cpu") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_and_keep(rank, method, precision, offload, device)


def train_and_keep(rank: int, method: str, precision: str, offload: bool, device: str) -> None:
    """Two steps; then saved in both ways that there are, loaded, merged and unmerged."""
    exact, given, processes = precision == "no", batch(rank, device), range(dist.get_world_size())

    def base() -> Any:
        return llama().to(device, DTYPES[precision])

    expected = steps(adapted(method, base()), lambda step: [batch(r + step, device) for r in processes])
    with accelerator(device, precision, offload) as accelerate, shared_folder() as folder:
        plain = adapted(method, base())
        model, optimizer = accelerate.prepare(plain, torch.optim.AdamW(trained(plain).values(), lr=0.01))
        found = steps(model, lambda step: [batch(rank + step, device)], optimizer=optimizer)
        for step, (one, two) in enumerate(zip(expected, found, strict=True)):
            same(two[0][0], one[0][rank], 1e-5 if exact else 2e-2, f"step {step}: the loss")
            if exact or step == 0:  # Adam's first step of a small gradient is its sign, in bf16 noise
                same(two[1], one[1], 1e-4 if exact else 0.05, f"step {step}: the norm of all gradients")
            assert one[2].keys() == two[2].keys()
            for name, grad in one[2].items() if exact else ():
                same(two[2][name], grad, 1e-4, f"step {step}: the gradient of {name}")
        if offload:
            assert all(p.to_local().device.type == "cpu" for p in trained(model).values())

        def loss(model: Any) -> torch.Tensor:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=not exact):
                return model(**given).loss

        model.eval()
        due, close = loss(model), 1e-5 if exact else 2e-2
        state = accelerate.get_state_dict(model)  # on every process
        model.save_pretrained(folder / "state", is_main_process=rank == 0, state_dict=state)
        model.save_pretrained(folder / "whole", is_main_process=rank == 0)
        dist.barrier()
        two, one = (load_file(folder / name / "adapter_model.safetensors") for name in ("state", "whole"))
        assert two.keys() == one.keys() and all(torch.equal(t, one[key]) for key, t in two.items())
        same(loss(PeftModel.from_pretrained(base(), folder / "whole")), due, close, "loaded in one process")
        model.load_adapter(folder / "whole", "default", is_trainable=True)
        same(loss(model.eval()), due, close, "loaded")
        report = model.merge_adapter()
        assert report.total().delta > 0
        same(loss(model), due, close, "merged")
        model.unmerge_adapter()
        same(loss(model), due, close, "unmerged")


ALL = [(method, precision, offload) for method in METHODS for precision in DTYPES for offload in (False, True)]
CASES = [("hra", "no", False), ("bat", "bf16", True), ("lora", "no", True)]


@pytest.fixture(scope="module")
def found() -> list[dict[tuple[Any, ...], str]]:
    return spawn(2, failures, CASES, case, timeout=300)


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_as_in_one_process(chosen: tuple[Any, ...], found: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found):
        if chosen in failed:
            pytest.fail(f"process {rank}: {failed[chosen]}")


ON_GPUS = [(*chosen, "cuda") for chosen in ALL]


@pytest.fixture(scope="module")
def found_on_gpus() -> list[dict[tuple[Any, ...], str]]:
    return spawn(GPUS, failures, ON_GPUS, case, backend="cpu:gloo,cuda:nccl", timeout=600)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices, for NCCL")
@pytest.mark.parametrize("chosen", ON_GPUS, ids=str)
def test_on_gpus(chosen: tuple[Any, ...], found_on_gpus: list[dict[tuple[Any, ...], str]]) -> None:
    for rank, failed in enumerate(found_on_gpus):
        if chosen in failed:
            pytest.fail(f"process {rank}: {failed[chosen]}")


if __name__ == "__main__":
    parts = set(sys.argv[2:])
    chosen = [c for c in ALL if parts <= {str(value) for value in c}]
    report(spawn(int(sys.argv[1]), failures, chosen, case, timeout=600), chosen)
