"""Metrics of an epoch and of an evaluation, as collections of `clu.metrics`.

Their inputs are already reduced over all devices: the sums of an epoch inside the jitted step, whose batch is
that of all devices, and the logits of the validation rows by `ShardedForward`.
"""

import math
from typing import Any

import flax.struct
import jax
import numpy as np
from clu import metrics as clu_metrics

from dapt_jax import metrics
from dapt_jax.data.dataset import Dataset


@flax.struct.dataclass
class WeightedAverage(clu_metrics.Average):
    """A weighted mean, from a sum of weighted values (`total`) and the sum of their weights (`count`)."""

    @classmethod
    def from_model_output(
        cls,
        loss_sum: jax.Array | np.floating | float,
        weight_sum: jax.Array | np.floating | float,
        **_: Any,
    ) -> "WeightedAverage":
        """Return the weighted mean of the sums."""
        return cls(total=np.float64(loss_sum), count=np.float64(weight_sum))

    def compute(self) -> float:
        """Return the mean."""
        return float(self.total) / float(self.count)


@flax.struct.dataclass
class EpochMetrics(clu_metrics.Collection):
    """Metrics of the training rows over an epoch so far.

    >>> EpochMetrics.single_from_model_output(loss_sum=3.0, weight_sum=4.0).compute()
    {'loss': 0.75}
    """

    loss: WeightedAverage


@flax.struct.dataclass
class MeanLoss(clu_metrics.CollectingMetric.from_outputs(("loss",))):  # type: ignore[misc]
    """Mean loss over all examples, independent of the division into batches."""

    def compute(self) -> float:
        """Return the mean."""
        return float(np.mean(super().compute()["loss"], dtype=np.float64))


def validation_metrics(dataset: Dataset) -> type[clu_metrics.Collection]:
    """Return the collection of metrics of a data set's validation rows.

    Args:
        dataset: Data set; its labels and classes determine how predictions are scored.

    Returns:
        `val_loss`, from an output `loss` [b], and `val_auc` or of masks `val_dice`, from outputs `truth`
        (class numbers [b], 0/1/NaN [b, classes] or masks [b, h, w]) and `predicted` (probabilities [b,
        classes] or masks [b, h, w]). `val_auc` is NaN where a probability is not finite.
    """

    @flax.struct.dataclass
    class Agreement(clu_metrics.CollectingMetric.from_outputs(("truth", "predicted"))):  # type: ignore[misc]
        def compute(self) -> float:
            truth, predicted = (super(Agreement, self).compute()[name] for name in ("truth", "predicted"))
            if dataset.segments:
                scored = metrics.Segmentation(dataset.segments, dataset.overlapping, surfaces=False)
                scored.add(truth, predicted)
                return scored.scores()[0].value
            if not np.isfinite(predicted).all():  # the next step finds that the run has diverged
                return math.nan
            return metrics.classification(truth, predicted, dataset.classes)[0].value

    name = "val_dice" if dataset.segments else "val_auc"
    return clu_metrics.Collection.create(**{"val_loss": MeanLoss, name: Agreement})
