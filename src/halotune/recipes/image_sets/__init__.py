"""Data sets of pictures with hints, as `halotune data` lays them out."""
