from __future__ import annotations

import pytest
import torch

from halotune.demo.train import ranks, sign_accuracy, spearman


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert ranks(torch.tensor([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]


def test_spearman_of_a_textbook_example() -> None:
    iq = torch.tensor([106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = torch.tensor([7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(iq, hours) == pytest.approx(-29 / 165)


def test_spearman_sees_order_alone() -> None:
    x = torch.randn(50)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)


def test_a_constant_orders_nothing() -> None:
    assert spearman(torch.ones(5), torch.arange(5.0)) == 0.0


@pytest.mark.parametrize("values", [3, 10, 10_000], ids=lambda n: f"{n}-values")
def test_spearman_agrees_with_scipy(values: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(values, (2, 400)).float()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_sign_accuracy() -> None:
    assert sign_accuracy(torch.tensor([0.1, -2.0, 3.0, -0.1]), torch.tensor([4.0, -1.0, -1.0, 1.0])) == 0.5
