"""Benchmarks: adapters of halotune, peft and lycoris-lora against each other and against the frozen model."""

from .benches import run_decode, run_layer, run_load, run_merge, run_scaling, run_step
from .config import BenchConfig, parse_contenders
from .contenders import Contender
from .race import Watch
from .rows import Ratio, Row

__all__ = [
    "BenchConfig",
    "Contender",
    "Ratio",
    "Row",
    "Watch",
    "parse_contenders",
    "run_decode",
    "run_layer",
    "run_load",
    "run_merge",
    "run_scaling",
    "run_step",
]
