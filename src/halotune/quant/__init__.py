"""Quantized layers as bases: importing this registers them, and imports none of their packages."""

from ..core.base import register_base
from .bnb import Bnb4bit, Bnb8bit
from .hqq import Hqq
from .opaque import Opaque
from .torchao import TorchAO

for kind in (Opaque, Bnb4bit, Bnb8bit, TorchAO, Hqq):  # the last one is asked first
    register_base(kind)

__all__ = ["Bnb4bit", "Bnb8bit", "Hqq", "Opaque", "TorchAO"]
