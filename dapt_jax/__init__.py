"""Domain-adaptive pre-training of medical image encoders in JAX, at a fraction of the usual compute."""

__version__ = "0.1.0"
