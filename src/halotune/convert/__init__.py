"""Adapters in and out of other programs' files."""

from .files import Conversion, convert_adapter
from .loading import load_lycoris, save_lycoris

__all__ = ["Conversion", "convert_adapter", "load_lycoris", "save_lycoris"]
