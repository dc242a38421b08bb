"""Cost of a function: FLOPs, seconds, bytes and watt-hours.

This package knows functions, not studies. `ledger`, `clock` and `energy` import no JAX, so that a report can
be built on a machine that has none.
"""
