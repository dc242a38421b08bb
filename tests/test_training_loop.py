"""Invariances of a whole run: cached or not, resumed or not, in whatever order the data come."""

import dataclasses

import jax
import numpy as np
import pytest

from dapt_jax.cost import hardware
from dapt_jax.data import pipeline
from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import BinaryCrossEntropy
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime import sharding
from dapt_jax.training import loop, phase, step_runners
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.early_stopping import EarlyStop
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunContext
from tests import tiny

ENCODER = tiny.encoder()
DATA = tiny.dataset()


EXECUTABLES = {}


def context(folder, every_s=1e9, store=None):
    return RunContext(
        folder=folder / "state" if folder else None,
        every_s=every_s,
        ledger=Ledger(folder / "ledger.jsonl") if folder else NoLedger(),
        store=store or ActivationCache(1 << 28),
        mesh=sharding.make_mesh(),
        hardware=hardware.describe(),
        reporter=Reporter(1, quiet=True),
        executables=EXECUTABLES,
    )


class NoLedger(Ledger):
    def __init__(self):
        self.entries = []

    def put(self, row):
        self.entries = [old for old in self.entries if old.key != row.key] + [row]

    def rows(self):
        return self.entries


def train(run, folder=None, **kwargs):
    params, batch_stats = run.programs[0].model.init(1)
    used = context(folder, **kwargs)
    trained = loop.train(run, params, batch_stats, used)
    return jax.tree.leaves(trained), used.ledger.rows()


def curve(rows):
    return [point["loss"] for row in rows for point in row.curve]


@pytest.mark.parametrize("augment", [Augment(), Augment("dihedral", 0.1, 0.2, 0.2)])
def test_cached_and_uncached_runs_give_the_same_losses_and_parameters(augment):
    views = 0 if augment.is_identity else 2
    phases = [
        tiny.HEAD,
        Phase("partial", 20, ("stage3", "head"), 1e-2, views=views),
        Phase("late", 20, ("head",), 1e-3, views=views),
    ]
    made = {}
    for mode in ("off", "auto"):
        run = tiny.make_run(phases, encoder=ENCODER, data=DATA, cache=mode, augment=augment)
        made[mode] = train(run)
    (plain, rows), (cached, cached_rows) = made["off"], made["auto"]
    assert [row.cached for row in rows] == ["off"] * 3
    # On plain images the head's features were computed by way of what the partial phase trains on.
    assert [row.cached for row in cached_rows] == ["filled", "reused" if augment.is_identity else "filled", "filled"]
    np.testing.assert_allclose(curve(rows), curve(cached_rows), rtol=1e-5)
    a, b = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (plain, cached))
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
    assert sum(row.steps for row in rows) >= 160


def test_a_cached_phase_costs_its_suffix_and_one_pass_over_the_images():
    run = tiny.make_run([Phase("head", 50, ("head",), 1e-2, augment=False)], encoder=ENCODER, data=DATA, cache="auto")
    _, (row,) = train(run)
    plain = dataclasses.replace(run, caching=Caching("off"))
    _, (uncached,) = train(plain)
    head = 2 * 2 * 8 * 3
    assert uncached.model_flops - row.model_flops == (uncached.images - len(DATA)) * (
        uncached.model_flops // uncached.images - head
    )


def test_activations_are_shared_by_runs_that_agree_and_by_no_others():
    store = ActivationCache(1 << 28)
    run = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA, cache="auto")
    _, first = train(run, store=store)
    other_seed = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA, cache="auto", seed=5)
    _, second = train(other_seed, store=store)
    other_data = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=tiny.dataset(seed=9), cache="auto")
    _, third = train(other_data, store=store)
    assert [rows[0].cached for rows in (first, second, third)] == ["filled", "reused", "filled"]
    assert second[0].model_flops + second[0].reused_flops == first[0].model_flops


class KilledError(BaseException):
    pass


