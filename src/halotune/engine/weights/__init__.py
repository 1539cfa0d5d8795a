"""Adapters merged into weights, and combined into new ones."""
