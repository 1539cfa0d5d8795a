"""Saved adapters on their base models, from the command line: merge, generate, chat."""
