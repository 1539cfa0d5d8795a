"""What only a GPU shows: backward in a thread of its own, captured steps, streams."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .cases import (
    adapted,
    adapter_parameters,
    assert_same,
    change,
    directly,
    every_method,
    every_method_and_sped_up,
    inner,
    sample,
    square_sum,
    step,
    trained,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]

aten = torch.ops.aten
keep_products = partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.addmm.default, aten.tanh.default])
RUNS = {
    "directly": directly,
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=keep_products),
}


def on_gpu(method: str, run: str = "directly", dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    model, reference = adapted(method, dtype=dtype)
    model.cuda()
    reference.plain.cuda()
    inner(model).run = RUNS[run]
    return model, reference


def sample_on_gpu(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensor:
    return sample(*size, seed=seed, dtype=dtype, requires_grad=False).cuda().requires_grad_(requires_grad)


@pytest.mark.parametrize("run", RUNS)
@every_method_and_sped_up
def test_recomputed_in_autograds_thread(method, run):
    """The whole, parts of it, and passes between forward and backward, while parameters change from step to step."""
    model, reference = on_gpu(method, run)
    x, z = sample_on_gpu(), sample_on_gpu(3, 12, seed=2, requires_grad=False)
    leaves = [*trained(model), x]

    def with_a_pass_between() -> Tensor:
        y = model(x)
        with torch.no_grad():
            model(z)
        return y

    def part() -> Tensor:
        return RUNS[run](inner(model).blocks[1], x)

    for _ in range(2):
        want = step(lambda: reference(x), leaves)
        for _ in range(2):
            assert_same(step(lambda: model(x), leaves), want)
        assert_same(step(with_a_pass_between, leaves), want)
        change(model)
        assert_same(step(part, leaves), step(lambda: reference.part("blocks.1")(x), leaves))
        change(model)


@pytest.mark.parametrize("run", ["directly", "checkpoint"])
@every_method
def test_a_captured_step(method, run):
    """Forward, backward and the optimizer in one CUDA graph: replayed, each step reads the parameters of the last one."""
    if method in ("hra-gs", "oft"):
        pytest.skip("torch.linalg.eigh and solve synchronize, which a capture forbids")
    model, reference = on_gpu(method, run, torch.float32)
    parameters, x = trained(model), sample_on_gpu(dtype=torch.float32, requires_grad=False)
    x.requires_grad_(run != "directly")
    optimizer = torch.optim.SGD(parameters, lr=1e-2)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(sample_on_gpu(seed=seed, dtype=torch.float32, requires_grad=False))
        before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
        values = {name: p.clone().requires_grad_() for name, p in before.items()}
        want = reference(x, values=values).square().mean()
        gradients = torch.autograd.grad(want, list(values.values()))
        graph.replay()
        torch.cuda.synchronize()
        assert_same([loss], [want], tolerance=1e-4)
        moved = [(b - p) / 1e-2 for b, p in zip(before.values(), adapter_parameters(model).values(), strict=True)]
        assert_same(moved, gradients, tolerance=2e-2)  # a difference of float32 numbers
    with torch.no_grad():
        assert_same([model(x)], [reference(x)], tolerance=1e-4)


@every_method
def test_passes_by_turns_on_two_streams(method):
    """What one stream prepared, another waits for."""
    model, reference = on_gpu(method)
    x = sample_on_gpu(64, 12)
    leaves = [*trained(model), x]
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    for i in range(9):
        want = step(lambda: reference(x), leaves)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(2_000_000)  # the stream is behind its host
            got = step(lambda: model(x), leaves)
        torch.cuda.synchronize()
        assert_same(got, want)
        with torch.no_grad(), torch.cuda.stream(streams[(i + 1) % 3]):
            y = model(x)
        torch.cuda.synchronize()
        assert_same([y], want[:1])
        if i % 3 == 2:
            change(model)


@every_method
def test_without_gradients_on_streams_that_do_not_wait(method):
    """Whoever serves on several streams synchronizes inputs, not what a model keeps for itself."""
    model, reference = on_gpu(method)
    model.eval()
    x = sample_on_gpu(64, 12, requires_grad=False)
    for gib in (0, 1):
        model.cache_weights(gib=gib)
        for _ in range(3):
            change(model)
            with torch.no_grad():
                want = reference(x)
                torch.cuda.synchronize()
                streams, outputs = [torch.cuda.Stream() for _ in range(3)], []
                for stream in streams:
                    with torch.cuda.stream(stream):
                        torch.cuda._sleep(2_000_000)
                        outputs.append(model(x))
            torch.cuda.synchronize()
            for y in outputs:
                assert_same([y], [want])


@every_method
def test_two_threads_on_two_streams(method):
    """One trains, one evaluates."""
    model, reference = on_gpu(method)
    parameters, x = trained(model), sample_on_gpu(64, 12, requires_grad=False)

    def train(run: Any) -> list[Tensor]:
        y = run(x)
        return [y.detach(), *torch.autograd.grad(square_sum(y), parameters)]

    want, wrong = train(reference), []
    torch.cuda.synchronize()

    def work(training: bool) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.set_grad_enabled(training):
                for _ in range(20):
                    got = train(model) if training else [model(x)]
                    torch.cuda.current_stream().synchronize()
                    assert_same(got, want[: len(got)])
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(training,), daemon=True) for training in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
