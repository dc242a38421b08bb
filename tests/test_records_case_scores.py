"""Dice of single images: what is written is what is read, and their mean is the metric."""

import numpy as np
import pytest

from dapt_jax import metrics
from dapt_jax.errors import UserError
from dapt_jax.records import case_scores
from dapt_jax.records.case_scores import CaseScores


def scored(seed=0):
    rng = np.random.default_rng(seed)
    found = metrics.Segmentation(("background", "cell", "nucleus"), surfaces=False)
    truth, predicted = rng.integers(0, 3, (2, 7, 4, 4)).astype(np.uint8)
    truth[0], predicted[0] = 0, 0
    found.add(truth, predicted)
    return found


def test_the_mean_over_all_images_is_the_metric():
    found = scored()
    value = next(each.value for each in found.scores() if each.metric == "dice")
    cases = CaseScores(found.per_image()["dice"], np.arange(7).astype(str), np.arange(7).astype(str))
    assert (cases.dice[0] == 1).all()
    assert cases.mean(np.arange(7)) == pytest.approx(value)
    assert np.isnan(cases.mean(np.array([], int)))


def test_a_file_is_read_as_written_and_a_damaged_one_is_refused(tmp_path):
    path = case_scores.path_of(tmp_path, "full", 3, "cells", "external", "frozen")
    assert path == tmp_path / "case_scores" / "full-seed3" / "cells-external-frozen.npz"
    path.parent.mkdir(parents=True)
    cases = CaseScores(
        np.array([[0.5], [1.0]], np.float32), np.array(["p", "q"]), np.array(["1.png", "2.png"])
    )
    case_scores.write(path, cases)
    read = case_scores.read(path)
    assert read.same_images(cases)
    assert np.array_equal(read.dice, cases.dice)
    np.savez(path, dice=cases.dice)
    with pytest.raises(UserError, match=r"frozen\.npz: no array 'group'; expected dice, group and image"):
        case_scores.read(path)
    np.savez(path, dice=cases.dice[:1], group=cases.groups, image=cases.images)
    with pytest.raises(UserError, match="expected one row for each image in all"):
        case_scores.read(path)


def test_folds_are_averaged():
    a = CaseScores(np.array([[0.5], [1.0]]), np.array(["p", "q"]), np.array(["1", "2"]))
    b = CaseScores(np.array([[1.0], [0.0]]), a.groups, a.images)
    assert case_scores.mean_of([a, b]).dice.tolist() == [[0.75], [0.5]]
