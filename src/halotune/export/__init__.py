"""Adapters for programs that read LoRA alone: exact factors, what each target runtime takes, and the rules for its files."""

from .lora import ExportReport
from .rules import RULES, Problem, Rule, check
from .runtimes import RUNTIMES, Runtime

__all__ = ["RULES", "RUNTIMES", "ExportReport", "Problem", "Rule", "Runtime", "check"]
