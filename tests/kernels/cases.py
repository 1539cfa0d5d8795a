"""Every op that has a kernel, with arguments for it at odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halotune.methods.bone import ops as bone
from halotune.methods.hra import ops as hra
from halotune.methods.loha import ops as loha
from halotune.ops.build import build_low_rank
from halotune.ops.dispatch import Op
from halotune.ops.grouped_low_rank import add_grouped_low_rank, grouped_low_rank_linear, grouped_outer_pair
from halotune.ops.product import add_product, transposed_products

Make = Callable[..., Tensor]  # sizes -> random numbers
BLOCKS = 1, 3, 4, 5, 8, 12, 16, 24, 48  # sides of BAT's; of eleven in a row the small ones do not fill the last tile


@dataclass(frozen=True)
class Case:
    name: str
    op: Op
    arguments: Callable[[Make], tuple[Any, ...]]

    def __str__(self) -> str:
        return self.name


def sliced(make: Make, n: int, d: int) -> Tensor:
    """Rows that do not lie one after the other."""
    return make(n, d + 5)[:, 2 : d + 2]


def columns(make: Make, n: int, d: int) -> Tensor:
    """Columns contiguous, rows not."""
    return make(d, n).mT


def halves(make: Make, m: int, n: int, r: int) -> tuple[Tensor, ...]:
    return make(m, r), make(r, n), make(m, r), make(r, n)


def layered(make: Make, layers: int, m: int, n: int, r: int) -> tuple[Tensor, ...]:
    return make(layers, m, r), make(layers, r, n), make(layers, m, r), make(layers, r, n)


def ending(make: Make, *ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=make(1).device)


def grouped(
    make: Make, n: int, k: int, m: int, r: int, ends: tuple[int, ...], s: float = 1.0, inplace: bool = False
) -> tuple[Any, ...]:
    """With factors laid out as parameters are, in fp32."""
    A, B = make(len(ends), r, k).float(), make(len(ends), m, r).float()
    return make(n, k), A, B, make(n, m), ending(make, *ends), s, ends[-1] == n, inplace


def weighted(make: Make, n: int, k: int, m: int, r: int, ends: tuple[int, ...], s: float = 1.0) -> tuple[Any, ...]:
    """With a weight; factors are in fp32."""
    A, B = make(len(ends), r, k).float(), make(len(ends), m, r).float()
    return make(n, k), make(len(ends), m, k), A, B, ending(make, *ends), s, ends[-1] == n


def pulled(make: Make, n: int, k: int, m: int, r: int, ends: tuple[int, ...], s: float = 1.0) -> tuple[Any, ...]:
    """The same as in backward."""
    A, B = make(len(ends), r, k).float(), make(len(ends), m, r).float()
    return make(n, m), make(len(ends), m, k).mT, B.mT, A.mT, ending(make, *ends), s, ends[-1] == n


def pair(make: Make, n: int, m: int, k: int, r: int, ends: tuple[int, ...]) -> tuple[Any, ...]:
    return make(n, m), make(n, r), make(n, r), make(n, k), ending(make, *ends), torch.float32


def swapped(x: Tensor, A: Tensor, B: Tensor, b: Tensor, *others: Any) -> tuple[Any, ...]:
    """As in backward."""
    return b, B.mT, A.mT, x, *others


def reflections(make: Make, *shape: int) -> tuple[Tensor, ...]:
    """What HRA's backward gets: of vectors of which some are equal, and one is zero."""
    U = make(*shape)
    U[..., 1::3] = U[..., ::3][..., : U[..., 1::3].shape[-1]]
    U[..., 4:5] = 0
    Ût, N, G, scale = hra.factors.reference(U)
    return Ût.contiguous(), N, G, scale, make(*Ût.shape).float(), make(*N.shape).float()


