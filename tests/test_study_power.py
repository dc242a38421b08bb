"""`mode=plan` says how many seeds the margin needs, from the scatter of an earlier study."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.records.study_records import Records
from dapt_jax.statistics import margin_for_seeds, seeds_for_margin
from dapt_jax.study import power

DOCS = Path(__file__).resolve().parents[1] / "docs"


def study(**by_strategy):
    key = {"task": "t", "split": "external", "protocol": "linear", "metric": "auc"}
    rows = [
        {**key, "strategy": name, "seed": seed, "value": value}
        for name, values in by_strategy.items()
        for seed, value in enumerate(values)
    ]
    seeds = list(range(max(map(len, by_strategy.values()))))
    return Records({"strategies": list(by_strategy), "seeds": seeds, "report": {}}, rows, [])


def test_the_spread_is_that_of_paired_differences_pooled_over_strategies():
    full, none, partial = [0.8, 0.82, 0.81, 0.84], [0.7, 0.75, 0.71, 0.72], [0.79, 0.8, 0.82, 0.85]
    found = power.spread(study(full=full, none=none, partial=partial), "t", "auc")
    variances = [
        statistics.variance([a - b for a, b in zip(own, full, strict=True)]) for own in (none, partial)
    ]
    assert found.sd == pytest.approx(np.sqrt(np.mean(variances)))
    assert (found.seeds, found.reference, found.strategies) == (4, "full", ("none", "partial"))


def test_one_seed_or_one_strategy_has_no_spread():
    assert power.spread(study(full=[0.8], none=[0.7]), "t", "auc") is None
    assert power.spread(study(full=[0.8, 0.9]), "t", "auc") is None


def test_the_line_has_the_seeds_of_the_margin_and_the_margin_of_the_seeds():
    found = power.Spread(0.01, 5, ("none",), "full", "external AUC")
    line = power.line(found, "t", 0.01, 5, "runs/pilot")
    assert f"power, t: {seeds_for_margin(0.01, 0.01)} seeds to show 0.01 (" in line
    assert f"the planned 5 seeds can show {margin_for_seeds(0.01, 5):.3g} (" in line
    assert "the planned 1 seed can show no margin" in power.line(found, "t", 0.01, 1, "runs/pilot")
    assert "to show" not in power.line(found, "t", 0.0, 5, "runs/pilot")


def test_committed_records_give_a_line_for_their_task_and_kind_alone():
    found = power.lines(str(DOCS / "brain_mri"), None, [("tumour", False)], 0.01, "auc", 5)
    assert len(found) == 1
    assert "external AUC" in found[0]
    assert "3 seeds of" in found[0]
    assert power.lines("", None, [("tumour", False)], 0.01, "auc", 5) == []
    for tasks in ([("tumour", True)], [("other", False)]):
        (line,) = power.lines(str(DOCS / "brain_mri"), None, tasks, 0.01, "auc", 5)
        assert "brain_mri has tumour, and no results of" in line
    with pytest.raises(UserError, match="no such file"):
        power.lines("/nowhere", None, [("t", False)], 0.01, "auc", 5)
