"""Live models of peft's, run by our layers: `speed_up` and back, `slow_down`."""

from .model import slow_down, speed_up

__all__ = ["slow_down", "speed_up"]
