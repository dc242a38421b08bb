"""Tasks of thousands of classes: the report shows the weakest ones, says what it leaves out, and is quick."""

import time

import numpy as np
import pytest

from dapt_jax.records import Records, predictions
from dapt_jax.report import page, tables
from dapt_jax.report import predictions as report_predictions
from tests import test_report_example as example

TASK = "tumour type"


def row(metric, value, classes, n=2000, strategy="full", split="development"):
    return {
        "strategy": strategy, "seed": 0, "task": TASK, "split": split, "protocol": "linear",
        "metric": metric, "value": value, "n": n, "classes": classes,
    }  # fmt: skip


def records_of(count, n=2000):
    names = [f"class{number}" for number in range(count)]
    values = np.random.default_rng(0).permutation(count) / count
    rows = [
        row(metric, value, classes, n, strategy, split)
        for strategy in ("none", "full")
        for split in ("development", "external")
        for metric, value, classes in [
            ("auc", 0.8, names),
            *((f"auc/{name}", value, [name]) for name, value in zip(names, values, strict=True)),
        ]
    ]
    return Records({"strategies": ["none", "full"], "seeds": [0]}, rows, []), values


def test_the_weakest_of_ten_thousand_classes_are_shown_within_seconds():
    records, values = records_of(10_000)
    began = time.process_time()
    table = tables.per_class(records, TASK)
    sizes = page._sizes(records, TASK)
    assert time.process_time() - began < 20
    shown = [heading for heading, _ in table.groups if heading]
    weakest = np.sort(np.argsort(values)[: tables.MOST_CLASSES])
    assert shown == [f"class{number}" for number in weakest]
    assert "The 50 of 10,000 classes with the weakest means" in table.note
    assert sizes.endswith("classes: 10,000")


@pytest.mark.parametrize(("classes", "n", "expected"), [(3, 612, 1000), (1000, 2000, 0), (200, 1000, None)])
def test_draws_of_patients_are_as_many_as_there_is_time_for(classes, n, expected):
    found = report_predictions.resamples_of(records_of(classes, n)[0], TASK)
    assert found == expected if expected is not None else 200 <= found < 1000


def test_a_report_without_intervals_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report_predictions, "_SECONDS", 0.01)
    workdir = example.write(tmp_path, seeds=(0,), strategies=("none", "full"))
    path = predictions.path_of(workdir, "full", 0, TASK, "external")
    some = {"linear": np.full((6, 3), 1 / 3)}
    predictions.write(path, np.arange(6) % 3, np.arange(6), np.arange(6).astype(str), some)
    records = Records.read(workdir)
    assert report_predictions.table(workdir, records, TASK) is None
    assert any("No patient-level intervals of tumour type" in line for line in page._warnings(records))
