"""The files of a workdir: ledger, results, predictions, overlays; read and written without JAX."""

from dapt_jax.records.ledger import Ledger, Row
from dapt_jax.records.overlays import SegmentationSamples
from dapt_jax.records.predictions import Predictions
from dapt_jax.records.study_records import Cost, Records

__all__ = ["Cost", "Ledger", "Predictions", "Records", "Row", "SegmentationSamples"]
