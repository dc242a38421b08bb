"""Metrics of epochs and evaluations: the plain formulas, to the bit, whatever the batches."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax import metrics
from dapt_jax.training.epoch_metrics import EpochMetrics, validation_metrics
from tests import tiny

DATA = tiny.dataset()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.125, 4)), min_size=1, max_size=8))
def test_the_loss_of_an_epoch_is_the_sum_over_its_parts_by_their_weight(parts):
    parts = [(float(np.float32(loss)), float(np.float32(weight))) for loss, weight in parts]
    merged = EpochMetrics.empty()
    for loss, weight in parts:
        merged = merged.merge(EpochMetrics.single_from_model_output(loss_sum=loss, weight_sum=weight))
    expected = np.sum([loss for loss, _ in parts]) / np.sum([weight for _, weight in parts])
    assert float(merged.compute()["loss"]) == pytest.approx(expected, rel=1e-5)
    alone = EpochMetrics.single_from_model_output(loss_sum=parts[0][0], weight_sum=parts[0][1])
    assert alone.compute()["loss"] == parts[0][0] / parts[0][1]


@given(st.integers(1, 39), st.integers(0, 2**16))
@settings(deadline=None, max_examples=20)
def test_validation_metrics_do_not_depend_on_the_batches_that_rows_come_in(cut, seed):
    rng = np.random.default_rng(seed)
    outputs = {
        "loss": rng.gamma(1.0, 1.0, 40).astype(np.float32),
        "truth": DATA.truth,
        "predicted": rng.dirichlet(np.ones(3), 40).astype(np.float32),
    }
    collection = validation_metrics(DATA)
    parts = [
        {name: values[part] for name, values in outputs.items()} for part in (slice(cut), slice(cut, None))
    ]
    first, second = (collection.single_from_model_output(**part) for part in parts)
    found = first.merge(second).compute()
    assert found == collection.single_from_model_output(**outputs).compute()
    assert found["val_loss"] == float(outputs["loss"].mean(dtype=np.float64))
    expected = metrics.classification(DATA.truth, outputs["predicted"], DATA.classes)[0].value
    assert found["val_auc"] == expected


def test_validation_metrics_of_masks_are_loss_and_dice():
    rng = np.random.default_rng(0)
    masks, predicted = rng.integers(0, 2, (2, 40, 16, 16)).astype(np.uint8)
    data = dataclasses.replace(DATA, masks=masks).segmented(("background", "cell"))
    output = validation_metrics(data).single_from_model_output(
        loss=np.ones(40, np.float32), truth=masks, predicted=predicted
    )
    scored = metrics.Segmentation(data.segments, data.overlapping, surfaces=False)
    scored.add(masks, predicted)
    assert output.compute() == {"val_loss": 1.0, "val_dice": scored.scores()[0].value}
