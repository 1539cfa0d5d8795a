"""Benchmarks: adapters of halotune, peft and lycoris-lora against each other and against the frozen model."""
