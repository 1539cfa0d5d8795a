"""`halotune convert`, `load_lycoris`, `save_lycoris`: adapters in and out of other programs' files."""
