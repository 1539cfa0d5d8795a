"""Putting adapters into a model and handling them there. It knows no method by name."""
