"""What rests on few patients is said in one line, with the number that would do."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dapt_jax.data.splits import grouped_folds
from dapt_jax.statistics import auc_half_width, too_few_seeds
from dapt_jax.study import few_samples
from tests import tiny


def dataset(*counts, groups=None):
    made = tiny.dataset(sum(counts), classes=len(counts))
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    return dataclasses.replace(
        made, labels=labels, groups=np.arange(len(labels)).astype(str) if groups is None else groups
    )


def test_the_half_width_covers_the_auc_of_that_many_patients():
    rng = np.random.default_rng(0)
    apart = np.sqrt(2) * stats.norm.ppf(0.8)
    areas = [np.mean(rng.normal(apart, 1, 12)[:, None] > rng.normal(0, 1, 30)) for _ in range(2000)]
    assert auc_half_width(0.8, 12, 30) == pytest.approx(1.96 * np.std(areas), rel=0.15)


@pytest.mark.parametrize(("seeds", "said"), [(1, "One seed"), (2, "±9.0"), (3, ""), (10, "")])
def test_one_seed_and_two_are_said_to_be_few(seeds, said):
    line = too_few_seeds(seeds)
    assert line.startswith(said) or said in line
    assert bool(line) == (seeds < 3)
    assert not line or "5 seeds would give ±1.2" in line


def test_a_class_of_few_patients_and_a_fold_that_holds_out_few_are_said_to_be():
    small, large = dataset(3, 60), dataset(50, 60)
    assert few_samples.of_classes(large) == ""
    line = few_samples.of_classes(small)
    assert "'" + small.classes[0] + "' 3" in line
    assert "39 patients of a class would give ±0.10" in line
    (said,) = few_samples.of_folds(small, [grouped_folds(small.labels, small.groups, 20, 0)])
    assert "transfer.folds=6 or 200 patients in all" in said
    assert few_samples.of_folds(large, [grouped_folds(large.labels, large.groups, 5, 0)]) == []


def test_a_class_that_some_folds_do_not_hold_out_is_said_to_be_left_out_of_their_means():
    few, enough = dataset(3, 60), dataset(5, 60)
    (line,) = few_samples.of_classes_by_fold(
        few, [grouped_folds(few.labels, few.groups, 5, s) for s in (0, 1)]
    )
    assert f"({few.classes[0]!r} in 2 of 5)" in line
    folds = [grouped_folds(enough.labels, enough.groups, 5, 0)]
    assert few_samples.of_classes_by_fold(enough, folds) == []


def test_images_of_one_patient_count_once():
    many = dataset(60, 60, groups=np.repeat(np.arange(12), 10).astype(str))
    assert "6" in few_samples.of_classes(many)


def test_a_patient_with_images_of_two_classes_counts_for_both():
    smears = np.tile(np.arange(50), 2).astype(str)
    assert few_samples.of_classes(dataset(50, 50, groups=smears)) == ""
