"""A training loop of any kind gets the gradients of the definition, complete when `backward()` returns."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halotune import PeftModel, get_peft_model
from halotune.core.layer import AdaptedLayer

from .cases import CONFIGS, adapted, every, trained

COMPUTE = {
    f"aten::{name}"
    for name in "mm addmm addmm_ bmm linalg_solve_triangular linalg_pinv stack add add_ mul div neg sum where to".split()
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, checkpointed: bool | None = None, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointed is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointed)  # type: ignore[assignment]
        return x


def model_of(name: str, **options: bool) -> PeftModel:
    return adapted(lambda: Model(**options).double(), CONFIGS[name])


def batch(seed: int) -> Tensor:
    return torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in trained(model)]
    assert all(g is not None for g in found)
    return [g.clone() for g in found]  # type: ignore[union-attr]


def by_definition(name: str, run: Callable[[nn.Module], object]) -> list[Tensor]:
    """The gradients where every layer is `x weight(W)ᵀ + b`, by plain autograd, one layer after the other."""

    def plain(layer: AdaptedLayer) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, layer.running()[0].weight(layer.base_layer.weight), layer.base_layer.bias)

    model = model_of(name)
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer):
            layer.forward = plain(layer)  # type: ignore[method-assign]
    run(model)
    return grads(model)


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def one_batch(model: nn.Module) -> None:
    loss_of(model(batch(1))).backward()


def accumulated(model: nn.Module) -> None:
    for seed in (1, 2, 3):
        (loss_of(model(batch(seed))) / 3).backward()


def two_forwards(model: nn.Module) -> None:
    """A contrastive loss, say."""
    a, b = model(batch(1)), model(batch(2))
    loss_of(a - b).backward()


def two_forwards_and_a_step_between(model: nn.Module) -> None:
    """The graph of the first pass must not see what the second one derived."""
    a = model(batch(1))
    with torch.no_grad():
        model(batch(5))
    (loss_of(a) + loss_of(model(batch(2)))).backward()


def a_part_alone(model: nn.Module) -> None:
    """Nobody calls the whole model: the layers prepare themselves."""
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    x = batch(1)
    for part in block:
        x = part(x)
    loss_of(x).backward()


def kept_for_a_second_backward(model: nn.Module) -> None:
    loss = loss_of(model(batch(1)))
    loss.backward(retain_graph=True)
    loss.backward()


RUNS = [one_batch, accumulated, two_forwards, two_forwards_and_a_step_between, a_part_alone, kept_for_a_second_backward]


@every
@pytest.mark.parametrize("run", RUNS, ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_definition(name, run):
    model = model_of(name)
    run(model)
    same(grads(model), by_definition(name, run))


@every
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing(name, reentrant):
    model = model_of(name, checkpointed=reentrant)
    loss_of(model(batch(1).requires_grad_())).backward()
    same(grads(model), by_definition(name, one_batch))


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "not-reentrant", "reentrant"])
def test_layers_of_one_shape_prepare_together(checkpointed, monkeypatch):
    """In forward, where a checkpoint runs them again, and in backward."""
    from halotune.methods.hra.adapter import HRA

    calls: list[tuple[int, ...]] = []

    def counted(self, *parameters, prepare=HRA.prepare):
        calls.append(tuple(parameters[0].shape))
        return prepare(self, *parameters)

    monkeypatch.setattr(HRA, "prepare", counted)
    model = model_of("hra", checkpointed=checkpointed)
    loss_of(model(batch(1).requires_grad_())).backward()
    forward, backward = (1, 1) if checkpointed is None else (2, 1 if checkpointed is False else 3)
    together = [call for call in calls if call[0] == 3]
    assert together.count((3, 16, 4)) == together.count((3, 24, 4)) >= forward
    assert len(calls) <= 2 * (forward + backward)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("checkpointed", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["hra", "hra-gs"])
def test_a_further_layer_takes_no_more_operations_than_with_lora(name, checkpointed, autocast):
    """In a step. Vectors are normalised and solved for together, also where a checkpoint runs layers again."""

    def operations(name: str, depth: int) -> int:
        model = adapted(lambda: Model(checkpointed, depth).bfloat16(), CONFIGS[name])
        x = torch.randn(5, 16, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(x).float().square().mean().backward()
        return sum(event.count for event in profile.key_averages() if event.key in COMPUTE)

    def of_a_layer(name: str) -> float:
        return (operations(name, 6) - operations(name, 2)) / 8

    assert 0 < of_a_layer(name) <= of_a_layer("lora")


@every
def test_a_step_is_seen_by_the_next_pass(name):
    """Also a step that leaves no trace in the version counter, as bitsandbytes' optimisers take it."""
    model = model_of(name)
    for train in (True, False):
        model.train(train)
        for p in trained(model):
            p.data.mul_(1.1)
        with torch.set_grad_enabled(train):
            y = model(batch(1))
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(y, fresh(batch(1)), rtol=1e-10, atol=1e-12)


