"""halotune inside other libraries: one module for each."""
