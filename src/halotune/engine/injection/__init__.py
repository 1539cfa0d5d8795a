"""Putting adapters into a model, activating them, and taking them out again."""
