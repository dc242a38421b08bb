"""A folder of images becomes a study by its path alone; every mistake in the argument is one line."""

import numpy as np
import pytest
from PIL import Image

from configs import own_images
from dapt_jax.errors import UserError
from dapt_jax.settings import resolve
from dapt_jax.study import prepare, strategies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets `scans`, `cases` and `others` of two classes each."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in ("scans", "cases", "others"):
        for label in ("ill", "well"):
            (root / name / label).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (16, 16), np.uint8)
                Image.fromarray(pixels).save(root / name / label / f"{name}{label}{number}.png")
    return root


def sets_of(argument):
    settings = resolve(own_images.get_config(argument))
    resolved = [strategies.resolve(name, settings.model.encoder(), settings) for name in settings.strategies]
    loaded = {named: prepare.read_set(settings, named) for named in prepare.named_sets(settings, resolved)}
    return prepare.corpora_of(loaded)[""], prepare.task_of(settings, loaded, "target"), settings


def test_folders_of_classes_are_corpus_target_and_external_set(folder):
    corpus, task, settings = sets_of(f"corpus={folder}/scans,target={folder}/cases, external={folder}/others")
    assert [len(corpus), len(task.development), len(task.held_out["external"])] == [16, 16, 16]
    assert tuple(task.development.classes) == ("ill", "well")
    assert settings.strategies == ("none", "full", "partial", "hybrid")


def test_a_target_alone_lends_half_of_its_patients_to_the_corpus(folder):
    corpus, task, _ = sets_of(f"target={folder}/cases")
    assert len(corpus) == len(task.development) == 8
    assert not set(corpus.images.names) & set(task.development.images.names)


def test_a_corpus_without_labels_is_reconstructed(folder):
    corpus, _, settings = sets_of(f"unlabelled={folder}/scans,target={folder}/cases")
    assert (settings.adapt.objective, len(corpus)) == ("reconstruct", 16)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "no target; expected one"),
        ("taget=/x", "'taget'; did you mean 'target'"),
        ("/my/cases", r"'/my/cases'; expected SET=PATH"),
        ("target=/x,target=/y", "target twice"),
        ("target=/x,corpus=/y,unlabelled=/z", "corpus and unlabelled; expected one of them"),
    ],
)
def test_an_argument_that_names_no_study_is_refused(argument, message):
    with pytest.raises(UserError, match=message):
        own_images.get_config(argument)
