"""Balanced sampling without labels: every cluster equally often, whatever the devices and after a restart."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapt_jax.data import pipeline
from dapt_jax.errors import UserError
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime.sharding import make_mesh
from dapt_jax.study import balance
from dapt_jax.training import loop
from dapt_jax.training.context import RunContext
from tests import command
from tests.test_label_free_training import DATA, run_of


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 2**31))
def test_every_epoch_draws_all_clusters_and_their_rows_equally_often(clusters, seed):
    places = pipeline.balanced(clusters, np.random.default_rng(seed))
    assert len(places) == len(clusters)
    of_clusters = np.bincount(np.asarray(clusters)[places], minlength=7)[np.unique(clusters)]
    assert of_clusters.max() - of_clusters.min() <= 1
    for each in np.unique(clusters):
        of_rows = np.bincount(places, minlength=len(clusters))[np.asarray(clusters) == each]
        assert of_rows.max() - of_rows.min() <= 1


def test_an_order_of_clusters_is_a_function_of_seed_and_epoch_and_of_as_many_rows():
    rows, clusters = tuple(range(10, 20)), (0,) * 8 + (1,) * 2
    first, again = (pipeline.Order(rows, 4, 3, clusters=clusters) for _ in range(2))
    indices, weights = first.epoch(5)
    np.testing.assert_array_equal(indices, again.epoch(5)[0])
    assert (indices != first.epoch(6)[0]).any()
    counted = indices[weights > 0]
    assert len(counted) == 10
    assert (counted >= 18).sum() == 5


def test_clusters_are_those_of_the_directions_of_features():
    rng = np.random.default_rng(0)
    directions = np.eye(5)[:3].repeat([20, 5, 2], 0)
    features = (directions + 0.05 * rng.normal(size=(27, 5))) * rng.uniform(1, 9, (27, 1))
    found = balance.cluster(features, 3, seed=1)
    assert sorted(np.bincount(found)) == [2, 5, 20]
    with pytest.raises(UserError, match=r"hold 2 different vectors; expected up to 2, or 0"):
        balance.cluster(features[:2], 3, seed=0, name="corpus")


def test_clusters_do_not_depend_on_devices_or_a_restart_and_their_pass_is_planned_to_the_integer(tmp_path):
    run = run_of("reconstruct", "cnn")
    weights = run.model.init(1)
    found = {}
    for count in {1, jax.device_count()}:
        ledger = Ledger(tmp_path / f"{count}.jsonl")
        context = RunContext(mesh=make_mesh(jax.devices()[:count]), ledger=ledger)
        folder = tmp_path / str(count)
        folder.mkdir()
        made = balance.balanced(run, 3, weights, folder, context)
        found[count] = made.data.clusters
        (row,) = ledger.rows()
        assert row.model_flops == balance.flops(run, 3) > 0
        again = balance.balanced(run, 3, run.model.init(2), folder, context)  # of weights that have moved on
        assert again.data.clusters == made.data.clusters
        assert json.loads((folder / balance.FILE).read_text()) == list(made.data.clusters)
    assert len(set(found.values())) == 1
    assert len(made.data.clusters) == len(run.train_rows) < len(DATA)
    assert balance.balanced(run, 0, weights, tmp_path / "none", context) is run
    assert made.flops() == run.flops()
    loop.train(made, *weights, context)


def test_more_clusters_than_images_are_one_line(tmp_path, capsys):
    flags = (
        f"--config={command.ROOT}/tests/configs/tiny_study.py",
        "--config.strategies=partial",
        "--config.adapt.objective=reconstruct",
        "--config.adapt.balance_clusters=5000",
        f"--workdir={tmp_path}",
    )
    assert command.run(*flags) == 2
    assert "adapt.balance_clusters is 5000, but it has" in capsys.readouterr().err
