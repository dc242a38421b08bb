"""The report of a study: tables, figures and text, from its records; without JAX."""

from dapt_jax.report.page import build

__all__ = ["build"]
