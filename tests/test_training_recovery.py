"""A loss that is no number: the batch is found and kept, and a phase may get a second try at a lower rate."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.training import loop, phase, recovery, step_runners
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import NonFinitePolicy
from dapt_jax.training.steps import PhaseProgram
from tests import tiny
from tests.test_training_loop import DATA, ENCODER, context

SGD = Optimizer("sgd")
WILD = Phase("full", 2, ("*",), 1e30)


def train(run, folder, every_s=1e9, **debug):
    params, batch_stats = run.programs[0].model.init(1)
    used = context(folder, every_s)
    used.debug = NonFinitePolicy(**debug, folder=folder / "nan")
    trained = loop.train(run, params, batch_stats, used)
    return jax.tree.leaves(trained), used.ledger.rows()


def explode(monkeypatch, step):
    """Gives one step of a run a rate beyond numbers."""
    rate = PhaseProgram.rate
    monkeypatch.setattr(PhaseProgram, "rate", lambda self, at: math.inf if at == step else rate(self, at))


@pytest.mark.parametrize(("phase", "cache"), [(tiny.FULL, "off"), (tiny.PARTIAL, "auto"), (tiny.HEAD, "auto")])
@pytest.mark.parametrize("every_s", [0.0, 1e9])
def test_the_batch_that_did_it_is_found_and_kept(tmp_path, monkeypatch, phase, cache, every_s):
    if not every_s:
        monkeypatch.setattr(step_runners, "SYNC_EVERY_S", 0.0)
    step = 5  # of eight
    explode(monkeypatch, step)
    run = tiny.make_run([phase], encoder=ENCODER, data=DATA, cache=cache)
    with pytest.raises(UserError, match=rf"training loss is .* step {step + 1} of the run; its batch is in .*\.npz"):
        train(run, tmp_path, every_s)
    (path,) = (tmp_path / "nan").iterdir()
    kept = np.load(path)
    epoch, batch = divmod(step, run.timeline.steps_per_epoch)
    rows, weights = (each[batch] for each in run.order.epoch(epoch))
    np.testing.assert_array_equal(kept["rows"], rows)
    np.testing.assert_array_equal(kept["weights"], weights)
    np.testing.assert_array_equal(kept["images"], DATA.images.batch(rows))
    np.testing.assert_array_equal(kept["labels"], DATA.labels[rows])
    assert list(kept["names"]) == [DATA.images.names[row] for row in rows]
    assert (kept["step"], kept["epoch"], kept["seed"], str(kept["phase"])) == (step, epoch, run.seed, phase.name)


def test_the_checksum_is_that_of_the_parameters_before_the_step(tmp_path, monkeypatch):
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    explode(monkeypatch, 0)
    with pytest.raises(UserError):
        train(run, tmp_path)
    kept = np.load(next((tmp_path / "nan").iterdir()))
    assert str(kept["params_checksum"]) == recovery.checksum(run.programs[0].model.init(1)[0])


def test_what_does_not_happen_again_is_said_to_come_from_the_hardware(tmp_path, monkeypatch):
    check, calls = phase.PhaseLoop._check, []

    def once(self, loss, weight, step):
        calls.append(step)
        check(self, math.nan if len(calls) == 1 else loss, weight, step)

    monkeypatch.setattr(phase.PhaseLoop, "_check", once)
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    with pytest.raises(UserError, match="replayed from step 0 it did not happen again, which points to the hardware"):
        train(run, tmp_path)


def test_a_rollback_goes_on_from_the_start_of_the_phase_at_a_lower_rate_and_the_ledger_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(step_runners, "SYNC_EVERY_S", 0.0)
    tame = dataclasses.replace(WILD, lr=1e-2)
    before = Phase("before", 1, ("*",), 1e-2)
    quiet = tiny.make_run([before, tame], encoder=ENCODER, data=DATA, optimizer=SGD)
    wild = tiny.make_run([before, WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    expected, planned = train(quiet, tmp_path / "quiet")
    ended = [
        train(wild, tmp_path / f"wild{every_s}", every_s, nan="rollback", nan_factor=1e-32) for every_s in (0.0, 1e9)
    ]
    for found, rows in ended:  # whenever checkpoints were written
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        fell = rows[1].curve[0]["rolled_back_from"]
        assert fell == 6  # the second step of the phase, which begins at step 4, is the first to see what the first did
        assert [point["lr"] for point in rows[1].curve] == pytest.approx([1e-2] * 2)
        assert rows[1].steps - planned[1].steps == 2
        assert rows[1].images - planned[1].images == 2 * wild.batch_size
        per_image = planned[1].model_flops / planned[1].images
        assert rows[1].model_flops == per_image * rows[1].images
    assert all(np.array_equal(a, b) for a, b in zip(ended[0][0], ended[1][0], strict=True))
    assert ended[0][1][1].curve == ended[1][1][1].curve


def test_a_second_loss_that_is_no_number_halts(tmp_path):
    run = tiny.make_run([WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    with pytest.raises(UserError, match="after a rollback; expected a number: lower its lr"):
        train(run, tmp_path, nan="rollback", nan_factor=0.5)


def test_a_rollback_that_is_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(step_runners, "SYNC_EVERY_S", 0.0)
    run = tiny.make_run([WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    debug = {"nan": "rollback", "nan_factor": 1e-32}
    quiet, quiet_rows = train(run, tmp_path / "quiet", 0.0, **debug)
    save = phase.PhaseLoop._save

    def save_and_die(self, state, feed):
        save(self, state, feed)
        if self.lost and int(state["step"]) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(phase.PhaseLoop, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "killed", 0.0, **debug)
    monkeypatch.setattr(phase.PhaseLoop, "_save", save)
    resumed, rows = train(run, tmp_path / "killed", 0.0, **debug)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, resumed, strict=True))
    assert [(row.steps, row.model_flops, row.curve) for row in rows] == [
        (row.steps, row.model_flops, row.curve) for row in quiet_rows
    ]
