"""Two processes on the CPU: FSDP2 and DDP give the losses and gradients of one process.

The processes are started once and run every case; the tests read what they found.
"""

from __future__ import annotations

import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .cases import ALL, METHODS, Attention, adapted, adapter_parameters, assert_same, change, linear, sample

TIMEOUT = timedelta(seconds=60)
KINDS = ["fsdp2-blocks", "fsdp2-whole", "fsdp2-checkpoint", "ddp", "ddp-unused"]
CASES = [(method, kind) for method in METHODS for kind in KINDS]
CASES += [(method, kind) for method in ALL if method not in METHODS for kind in ("fsdp2-blocks", "ddp")]


class Model(nn.Module):
    """A layer in front, which a pass may leave out, and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.q = linear()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.skip:
            x = torch.tanh(self.q(x))
        for block in self.blocks:
            x = block(x)
        return x


def case(rank: int, method: str, kind: str) -> None:
    """Raises where this process's loss or gradients are not those of one process."""
    model, reference = adapted(method, Model, dtype=torch.float32)
    model.get_base_model().skip = reference.plain.skip = kind == "ddp-unused"
    xs = [sample(5, 12, seed=seed, dtype=torch.float32, requires_grad=False) for seed in range(2)]
    names = list(adapter_parameters(model))

    def expected() -> list[Tensor | None]:
        parameters = [whole(p) for p in adapter_parameters(model).values()]
        values = {name: p.detach().requires_grad_() for name, p in zip(names, parameters, strict=True)}
        losses = [reference(x, values=values).square().mean() for x in xs]
        return [losses[rank].detach(), *torch.autograd.grad(sum(losses) / 2, list(values.values()), allow_unused=True)]

    want = expected()
    run = spread(model, kind)
    for _ in range(3):
        model.zero_grad()
        loss = run(xs[rank]).square().mean()
        loss.backward()
        got = [whole(p.grad) for p in adapter_parameters(model).values()]
        assert_same([loss, *got], want, tolerance=1e-4)
        if not kind.startswith("fsdp2"):
            change(model)
            want = expected()
    with torch.no_grad():
        assert_same([run(xs[rank]).square().mean()], want[:1], tolerance=1e-4)


def spread(model: Any, kind: str) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if kind.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "ddp-unused")
    mesh = init_device_mesh("cpu", (2,))
    if kind == "fsdp2-checkpoint":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Attention))
    if kind != "fsdp2-whole":
        for block in model.get_base_model().blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(t: Tensor | None) -> Any:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[union-attr]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=TIMEOUT)
    out = {}
    for method, kind in CASES:
        try:
            case(rank, method, kind)
        except (Exception, pytest.skip.Exception) as e:
            out[method, kind] = "".join(traceback.format_exception(e)[-3:])
        dist.barrier()
    torch.save(out, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], str]]:
    """For each process, the cases that failed there, and how."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(process, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_as_in_one_process(method, kind, failures):
    for failed in failures:
        if message := failed.get((method, kind)):
            pytest.fail(message)
