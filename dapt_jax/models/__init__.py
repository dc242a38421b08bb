"""Encoders as ordered groups of pure functions; the only place where flax.nnx is imported."""
