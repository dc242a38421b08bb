"""Adapted encoders for other programs, their model cards, and the catalogue of models."""
