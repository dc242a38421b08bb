"""A non-finite loss: its batch is found and saved, and a phase may be tried once more at a lower learning rate."""

import dataclasses
import math

import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.training import loop, recovery
from dapt_jax.training.context import NonFinitePolicy
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.training.steps import PhaseProgram
from tests import tiny
from tests.test_training_loop import DATA, ENCODER, SAVE_ALWAYS, KilledError, Killer, Watch, context, leaves

SGD = Optimizer("sgd")
WILD = Phase("full", 2, ("*",), 1e30)


def train(run, folder, policy=None, **others):
    params, batch_stats = run.model.init(1)
    non_finite = NonFinitePolicy(**(policy or {}), folder=folder / "nan")
    trained = loop.train(run, params, batch_stats, context(folder, non_finite=non_finite, **others))
    return leaves(trained), trained.costs


def explode(monkeypatch, step, times=math.inf, rate=math.inf):
    """Gives one step of a run a learning rate without bound, every time that it is run or only the first few times."""
    lr, done = PhaseProgram.lr, []

    def infinite(self, at):
        if at == step and len(done) < times:
            done.append(at)
            return rate
        return lr(self, at)

    monkeypatch.setattr(PhaseProgram, "lr", infinite)


@pytest.mark.parametrize(
    ("phase", "cache"), [(tiny.FULL, "off"), (tiny.PARTIAL, "auto"), (tiny.HEAD, "auto")]
)
@pytest.mark.parametrize("saving", [SAVE_ALWAYS, {}], ids=["always", "never"])
def test_the_batch_that_did_it_is_found_and_saved(tmp_path, monkeypatch, phase, cache, saving):
    step = 5  # of eight
    explode(monkeypatch, step)
    run = tiny.make_run([phase], encoder=ENCODER, data=DATA, cache=cache)
    with pytest.raises(
        UserError, match=rf"training loss is .* step {step + 1} of the run; its batch is in .*\.npz"
    ):
        train(run, tmp_path, **saving)
    (path,) = (tmp_path / "nan").iterdir()
    with np.load(path) as file:
        kept = dict(file)
    epoch, batch = divmod(step, run.timeline.steps_per_epoch)
    rows, weights = (each[batch] for each in run.order.epoch(epoch))
    np.testing.assert_array_equal(kept["rows"], rows)
    np.testing.assert_array_equal(kept["weights"], weights)
    np.testing.assert_array_equal(kept["images"], DATA.images.batch(rows))
    np.testing.assert_array_equal(kept["labels"], DATA.labels[rows])
    assert list(kept["names"]) == [DATA.images.names[row] for row in rows]
    assert (kept["step"], kept["epoch"], kept["seed"], str(kept["phase"])) == (
        step,
        epoch,
        run.seed,
        phase.name,
    )


@pytest.mark.parametrize(
    ("phase", "step", "rate", "said"),
    [
        (tiny.FULL, 3, math.inf, 4),
        (tiny.FULL, 7, math.inf, 8),
        (tiny.FULL, 3, 1e30, 5),
        (tiny.HEAD, 3, math.inf, 4),
        (tiny.HEAD, 7, math.inf, 8),
    ],
)
def test_what_diverges_in_the_last_step_of_an_epoch_is_found_although_it_is_evaluated_first(
    tmp_path, monkeypatch, phase, step, rate, said
):
    """A network of finite parameters that overflows is found by the loss of the next step."""
    explode(monkeypatch, step, rate=rate)
    run = tiny.make_run([phase], encoder=ENCODER, data=DATA, cache="auto", optimizer=SGD)
    assert run.timeline.steps_per_epoch == 4
    with pytest.raises(
        UserError, match=rf"training loss is .* step {said} of the run; its batch is in .*\.npz"
    ):
        train(run, tmp_path)


def test_the_checksum_is_that_of_the_parameters_before_the_step(tmp_path, monkeypatch):
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    explode(monkeypatch, 0)
    with pytest.raises(UserError):
        train(run, tmp_path)
    with np.load(next((tmp_path / "nan").iterdir())) as file:
        kept = dict(file)
    assert str(kept["params_checksum"]) == recovery.checksum(run.programs[0].model.init(1)[0])


def test_what_does_not_happen_again_is_said_to_come_from_the_hardware(tmp_path, monkeypatch):
    explode(monkeypatch, 4, times=1)
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    with pytest.raises(
        UserError, match="replayed from step 0 it did not happen again, which points to the hardware"
    ):
        train(run, tmp_path)


def test_a_rollback_goes_on_from_the_start_of_the_phase_at_a_lower_rate_and_the_ledger_says_so(tmp_path):
    tame = dataclasses.replace(WILD, lr=1e-2)
    before = Phase("before", 1, ("*",), 1e-2)
    quiet = tiny.make_run([before, tame], encoder=ENCODER, data=DATA, optimizer=SGD)
    wild = tiny.make_run([before, WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    expected, planned = train(quiet, tmp_path / "quiet")
    policy, often = {"policy": "rollback", "lr_factor": 1e-32}, {"sync_every_s": 0.0}
    ended = [
        train(wild, tmp_path / f"wild{every_s}", policy, every_s=every_s, **often) for every_s in (0.0, 1e9)
    ]
    for found, rows in ended:  # whenever checkpoints were written
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        fell = rows[1].curve[0]["rolled_back_from"]
        assert (
            fell == 6
        )  # the second step of the phase, which begins at step 4, is the first to see what the first did
        assert [point["lr"] for point in rows[1].curve] == pytest.approx([1e-2] * 2)
        assert rows[1].steps - planned[1].steps == 2
        assert rows[1].images - planned[1].images == 2 * wild.batch_size
        per_image = planned[1].model_flops / planned[1].images
        assert rows[1].model_flops == per_image * rows[1].images
    assert all(np.array_equal(a, b) for a, b in zip(ended[0][0], ended[1][0], strict=True))
    assert ended[0][1][1].curve == ended[1][1][1].curve


def test_a_second_non_finite_loss_halts(tmp_path):
    run = tiny.make_run([WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    with pytest.raises(UserError, match="after a rollback; expected a finite loss: lower its lr"):
        train(run, tmp_path, {"policy": "rollback", "lr_factor": 0.5})


def test_a_rollback_that_is_killed_ends_with_the_same_bits(tmp_path):
    run = tiny.make_run([WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    policy = {"policy": "rollback", "lr_factor": 1e-32}
    quiet, quiet_rows = train(run, tmp_path / "quiet", policy, **SAVE_ALWAYS)
    with pytest.raises(KilledError):  # the first attempt ends at its second step
        train(run, tmp_path / "killed", policy, heartbeat=Killer(4), **SAVE_ALWAYS)
    resumed, rows = train(run, tmp_path / "killed", policy, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, resumed, strict=True))
    assert [(row.steps, row.model_flops, row.curve) for row in rows] == [
        (row.steps, row.model_flops, row.curve) for row in quiet_rows
    ]


def test_a_rollback_takes_back_what_callbacks_have_seen(tmp_path):
    before = Phase("before", 1, ("*",), 1e-2)
    run = tiny.make_run([before, WILD], encoder=ENCODER, data=DATA, optimizer=SGD)
    for folder in (tmp_path / "saved", None):
        watch = Watch()
        files = {} if folder else {"checkpoint_dir": None}
        policy = {"policy": "rollback", "lr_factor": 1e-32}
        train(run, tmp_path / "saved", policy, callbacks=(watch,), **files)
        assert [each[1] for each in watch.seen] == [0, 1, 2]
