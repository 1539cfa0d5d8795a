"""Passes that overlap in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import adapted, adapter_parameters, assert_same, every_method, every_method_and_sped_up, inner, sample, trained
from .programs.checking import eager_switching

WAIT = 5.0  # seconds until a thread that should have moved is given up; a lock may keep one out for good


def train(run, parameters, x: Tensor) -> list[Tensor]:
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]


def evaluate(run, parameters, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [run(x)]


def infer(run, parameters, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [run(x).clone()]


class Thread(threading.Thread):
    """Stops before block `at` until it may `go` on; `at=None`: runs through."""

    def __init__(self, work: Callable[[], Any], at: int | None) -> None:
        super().__init__(daemon=True)
        self.work, self.at = work, at
        self.there, self.go = threading.Event(), threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as e:
            self.error = e
        self.there.set()

    def finish(self) -> Any:
        self.go.set()
        self.join(WAIT)
        if self.error is not None:
            raise self.error
        return self.result


@contextmanager
def stops(model) -> Iterator[None]:
    """Blocks stop the threads that wait for them."""

    def hook(at: int) -> Callable[..., None]:
        def stop(*args: Any) -> None:
            thread = threading.current_thread()
            if isinstance(thread, Thread) and thread.at == at and not thread.there.is_set():
                thread.there.set()
                thread.go.wait(WAIT)

        return stop

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(inner(model).blocks)]
    yield
    for handle in handles:
        handle.remove()


def overlapping(model, first: Callable[[], Any], second: Callable[[], Any], at: tuple[int, int | None]) -> tuple[Any, Any]:
    """`first` stops before a block, `second` starts and stops before one (or runs through); both go on, one by one."""
    a, b = Thread(first, at[0]), Thread(second, at[1])
    with stops(model):
        a.start()
        a.there.wait(WAIT)
        b.start()
        b.there.wait(0.5)
        return a.finish(), b.finish()


PLACES = [(1, None), (1, 0), (1, 1), (0, 1)]
PAIRS = [(train, evaluate), (evaluate, train), (train, train), (infer, infer), (train, infer)]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(f.__name__ for f in pair))
@every_method_and_sped_up
def test_two_passes_overlap(method, pair):
    model, reference = adapted(method)
    parameters, x, z = trained(model), sample(5, 12, requires_grad=False), sample(7, 12, seed=3, requires_grad=False)
    first, second = pair
    want = first(reference, parameters, x), second(reference, parameters, z)
    trains = train(reference, parameters, x)
    for at in PLACES:
        got = overlapping(model, lambda: first(model, parameters, x), lambda: second(model, parameters, z), at)
        assert_same(got[0], want[0])
        assert_same(got[1], want[1])
        assert_same(train(model, parameters, x), trains)


@every_method
def test_many_threads_serve_while_one_trains(method):
    """The one that trains steps, too: what the others see is the parameters before or after."""
    model, reference = adapted(method)
    parameters, x = trained(model), sample(requires_grad=False)
    want, ended, wrong = train(reference, parameters, x), threading.Event(), []

    def serve() -> None:
        while not ended.is_set():
            try:
                assert_same(evaluate(model, parameters, x), want[:1])
            except BaseException as e:
                wrong.append(e)
                return

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(3)]
    with eager_switching():
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert_same(train(model, parameters, x), want)
        finally:
            ended.set()
            for thread in threads:
                thread.join(WAIT)
    if wrong:
        raise wrong[0]
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.mul_(0.5)
    assert_same(evaluate(model, parameters, x), evaluate(reference, parameters, x))