@pytest.mark.parametrize(
    ("cache", "stop"), [("off", 3), ("off", 8), ("off", 13), ("off", 22), ("auto", 4), ("auto", 12)]
)
def test_a_run_stopped_anywhere_and_started_again_ends_with_the_same_bits(tmp_path, monkeypatch, cache, stop):
    optimizer = Optimizer("adamw", weight_decay=0.01, clip=1.0, ema=0.9)
    phases = [
        tiny.HEAD,
        Phase("partial", 2, ("stage3", "head"), 1e-2, schedule="plateau"),
        Phase("full", 2, ("*",), 1e-2, batch_norm="train", schedule="cosine"),
    ]

    augment = Augment("horizontal", 0.1)
    run = tiny.make_run(phases, encoder=ENCODER, data=DATA, augment=augment, optimizer=optimizer, cache=cache)
    monkeypatch.setattr(step_runners, "SYNC_EVERY_S", 0.0)
    quiet, quiet_rows = train(run, tmp_path / "quiet", every_s=0.0)
    steps = []
    save = phase.PhaseLoop._save

    def save_and_die(self, state, feed):
        save(self, state, feed)
        steps.append(int(state["step"]))
        if steps[-1] >= stop:
            raise KilledError

    monkeypatch.setattr(phase.PhaseLoop, "_save", save_and_die)
    with pytest.raises(KilledError):
        train(run, tmp_path / "killed", every_s=0.0)
    monkeypatch.setattr(phase.PhaseLoop, "_save", save)
    resumed, rows = train(run, tmp_path / "killed", every_s=0.0)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, resumed, strict=True))
    assert [row.curve for row in rows] == [row.curve for row in quiet_rows]
    assert [(row.steps, row.images, row.model_flops) for row in rows] == [
        (row.steps, row.images, row.model_flops) for row in quiet_rows
    ]


def test_a_torn_checkpoint_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(step_runners, "SYNC_EVERY_S", 0.0)
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    quiet, _ = train(run, tmp_path, every_s=0.0)
    newest = max(int(path.name) for path in (tmp_path / "state").iterdir() if path.name.isdigit())
    for file in (tmp_path / "state" / str(newest) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    again, _ = train(run, tmp_path, every_s=0.0)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))


def test_a_loss_that_is_no_number_stops_with_one_line():
    run = tiny.make_run([Phase("full", 3, ("*",), 1e30)], encoder=ENCODER, data=DATA, optimizer=Optimizer("sgd"))
    with pytest.raises(UserError, match=r"training loss is (nan|inf).*lower its lr"):
        train(run)


def test_every_row_is_seen_once_an_epoch_whatever_the_batch_size():
    for size in (3, 7, 32, 50):
        order = pipeline.Order(tuple(range(100, 132)), size, seed=4)
        for epoch in range(3):
            indices, weights = order.epoch(epoch)
            assert sorted(indices[weights > 0]) == list(range(100, 132))
            assert indices.shape == (order.steps_per_epoch, size)
    assert not np.array_equal(order.epoch(0)[0], order.epoch(1)[0])


def test_hosts_read_disjoint_shares_of_the_same_batches():
    order = pipeline.Order(tuple(range(len(DATA))), 8, seed=0)
    whole = list(pipeline.batches(DATA, order, 2))
    shares = [list(pipeline.batches(DATA, order, 2, share=slice(2 * host, 2 * host + 2))) for host in range(4)]
    for batch, *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(batch["index"], np.concatenate([part["index"] for part in parts]))
        np.testing.assert_array_equal(batch["image"], np.concatenate([part["image"] for part in parts]))


def test_augmentation_depends_on_seed_view_and_row_alone():
    augment = Augment("dihedral", 0.2, 0.3, 0.3)
    rows = np.arange(8, dtype=np.int32)
    images = DATA.images.batch(rows)
    straight = np.asarray(augment(images, 3, 1, rows))
    turned = np.asarray(augment(images[::-1], 3, 1, rows[::-1]))
    np.testing.assert_array_equal(straight, turned[::-1])
    for other in (augment(images, 4, 1, rows), augment(images, 3, 2, rows)):
        assert not np.array_equal(straight, np.asarray(other))
    assert straight.min() >= 0
    assert straight.max() <= 255
    flips = np.asarray(Augment("dihedral")(images, 0, 0, rows))
    np.testing.assert_array_equal(np.sort(flips.reshape(8, -1)), np.sort(images.reshape(8, -1)))


# ---- uncertain labels ---------------------------------------------------------------------------------------------


def uncertain_data():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, -1, np.nan], (len(DATA), 3), p=[0.3, 0.3, 0.3, 0.1]).astype(np.float32)
    return dataclasses.replace(DATA, labels=labels, uncertain=(0.55, 0.85))


