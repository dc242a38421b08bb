"""Predictions are kept image by image, in the order of the set, whatever order the folds held them out in."""

import dataclasses

import numpy as np
import pytest

from dapt_jax.records import predictions
from dapt_jax.statistics import auc
from dapt_jax.study.predictions import Predictions
from dapt_jax.study.tasks import Task
from tests import tiny


def test_what_folds_say_is_kept_in_the_order_of_the_images(tmp_path):
    development, external = tiny.dataset(12), tiny.dataset(5, seed=1)
    task, rng = Task("cells", development, {"external": external}), np.random.default_rng(0)
    said = rng.dirichlet(np.ones(3), 12)
    parts = np.array_split(rng.permutation(12), 3)
    others = [rng.dirichlet(np.ones(3), 5) for _ in range(3)]
    kept = Predictions(task)
    kept.add("linear", [(said[rows], rows) for rows in parts], {"external": others})
    kept.add("finetune", [(said[parts[0]], parts[0])], {"external": others[:1]})
    kept.write(tmp_path, "full", 3)
    folder = tmp_path / "predictions" / "full-seed3"
    found = predictions.read(folder / "cells-development.npz", "linear")
    np.testing.assert_allclose(found.probabilities, said, rtol=1e-6)
    np.testing.assert_array_equal(found.targets.argmax(1), development.labels)
    assert found.groups.tolist() == development.groups.tolist()
    outside = predictions.read(folder / "cells-external.npz", "linear")
    np.testing.assert_allclose(outside.probabilities, np.mean(others, 0), rtol=1e-6)
    # One fold of three has not held out every image.
    assert predictions.read(folder / "cells-development.npz", "finetune") is None
    assert predictions.read(folder / "cells-external.npz", "finetune") is not None


def test_a_class_that_a_head_never_saw_does_not_count_for_its_images(tmp_path):
    development, external = tiny.dataset(12), tiny.dataset(6, seed=1)
    labels = np.array(
        [0, 1, 0, 1, 2, 2] + [0, 1] * 3
    )  # the images of class 2 are all held out by the first fold
    development = dataclasses.replace(development, labels=labels, classes=("a", "b", "rare"))
    external = dataclasses.replace(external, labels=np.arange(6) % 3, classes=development.classes)
    task, rng = Task("cells", development, {"external": external}), np.random.default_rng(0)
    parts = [np.arange(6), np.arange(6, 12)]
    kept = Predictions(task)
    out_of_fold = [(rng.dirichlet(np.ones(3), 6), rows) for rows in parts]
    kept.add("linear", out_of_fold, {"external": [rng.dirichlet(np.ones(3), 6) for _ in parts]})
    kept.write(tmp_path, "full", 0)
    for split, truth in (("development", labels), ("external", external.labels)):
        path = predictions.path_of(tmp_path, "full", 0, "cells", split)
        found = predictions.read(path, "linear")
        assert found.unseen == ("rare",)
        aucs = [auc(truth == column, found.probabilities[:, column]) for column in (0, 1)]
        assert found.auc(np.arange(len(truth))) == pytest.approx(np.mean(aucs))
        arrays = dict(np.load(path))
        del arrays["seen/linear"], arrays["classes"]
        np.savez(path, **arrays)  # as written by an earlier version
        old = predictions.read(path, "linear")
        assert old.unseen == ()
        whole = [*aucs, auc(truth == 2, found.probabilities[:, 2])]
        assert old.auc(np.arange(len(truth))) == pytest.approx(np.mean(whole))
