"""`halotune inspect`: what a saved adapter does, layer by layer. It knows no method: each says itself what to measure."""
