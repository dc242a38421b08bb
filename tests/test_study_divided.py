"""One labelled set as corpus and target, `data.split`: disjoint by patient, the same every time, refused in one line."""

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.settings import default, resolve
from dapt_jax.study import leakage, prepare, strategies


def settings_of(split: str, **changes: object):
    """A study of one set of phantoms, as corpus and target."""
    config = default()
    config.model.image_size = 16
    config.strategies = ("full",)
    config.data.split = split
    config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 60}}
    for key, value in changes.items():
        config[key] = value
    return resolve(config)


def read(settings):
    """Corpus and development set of such a study, as a study reads them."""
    resolved = [strategies.resolve(name, settings.model.encoder(), settings) for name in settings.strategies]
    loaded = {named: prepare.read_set(settings, named) for named in prepare.named_sets(settings, resolved)}
    task = prepare.task_of(settings, loaded, "cells")
    return prepare.corpora_of(loaded)[""], task, [read.line for read in loaded.values()]


@pytest.mark.parametrize(
    ("split", "shares"), [("corpus=.5,target=.5", (0.5, 0.5)), ("target=.3, corpus=.4", (0.4, 0.3))]
)
def test_corpus_and_target_share_no_patient_and_no_image(split, shares):
    corpus, task, lines = read(settings_of(split))
    sizes = np.array([len(corpus), len(task.development)])
    np.testing.assert_allclose(sizes / 60, shares, atol=0.1)
    assert not set(corpus.groups) & set(task.development.groups)
    assert not set(corpus.images.names) & set(task.development.images.names)
    assert set(task.development.class_counts().values()) - {0}
    assert all(f"data.split={split!r}" in line for line in lines)
    apart = leakage.resolve((task,), {"": corpus}, "error")  # the check that every study makes
    assert len(apart.corpora[""]) == len(corpus)
    again, _, _ = read(settings_of(split))
    assert again.images.names == corpus.images.names


@pytest.mark.parametrize(
    "split", ["corpus=.5", "corpus=.7,target=.6", "corpus=0,target=1", "half", "corpus=a,target=.5"]
)
def test_shares_that_cannot_be_say_what_would_do(split):
    with pytest.raises(
        UserError, match=r"data.split is .*expected corpus=SHARE,target=SHARE.*corpus=.5,target=.5"
    ):
        settings_of(split)


def test_a_split_beside_a_corpus_is_refused():
    settings = settings_of(
        "corpus=.5,target=.5", corpus={"kind": "phantoms", "name": "corpus", "val_fraction": 0.1}
    )
    with pytest.raises(UserError, match="the config names a corpus as well; expected data"):
        prepare.named_sets(settings, ())


def test_a_set_of_one_patient_is_not_divided():
    config = settings_of(
        "corpus=.5,target=.5",
        tasks={"cells": {"development": {"kind": "phantoms", "name": "development", "n": 6}}},
    )
    with pytest.raises(UserError, match=r"needs at least 2 patients .*expected more patients"):
        read(config)
