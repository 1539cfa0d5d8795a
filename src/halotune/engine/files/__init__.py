"""Adapters as files: state dicts, folders, the hub."""
