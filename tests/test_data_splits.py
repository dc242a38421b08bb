import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.data.splits import check_disjoint, grouped_folds, grouped_holdout
from dapt_jax.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def grouped_labels(draw):
    """Labels of a few classes in groups of uneven size; sometimes several labels per image."""
    n = draw(st.integers(8, 120))
    rng = np.random.default_rng(draw(SEEDS))
    groups = rng.permutation(np.arange(n) % draw(st.integers(5, n)))
    if draw(st.booleans()):
        labels = (rng.random((n, 3)) < [0.5, 0.2, 0.05]).astype(np.float32)
        labels[rng.random((n, 3)) < 0.1] = np.nan
        return labels, groups
    return rng.choice(4, n, p=[0.6, 0.25, 0.1, 0.05]), groups


@settings(max_examples=60, deadline=None)
@given(grouped_labels(), st.floats(0.05, 0.95), SEEDS)
def test_a_holdout_uses_every_image_once_and_divides_no_patient(data, fraction, seed):
    labels, groups = data
    train, held = grouped_holdout(labels, groups, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert len(train)
    assert len(held)
    assert not set(groups[train]) & set(groups[held])
    again = grouped_holdout(labels, groups, fraction, seed)
    np.testing.assert_array_equal(held, again[1])


@settings(max_examples=60, deadline=None)
@given(grouped_labels(), st.integers(2, 5), SEEDS)
def test_folds_hold_out_every_image_once_and_divide_no_patient(data, folds, seed):
    labels, groups = data
    splits = grouped_folds(labels, groups, folds, seed)
    assert sorted(np.concatenate([held for _, held in splits])) == list(range(len(labels)))
    for train, held in splits:
        assert len(held)
        assert len(train) + len(held) == len(labels)
        assert not set(groups[train]) & set(groups[held])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=200), st.sampled_from([0.1, 0.2, 0.25, 0.5]), SEEDS)
def test_with_one_image_per_patient_every_class_gets_its_share_and_is_on_both_sides(labels, fraction, seed):
    labels = np.array(labels)
    train, held = grouped_holdout(labels, np.arange(len(labels)), fraction, seed)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        got = (labels[held] == label).sum()
        if count == 1:
            assert (labels[train] == label).sum() == 1
            continue
        assert 1 <= got <= count - 1
        assert abs(got - fraction * count) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=200), st.integers(2, 8), SEEDS)
def test_with_one_image_per_patient_folds_share_every_class_evenly(labels, folds, seed):
    labels = np.array(labels)
    splits = grouped_folds(labels, np.arange(len(labels)), folds, seed)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        held = [(labels[part] == label).sum() for _, part in splits]
        assert max(held) - min(held) <= 1
        if count > 1:
            assert all((labels[train] == label).any() for train, _ in splits)


def test_the_held_out_share_is_close_for_patients_of_uneven_size():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), rng.integers(1, 30, 80))
    labels = rng.choice(3, 80, p=[0.7, 0.2, 0.1])[groups]
    for seed in range(5):
        _, held = grouped_holdout(labels, groups, 0.2, seed)
        for label in range(3):
            assert (labels[held] == label).sum() / (labels == label).sum() == pytest.approx(0.2, abs=0.06)


def test_seeds_give_different_splits():
    labels, groups = np.arange(100) % 3, np.arange(100)
    splits = {tuple(grouped_holdout(labels, groups, 0.2, seed)[1]) for seed in range(5)}
    assert len(splits) == 5


def test_images_without_a_patient_are_dealt_alike_whether_the_folder_of_the_data_is_absolute():
    labels = np.arange(40) % 2
    dealt = [
        [held.tolist() for _, held in grouped_folds(labels, np.array(groups), 4, seed=0)]
        for folder in ("data/", "/data/", "Data/", "/mnt/x/")
        if (groups := [f"{folder}{row:02}.png" if row % 4 == 0 else f"P{row // 2}" for row in range(40)])
    ]
    assert all(each == dealt[0] for each in dealt)


def test_a_class_with_a_single_patient_stays_in_training_even_if_most_is_held_out():
    labels = np.array([0] * 30 + [1])
    for seed in range(10):
        train, _ = grouped_holdout(labels, np.arange(31), 0.8, seed)
        assert 30 in train


def test_a_class_with_fewer_patients_than_folds_is_in_every_training_part():
    labels = np.array([0] * 40 + [1] * 2)
    for train, _ in grouped_folds(labels, np.arange(42), 5, seed=0):
        assert (labels[train] == 1).any()


def test_impossible_splits_are_explained():
    labels, groups = np.array([0, 1, 0]), np.array(["a", "a", "b"])
    with pytest.raises(UserError, match=r"3 folds: needs at least 3 patients \(groups\), there are 2"):
        grouped_folds(labels, groups, 3, 0)
    with pytest.raises(UserError, match="expected at least 2"):
        grouped_folds(labels, groups, 1, 0)
    with pytest.raises(UserError, match=r"fraction of 1\.5"):
        grouped_holdout(labels, groups, 1.5, 0)


def test_shared_patients_are_counted_and_the_first_is_named():
    check_disjoint(["a"], ["b"], "train", "test")
    with pytest.raises(UserError, match="2 patients are in both train and test, first: P2"):
        check_disjoint(["P3", "P2", "P1"], ["P2", "P3", "P3"], "train", "test")
