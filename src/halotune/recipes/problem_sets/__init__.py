"""Problems of mathematics for `halotune data`: where they are, how they are checked, and how they are laid out."""
