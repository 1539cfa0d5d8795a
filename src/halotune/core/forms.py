"""Activations or weights: in which form a trained adapter is applied to a frozen matrix.

As activations an adapter costs a few passes over x and a few launches for each layer; as a weight one more product in backward,
`dyᵀ x`, and its share in building W' of all layers together and in pulling the gradients back. The choice depends on sizes
alone, so that a checkpoint makes the same one when it runs a layer again.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Form = Literal["auto", "activations", "weights"]

# Of an H100, bf16, in seconds: an operation of a large product, a byte of its memory, a launch from Python.
OPERATION, BYTE, LAUNCH = 1 / 500e12, 1 / 3e12, 6e-6
PASSES_OVER_X = 8  # read, written rotated; in backward d and x read, dx written …
PASSES_OVER_W = 12  # W stacked, W' written, its gradients stacked, W and they read twice each
LAUNCHES = 4  # of an adapter as activations, over one as a weight


def is_weight(form: Form, makes_weight: bool, x: Tensor, W: Tensor | None) -> bool:
    """Whether W' is prepared together with those of other layers.

    Args:
        form: what the user asks for; "activations" where there is no room for W' either.
        makes_weight: the adapter has no other form than W', made layer by layer where it is not prepared.
    """
    if W is None or form == "activations" or not torch.is_grad_enabled():
        return False
    if form == "weights":
        return True
    if not x.is_cuda:
        return False
    return makes_weight or weights_are_cheaper(x.numel() // max(1, x.shape[-1]), W.shape[0], W.shape[1], x.itemsize)


def weights_are_cheaper(tokens: int, n_out: int, n_in: int, itemsize: int) -> bool:
    activations = PASSES_OVER_X * tokens * n_in * itemsize * BYTE + LAUNCHES * LAUNCH
    weights = 2 * tokens * n_out * n_in * OPERATION + PASSES_OVER_W * n_out * n_in * itemsize * BYTE
    return weights < activations
