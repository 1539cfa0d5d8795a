"""Random numbers that leave the sequence of all others as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def forked_generators(device: torch.device | str) -> AbstractContextManager[None]:
    """Inside, the generators of the CPU and of this device may be seeded and drawn from; afterwards they are as before.

    `fork_rng()` without devices would initialize every GPU that there is, and warn of it.
    """
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
