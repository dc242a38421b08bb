"""A run goes on from the weights that it was begun with, and says so where others are there now."""

import jax
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.training import loop
from tests import tiny
from tests.test_training_loop import context

DATA = tiny.dataset(16)


def test_a_run_begun_from_other_weights_is_refused_with_both_fingerprints(tmp_path) -> None:
    run = tiny.make_run([tiny.HEAD], encoder=tiny.encoder(), data=DATA, val=4)
    params, batch_stats = jax.device_get(run.programs[0].model.init(1))
    first = loop.train(run, params, batch_stats, context(tmp_path, every_s=0))
    # The last checkpoint is the whole run.
    again = loop.train(run, params, batch_stats, context(tmp_path, every_s=0))
    weights = [jax.tree.leaves((result.params, result.batch_stats)) for result in (first, again)]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
    for tree, path in (
        (params, ("stage1", "block1", "conv", "kernel")),
        (batch_stats, ("stage1", "block1", "norm", "mean")),
    ):
        kept = jax.tree.map(np.copy, tree)
        leaf = tree
        for name in path:
            leaf = leaf[name]
        leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(9))
        with pytest.raises(
            UserError,
            match=r"begun from other source weights \(fingerprint [0-9a-f]{16} there, [0-9a-f]{16} now\)",
        ):
            loop.train(run, params, batch_stats, context(tmp_path, every_s=0))
        jax.tree.map(np.copyto, tree, kept)
    loop.train(run, params, batch_stats, context(tmp_path, every_s=0))
