"""Encoders as ordered groups of pure functions; the only package that imports flax.nnx."""
