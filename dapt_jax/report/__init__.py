"""From a study's records to a page: tables, figures and a paragraph in words. Needs no JAX."""

from dapt_jax.report.page import build

__all__ = ["build"]