CASES = [
    Case("grouped", add_grouped_low_rank, lambda t: grouped(t, 37, 50, 40, 5, (10, 10, 37))),
    Case("grouped-in-place", add_grouped_low_rank, lambda t: grouped(t, 200, 90, 133, 17, (0, 3, 70, 199), 0.3, True)),
    Case("grouped-backward", add_grouped_low_rank, lambda t: swapped(*grouped(t, 200, 90, 133, 16, (64, 65, 192, 192), 2.0))),
    Case("grouped-one-row", add_grouped_low_rank, lambda t: grouped(t, 1, 7, 9, 1, (0, 1))),
    Case("grouped-large-rank", add_grouped_low_rank, lambda t: grouped(t, 70, 70, 65, 64, (66, 70))),
    Case(
        "grouped-strided",
        add_grouped_low_rank,
        lambda t: (sliced(t, 99, 40), t(2, 3, 40), t(2, 30, 3), sliced(t, 99, 30), ending(t, 50, 90), 1.0, False, True),
    ),
    Case(
        "grouped-alone",
        add_grouped_low_rank,
        lambda t: (t(99, 40), t(2, 3, 40), t(2, 30, 3), None, ending(t, 50, 90), 0.5, False, False),
    ),
    Case(
        "grouped-shared",
        add_grouped_low_rank,
        lambda t: (t(99, 40), t(3, 40), t(2, 40, 3), t(99, 40), ending(t, 50, 90), 1.0, False, False),
    ),
    Case(
        "grouped-shared-backward",
        add_grouped_low_rank,
        lambda t: (t(99, 30), t(2, 40, 3).mT[..., :30], columns(t, 40, 3), t(99, 40), ending(t, 50, 99), 1.0, True, False),
    ),
    Case("grouped-linear", grouped_low_rank_linear, lambda t: weighted(t, 37, 50, 40, 5, (10, 10, 37))),
    Case("grouped-linear-open", grouped_low_rank_linear, lambda t: weighted(t, 300, 128, 300, 16, (0, 140, 141, 270), 0.5)),
    Case("grouped-linear-one-row", grouped_low_rank_linear, lambda t: weighted(t, 1, 7, 9, 1, (0, 1))),
    Case("grouped-linear-all-in-one", grouped_low_rank_linear, lambda t: weighted(t, 290, 64, 33, 33, (0, 290, 290))),
    Case("grouped-linear-backward", grouped_low_rank_linear, lambda t: pulled(t, 200, 90, 60, 16, (64, 65, 200), 2.0)),
    Case(
        "grouped-linear-strided",
        grouped_low_rank_linear,
        lambda t: (sliced(t, 99, 40), t(2, 30, 45)[..., 2:42], t(3, 40), t(2, 30, 3), ending(t, 50, 90), 1.0, False),
    ),
    Case("grouped-pair", grouped_outer_pair, lambda t: pair(t, 37, 50, 140, 5, (10, 10, 37))),
    Case("grouped-pair-open", grouped_outer_pair, lambda t: pair(t, 137, 50, 140, 33, (64, 130))),
    Case("grouped-pair-long", grouped_outer_pair, lambda t: pair(t, 5000, 3, 5, 2, (1280, 1290, 4900, 4900))),
    Case("grouped-pair-all-in-one", grouped_outer_pair, lambda t: pair(t, 5000, 3, 5, 1, (5000, 5000, 5000))),
    Case(
        "grouped-pair-strided",
        grouped_outer_pair,
        lambda t: (sliced(t, 99, 40), sliced(t, 99, 3), sliced(t, 99, 3), sliced(t, 99, 30), ending(t, 50, 90), torch.float32),
    ),
    Case("add-product", add_product, lambda t: (t(37, 50), t(37, 40), t(5, 40), t(5, 50), False)),
    Case("add-product-in-place", add_product, lambda t: (t(70, 133), t(70, 300), t(17, 300), t(17, 133), True)),
    Case(
        "add-product-strided",
        add_product,
        lambda t: (sliced(t, 66, 40), sliced(t, 66, 30), sliced(t, 3, 30), sliced(t, 3, 40), True),
    ),
    Case("add-product-one-row", add_product, lambda t: (t(1, 7), t(1, 9), t(1, 9), t(1, 7), False)),
    Case("add-product-large-rank", add_product, lambda t: (t(9, 20), t(9, 30), t(64, 30), t(64, 20), False)),
    Case("add-product-many-rows", add_product, lambda t: (t(2100, 20), t(2100, 30), t(3, 30), t(3, 20), True)),
    Case("folded", add_product, lambda t: (t(5, 26), t(5, 24), None, t(8, 26), False)),
    Case("folded-remainder", add_product, lambda t: (t(70, 23), t(70, 38), None, t(7, 23), True)),
    Case("folded-wider-than-x", add_product, lambda t: (t(3, 5), t(3, 6), None, t(7, 5), False)),
    Case("unfolded", add_product, lambda t: (t(5, 24), t(5, 26), t(8, 26), None, True)),
    Case("unfolded-remainder", add_product, lambda t: (t(80, 23), t(80, 12), t(7, 12), None, False)),
    Case("unfolded-many-rows", add_product, lambda t: (t(2050, 24), t(2050, 12), t(7, 12), None, False)),
    Case("transposed", transposed_products, lambda t: (t(37, 5), t(37, 50), t(37, 5), t(37, 70))),
    Case(
        "transposed-strided",
        transposed_products,
        lambda t: (sliced(t, 300, 33), sliced(t, 300, 20), sliced(t, 300, 33), sliced(t, 300, 90)),
    ),
    Case("low-rank", build_low_rank, lambda t: (t(37, 50), t(37, 5), t(5, 50), None)),
    Case("low-rank-layers", build_low_rank, lambda t: (t(3, 70, 133), t(3, 70, 17), t(3, 17, 133), None)),
    Case("low-rank-shared", build_low_rank, lambda t: (t(2, 9, 300), columns(t, 18, 3).reshape(2, 9, 3), t(3, 300), None)),
    Case("reflections", hra.factors, lambda t: (t(37, 5),)),
    Case("reflections-layers", hra.factors, lambda t: (t(3, 700, 8),)),
    Case("reflections-large-rank", hra.factors, lambda t: (t(2, 200, 50),)),
    Case("reflections-one", hra.factors, lambda t: (t(2, 2100, 1),)),
    Case("reflections-pull", hra.pull_factors, lambda t: reflections(t, 37, 5)),
    Case("reflections-pull-layers", hra.pull_factors, lambda t: reflections(t, 3, 700, 8)),
    Case("reflections-pull-large-rank", hra.pull_factors, lambda t: reflections(t, 2, 200, 50)),
    Case("reflections-pull-one", hra.pull_factors, lambda t: reflections(t, 2, 2100, 1)),
    Case("bat", bone.build_bat, lambda t: (t(24, 40), t(3, 8, 8), None)),
    Case("bat-layers", bone.build_bat, lambda t: (t(2, 24, 40), t(2, 3, 8, 8), None)),
    Case("bat-odd", bone.build_bat, lambda t: (t(21, 35), t(3, 7, 7), None)),
    Case("bat-one-block", bone.build_bat, lambda t: (t(33, 33), t(1, 33, 33), None)),
    Case("bat-long-rows", bone.build_bat, lambda t: (t(4, 260), t(2, 2, 2), None)),
    *[Case(f"bat-r{r}", bone.build_bat, lambda t, r=r: (t(2 * r, 11 * r), t(2, r, r), None)) for r in BLOCKS],
    Case("bat-less-than-a-tile", bone.build_bat, lambda t: (t(8, 4), t(2, 4, 4), None)),
    Case("bat-transposed", bone.build_bat, lambda t: (columns(t, 24, 36), columns(t, 2 * 12, 12).view(2, 12, 12), None)),
    Case("bat-pull", bone.pull_bat, lambda t: (t(24, 40), t(24, 40), t(3, 8, 8))),
    Case("bat-pull-layers", bone.pull_bat, lambda t: (t(2, 24, 40), t(2, 24, 40), t(2, 3, 8, 8))),
    Case("bat-pull-odd", bone.pull_bat, lambda t: (t(21, 35), t(21, 35), t(3, 7, 7))),
    Case("bat-pull-one-block", bone.pull_bat, lambda t: (t(33, 33), t(33, 33), t(1, 33, 33))),
    Case("bat-pull-parts", bone.pull_bat, lambda t: (t(6, 9000), t(6, 9000), t(3, 2, 2))),
    *[Case(f"bat-pull-r{r}", bone.pull_bat, lambda t, r=r: (t(2 * r, 11 * r), t(2 * r, 11 * r), t(2, r, r))) for r in BLOCKS],
    Case("bat-pull-less-than-a-tile", bone.pull_bat, lambda t: (t(8, 4), t(8, 4), t(2, 4, 4))),
    Case("bat-pull-transposed", bone.pull_bat, lambda t: (columns(t, 24, 36), columns(t, 24, 36), t(2, 12, 12))),
    Case("loha", loha.build, lambda t: (t(37, 50), *halves(t, 37, 50, 5), 0.7, None)),
    Case("loha-layers", loha.build, lambda t: (t(3, 37, 50), *layered(t, 3, 37, 50, 5), 0.7, None)),
    Case("loha-wide", loha.build, lambda t: (t(3, 140), *halves(t, 3, 140, 17), 2.0, None)),
    Case(
        "loha-strided",
        loha.build,
        lambda t: (t(37, 50), columns(t, 37, 5), columns(t, 5, 50), columns(t, 37, 5), columns(t, 5, 50), 1.0, None),
    ),
    Case("loha-pull", loha.pull, lambda t: (t(37, 50), *halves(t, 37, 50, 5), 0.7)),
    Case("loha-pull-layers", loha.pull, lambda t: (t(3, 37, 50), *layered(t, 3, 37, 50, 5), 0.7)),
    Case("loha-pull-parts", loha.pull, lambda t: (t(70, 1100), *halves(t, 70, 1100, 3), 0.5)),
    Case("loha-pull-transposed", loha.pull, lambda t: (columns(t, 33, 65), *halves(t, 33, 65, 16), 1.5)),
]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def error(result: Any, exact: Any) -> float:
    """The relative error of the worst of the results."""
    pairs = zip(tensors(result), tensors(exact), strict=True)
    return max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


def copied(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """For an op that may overwrite them, in another dtype if that is given; strides are kept."""

    def one(a: Any) -> Any:
        if isinstance(a, torch.dtype):
            return dtype or a
        if not isinstance(a, Tensor):
            return a
        if not a.is_floating_point():
            return a.clone()
        storage = torch.empty(a.untyped_storage().nbytes() // a.itemsize, dtype=dtype or a.dtype, device=a.device)
        return storage.as_strided(a.shape, a.stride(), a.storage_offset()).copy_(a)

    return tuple(one(a) for a in arguments)
