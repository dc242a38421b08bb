"""Measurements, each `python -m benchmarks.NAME --json out.json`; ratios are of runs side by side on one machine."""
