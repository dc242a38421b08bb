"""Predictions are kept image by image, in the order of the set, whatever order the folds held them out in."""

import numpy as np

from dapt_jax.records import predictions
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