def test_targets_of_uncertain_labels_are_new_in_every_epoch_and_the_same_from_a_cache():
    data = uncertain_data()
    objective = BinaryCrossEntropy(3, multi_label=True, uncertain=data.uncertain)
    phases = [tiny.PARTIAL, Phase("late", 3, ("head",), 1e-2)]
    curves = {}
    for mode in ("off", "auto"):  # one by one from images; then from activations, one by one and many epochs at once
        run = tiny.make_run(phases, encoder=ENCODER, data=data, cache=mode, objective=objective)
        _, rows = train(run)
        curves[mode] = curve(rows)
        assert all(np.isfinite(point["val_loss"]) for row in rows for point in row.curve)
    np.testing.assert_allclose(curves["off"], curves["auto"], rtol=1e-5)
    still = Phase("still", 3, ("head",), 1e-30)  # nothing moves but the targets
    _, (row,) = train(tiny.make_run([still], encoder=ENCODER, data=data, cache="auto", objective=objective))
    assert len(set(curve([row]))) == 3
    assert len({point["val_loss"] for point in row.curve}) == 1
    rows = np.arange(8, dtype=np.int32)
    program = tiny.make_run([still], encoder=ENCODER, data=data, objective=objective).programs[0]
    targets = jax.jit(program.targets)
    drawn = [targets(data.targets[:8], {"seed": 0, "view": 0, "epoch": epoch}, rows) for epoch in (0, 1)]
    back = targets(data.targets[:8][::-1], {"seed": 0, "view": 5, "epoch": 0}, rows[::-1])
    np.testing.assert_array_equal(drawn[0], back[::-1])
    unsure = data.labels[:8] == -1
    assert (np.asarray(drawn[0])[unsure] != np.asarray(drawn[1])[unsure]).all()
    np.testing.assert_array_equal(np.asarray(drawn[0])[~unsure], data.labels[:8][~unsure])


def test_uncertain_labels_are_not_scored():
    data = uncertain_data()
    assert np.isnan(data.truth).sum() == (np.isnan(data.labels) | (data.labels == -1)).sum()
    assert not (data.truth == -1).any()
    np.testing.assert_allclose(data.expected[data.labels == -1], 0.7)


# ---- early stopping -----------------------------------------------------------------------------------------------


def stopping_run(epochs, val=12):
    phases = [tiny.HEAD, Phase("full", epochs, ("*",), 3e-2, batch_norm="train")]
    return tiny.make_run(phases, encoder=ENCODER, data=DATA, val=val, mix=Mix(mixup=0.5, cutmix=1.0))


def stop_early(folder, patience, every_s=1e9):
    run = stopping_run(30)
    stop = EarlyStop(patience, run, folder / "best.safetensors")
    params, batch_stats = run.programs[0].model.init(1)
    used = dataclasses.replace(context(folder, every_s), hook=stop)
    chosen = stop.chosen(*loop.train(run, params, batch_stats, used))
    return jax.tree.leaves(chosen), used.ledger.rows(), stop


def test_a_run_ends_when_its_watched_loss_falls_no_longer_with_the_weights_of_its_best_epoch(tmp_path):
    found, rows, stop = stop_early(tmp_path, 2)
    losses = [point["val_loss"] for point in rows[-1].curve]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 3 < 30  # three in a row were no better
    assert stop.stopped
    assert rows[-1].steps == len(losses) * stopping_run(30).timeline.steps_per_epoch
    assert rows[-1].images == len(losses) * (len(DATA) - 12)
    short, _ = train(stopping_run(best + 1))  # the same run, of as many epochs
    assert all(np.array_equal(a, b) for a, b in zip(found, short, strict=True))


def test_a_run_killed_and_started_again_stops_where_it_would_have(tmp_path, monkeypatch):
    quiet, quiet_rows, _ = stop_early(tmp_path / "quiet", 2, every_s=0.0)
    save, saved = phase.PhaseLoop._save, []

    def save_and_die(self, state, feed):
        save(self, state, feed)
        saved.append(int(state["step"]))
        if len(saved) in (3, 7):
            raise KilledError

    monkeypatch.setattr(phase.PhaseLoop, "_save", save_and_die)
    for _ in range(2):
        with pytest.raises(KilledError):
            stop_early(tmp_path / "killed", 2, every_s=0.0)
    for _ in range(2):  # once to its end, and once more when it has ended
        again, rows, _ = stop_early(tmp_path / "killed", 2, every_s=0.0)
        assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))
        assert [row.curve for row in rows] == [row.curve for row in quiet_rows]
