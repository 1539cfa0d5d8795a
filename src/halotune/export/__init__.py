"""Adapters for programs that read LoRA alone: exact factors, who reads what, and the rules that files must keep."""

from .consumers import CONSUMERS, Consumer
from .lora import ExportReport
from .rules import RULES, Problem, Rule, check

__all__ = ["CONSUMERS", "RULES", "Consumer", "ExportReport", "Problem", "Rule", "check"]
