"""Forward passes: what is prepared for all layers together, and for how long (README.md)."""