@every
def test_an_optimizer_in_eight_bits(name):
    """bitsandbytes writes to parameters without a trace in their version counter."""
    optim = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").optim
    model = model_of(name).float()
    optimizer = optim.AdamW8bit(trained(model), lr=1e-2, min_8bit_size=1)
    x = batch(1).float()
    losses = []
    for _ in range(5):
        with torch.no_grad():
            before = model(x)  # what is derived here is kept, as in evaluation
        loss = loss_of(model(x))
        loss.backward()
        versions = [p._version for p in trained(model)]
        optimizer.step()
        assert versions == [p._version for p in trained(model)]
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            after = model(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, copy.deepcopy(model)(x), rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]


@every
def test_clipping_sees_the_whole_gradient(name):
    model = model_of(name)
    one_batch(model)
    want = torch.stack([g.norm() for g in by_definition(name, one_batch)]).norm()
    norm = torch.nn.utils.clip_grad_norm_(trained(model), float(want) / 2)
    torch.testing.assert_close(norm, want)
    torch.testing.assert_close(torch.stack([g.norm() for g in grads(model)]).norm(), want / 2, rtol=1e-5, atol=0)


@every
def test_hooks_on_gradients_fire_once(name):
    """A step inside backward, as fused optimisers take it, finds the gradient complete."""
    model = model_of(name)
    seen: dict[nn.Parameter, list[Tensor]] = {p: [] for p in trained(model)}
    for p in seen:
        p.register_post_accumulate_grad_hook(lambda q: seen[q].append(q.grad.clone()))  # type: ignore[union-attr]
    one_batch(model)
    assert all(len(v) == 1 for v in seen.values())
    same([v[0] for v in seen.values()], by_definition(name, one_batch))


@every
def test_grad_scaler(name):
    model = model_of(name).float()
    optimizer, scaler = torch.optim.SGD(trained(model), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model(batch(1).float()))).backward()
    scaler.unscale_(optimizer)
    for a, b in zip(grads(model), by_definition(name, one_batch), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
    before = [p.detach().clone() for p in trained(model)]
    scaler.step(optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


@every
def test_second_derivatives(name):
    def penalized(model: nn.Module) -> None:
        loss = loss_of(model(batch(1)))
        first = torch.autograd.grad(loss, trained(model), create_graph=True)
        (loss + sum(g.square().sum() for g in first)).backward()

    model = model_of(name)
    penalized(model)
    same(grads(model), by_definition(name, penalized))


def _worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name in CONFIGS:
        model = model_of(name)
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped(batch(rank + 1))).backward()
        torch.save(grads(model), f"{folder}/{name}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # torch can wait for ever in taking a gloo group down


@pytest.mark.filterwarnings("ignore")  # of the launcher
def test_two_processes(tmp_path):
    """DistributedDataParallel averages the gradients while backward runs: none may come after it."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)

    def both(model: nn.Module) -> None:
        ((loss_of(model(batch(1))) + loss_of(model(batch(2)))) / 2).backward()

    for name in CONFIGS:
        want = by_definition(name, both)
        for rank in range(2):
            same(torch.load(tmp_path / f"{name}-{rank}.pt"), want)


@every
def test_gradients_are_laid_out_like_their_parameters(name):
    """Else every one of them would be copied, one by one, when it arrives."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 24)), CONFIGS[name])
    model(torch.randn(5, 16)).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.is_contiguous() for g in grads)
    storages = [g.untyped_storage().data_ptr() for g in grads if g is not None]
    assert len(set(storages)) < len(storages)  # pieces of what was computed for several layers at once
