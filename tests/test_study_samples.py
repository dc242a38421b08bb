"""Sample images, examples of predictions and maps of features: stored by a study, shown by its report."""

import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dapt_jax.errors import UserError
from dapt_jax.records import samples as files
from dapt_jax.report import build
from dapt_jax.study import samples
from dapt_jax.study.tasks import Task
from tests import test_report_example as report_example
from tests import tiny
from tests.test_report_prediction_figures import TASK, keep


@dataclasses.dataclass
class Arm:
    """What the writers ask of an arm."""

    name: str = "full"
    seed: int = 0


@pytest.fixture
def task():
    return Task(TASK, tiny.dataset(24), {"external": tiny.dataset(12, seed=1)})


def test_principal_components_are_those_of_scikit_learn_up_to_their_sign():
    features = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32) * np.arange(1, 8)
    points, explained = samples.principal_components(features)
    theirs = PCA(2, svd_solver="full").fit(features)
    assert explained == pytest.approx(theirs.explained_variance_ratio_, rel=1e-4)
    assert np.abs(points) == pytest.approx(np.abs(theirs.transform(features)), rel=1e-3, abs=1e-3)
    constant, none = samples.principal_components(np.ones((3, 1)))
    assert (constant.shape, none.tolist(), np.abs(constant).max()) == ((3, 2), [0.0, 0.0], 0.0)


def test_a_map_holds_at_most_500_points_of_all_splits_with_their_labels(tmp_path):
    task = Task("cells", tiny.dataset(700), {"external": tiny.dataset(300, seed=1)})
    rng = np.random.default_rng(0)
    features = {split: rng.normal(size=(len(data), 5)) for split, data in task.datasets.items()}
    samples.write_feature_map(tmp_path, Arm(), task, features)
    found = files.read(files.FeatureMap, files.feature_map_path(tmp_path, "full", 0, "cells"))
    assert len(found.points) == samples.POINTS
    assert np.unique(found.splits, return_counts=True)[1].tolist() == [350, 150]
    assert set(found.labels.tolist()) <= set(task.development.classes)


def test_examples_are_right_wrong_and_surest_wrong(tmp_path, task):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(len(task.development.classes)), len(task.development))
    samples.write_examples(tmp_path, Arm(), task, "linear", {"development": {"linear": probabilities}})
    found = files.read(files.Examples, files.examples_path(tmp_path, "full", 0, TASK, "development"))
    guess, sure = probabilities.argmax(1), probabilities.max(1)
    is_wrong = guess != task.development.labels
    assert ((found.labels == found.predicted) == (found.kinds == "right")).all()
    surest = np.sort(sure[is_wrong])[::-1][: samples.EXAMPLES]
    assert found.probabilities[found.kinds == "surest wrong"] == pytest.approx(surest)
    assert len(set(found.names.tolist())) == len(found.names)
    assert max(found.images.shape[1:3]) <= samples.SIDE
    assert files.read(files.Examples, files.examples_path(tmp_path, "full", 0, TASK, "external")) is None


def test_the_page_shows_them_with_labels_and_sizes(tmp_path, task):
    workdir = report_example.write(tmp_path, seeds=(0,), strategies=("full",))
    keep(workdir, ("full",), (0,))
    rng = np.random.default_rng(0)
    features = {split: rng.normal(size=(len(data), 5)) for split, data in task.datasets.items()}
    samples.write_feature_map(workdir, Arm(), task, features)
    chances = rng.dirichlet(np.ones(len(task.development.classes)), len(task.development))
    samples.write_examples(workdir, Arm(), task, "linear", {"development": {"linear": chances}})
    sheet = files.Sheet(
        "corpus", 1200, 400, 64, task.development.images.batch(np.arange(3)), np.array(["a", "b", "<c>"])
    )
    files.write(files.sheet_path(workdir, "corpus"), sheet)
    build(workdir)
    page = (workdir / "report.html").read_text()
    assert "Saliency" not in page
    for said in (
        "1,200 images of 400 patients",
        "corpus: 3 of 1,200 images, 64 x 64 pixels",
        "&lt;c&gt;",
        "development, surest wrong: full seed 0, linear",
        "Features of full, seed 0, by class",
    ):
        assert said in page
    assert page.count("data:image/jpeg;base64,") == 3 + 3 * samples.EXAMPLES


def test_a_damaged_record_is_named(tmp_path):
    path = files.sheet_path(tmp_path, "corpus")
    files.write(path, files.Sheet("corpus", 1, 1, 8, np.zeros((1, 8, 8, 3), np.uint8), np.array(["a", "b"])))
    with pytest.raises(UserError, match=r"corpus.npz: arrays of the lengths .*; delete the file"):
        files.read_sheets(tmp_path)
    np.savez(path, title="corpus")
    with pytest.raises(UserError, match=r"no array 'count'"):
        files.read_sheets(tmp_path)
