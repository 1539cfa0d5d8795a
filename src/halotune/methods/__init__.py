"""The only list of methods: importing this package fills the registry."""

from . import bone, hra, loha, lora, oft

__all__ = ["bone", "hra", "loha", "lora", "oft"]
