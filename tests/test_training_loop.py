"""Invariances of a whole run: cached or not, resumed or not, in whatever order the data come."""

import dataclasses
import errno
import json
import signal
import traceback
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dapt_jax.data import pipeline
from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy
from dapt_jax.losses.overlap import Dice
from dapt_jax.models.classifier import Classifier
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime import processes
from dapt_jax.runtime.preemption import PreemptionHandler, Stopped
from dapt_jax.runtime.sharding import make_mesh
from dapt_jax.training import checkpointer, loop
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.checkpoint import CheckpointFolder, saved_part
from dapt_jax.training.checkpointer import Checkpointer
from dapt_jax.training.context import RunContext
from dapt_jax.training.early_stopping import EarlyStopping
from dapt_jax.training.executables import Executables
from dapt_jax.training.optim import Optimizer, Plateau
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun
from tests import tiny

ENCODER = tiny.encoder()
DATA = tiny.dataset()


EXECUTABLES = Executables()


def context(folder=None, every_s=1e9, **others):
    """Surroundings of a run in a folder, or in memory; `others` as in `RunContext`."""
    files = {"checkpoint_dir": folder / "state", "ledger": Ledger(folder / "ledger.jsonl")} if folder else {}
    return RunContext(checkpoint_every_s=every_s, **{"executables": EXECUTABLES, **files, **others})


def train(run, folder=None, **others):
    params, batch_stats = run.model.init(1)
    trained = loop.train(run, params, batch_stats, context(folder, **others))
    return leaves(trained), trained.costs


def leaves(trained):
    return jax.tree.leaves((trained.params, trained.batch_stats))


def curve(rows):
    return [point["loss"] for row in rows for point in row.curve]


class Counted(Executables):
    """Executables that count what is compiled, and note what is begun ahead."""

    def __init__(self):
        super().__init__()
        self.compiled, self.ahead = 0, set()

    def add(self, key, step):
        self.compiled += 1
        super().add(key, step)

    def start(self, key, compile_step):
        def compile_and_count():
            self.compiled += 1
            return compile_step()

        self.ahead.add(key)
        super().start(key, compile_and_count)


def test_a_step_is_compiled_once_for_all_seeds_and_phases_ahead_or_not_with_the_same_bits():
    phases = [
        Phase("partial", 1, ("stage3", "head"), 1e-2),
        Phase("full", 2, ("*",), 1e-2),
        Phase("late", 1, ("stage3", "head"), 1e-2),  # the step of the first phase
    ]
    found = {}
    for ahead in (False, True):
        made = Counted()
        for seed in (0, 1):
            run = tiny.make_run(phases, encoder=ENCODER, data=DATA, optimizer=Optimizer(ema=0.9), seed=seed)
            found[ahead], _ = train(run, executables=made, compiles_ahead=ahead)
        assert (made.compiled, len(made)) == (2, 2)
        assert len(made.ahead) == (2 if ahead else 0)
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_is_compiled_for_each_mesh():
    made, state = Executables(), {"x": np.ones(2, np.float32)}
    one = make_mesh(jax.devices()[:1])
    other = Mesh(one.devices, one.axis_names[::-1], axis_types=one.axis_types)
    for mesh in (one, other, one):
        context(mesh=mesh, executables=made).compiled("step", lambda state: state, state)
    assert len(made) == 2


def test_a_step_that_cannot_be_compiled_ahead_is_compiled_when_it_is_needed():
    made = Executables()
    made.start("step", lambda: 1 / 0)
    assert made.find("step") is None
    made.add("step", "compiled")
    assert made.find("step") == "compiled"


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
    assert [row.cached for row in cached_rows] == [
        "filled",
        "reused" if augment.is_identity else "filled",
        "filled",
    ]
    np.testing.assert_allclose(curve(rows), curve(cached_rows), rtol=1e-5)
    a, b = (np.concatenate([np.ravel(leaf) for leaf in leaves]) for leaves in (plain, cached))
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
    assert sum(row.steps for row in rows) >= 160


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_features_are_dropped_before_the_head_of_a_network_that_draws_nowhere_else(cache):
    found = []
    for rate in (0.0, 0.9):
        run = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA, cache=cache)
        _, rows = train(dataclasses.replace(run, model=dataclasses.replace(run.model, dropout=rate)))
        found.append(curve(rows))
    assert found[1][0] > found[0][0] + 0.01  # what is kept is scaled up, and noisy


def test_a_cached_phase_costs_its_suffix_and_one_pass_over_the_images():
    run = tiny.make_run(
        [Phase("head", 50, ("head",), 1e-2, augment=False)], encoder=ENCODER, data=DATA, cache="auto"
    )
    _, (row,) = train(run)
    plain = dataclasses.replace(run, caching=Caching("off"))
    _, (uncached,) = train(plain)
    head = 2 * 2 * 8 * 3
    assert uncached.model_flops - row.model_flops == (uncached.images - len(DATA)) * (
        uncached.model_flops // uncached.images - head
    )


def test_activations_are_shared_by_runs_that_agree_and_by_no_others():
    cache = ActivationCache(1 << 28)
    run = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA, cache="auto")
    _, first = train(run, cache=cache)
    other_seed = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA, cache="auto", seed=5)
    _, second = train(other_seed, cache=cache)
    other_data = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=tiny.dataset(seed=9), cache="auto")
    _, third = train(other_data, cache=cache)
    assert [rows[0].cached for rows in (first, second, third)] == ["filled", "reused", "filled"]
    assert second[0].model_flops + second[0].reused_flops == first[0].model_flops


class KilledError(BaseException):
    pass


class Killer(Heartbeat):
    """Ends a run, as a kill would, when it says that a step is done: the step before is the last that is saved."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def at(self, at, row):
        if at["step"] >= self.step:
            raise KilledError


class KillingLedger(Ledger):
    """Ends a run, as a kill would, behind one of its entries."""

    def __init__(self, path, number):
        super().__init__(path)
        self.left = number

    def put(self, row):
        super().put(row)
        self.left -= 1
        if not self.left:
            raise KilledError


SAVE_ALWAYS = {"every_s": 0.0, "sync_every_s": 0.0}
COUNTED = ("steps", "images", "model_flops", "hardware_flops", "cached", "reused_flops", "curve")


def counts(rows):
    return [{name: getattr(row, name) for name in COUNTED} for row in rows]


KILLS = {"off": ((3, 8, 9, 13, 22), (1, 3)), "auto": ((4, 9, 12), (1, 2, 3, 6))}
"""By cache: steps, and entries of the ledger, behind which a run is killed."""


@pytest.mark.parametrize(
    ("cache", "step", "entry"),
    [(cache, step, 0) for cache, (steps, _) in KILLS.items() for step in steps]
    + [(cache, 0, entry) for cache, (_, entries) in KILLS.items() for entry in entries],
)
def test_a_run_killed_anywhere_and_resumed_ends_with_the_same_bits_and_counts(tmp_path, cache, step, entry):
    optimizer = Optimizer("adamw", weight_decay=0.01, clip=1.0, ema=0.9)
    phases = [
        tiny.HEAD,
        Phase("partial", 2, ("stage3", "head"), 1e-2, schedule="plateau"),
        Phase("full", 2, ("*",), 1e-2, batch_norm="train", schedule="cosine"),
    ]

    augment = Augment("horizontal", 0.1)
    run = tiny.make_run(phases, encoder=ENCODER, data=DATA, augment=augment, optimizer=optimizer, cache=cache)
    quiet, quiet_rows = train(run, tmp_path / "quiet", **SAVE_ALWAYS)
    folder = tmp_path / "killed"
    killer = (
        {"ledger": KillingLedger(folder / "ledger.jsonl", entry)} if entry else {"heartbeat": Killer(step)}
    )
    with pytest.raises(KilledError):
        train(run, folder, **SAVE_ALWAYS, **killer)
    resumed, rows = train(run, folder, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, resumed, strict=True))
    assert counts(rows) == counts(quiet_rows)


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_a_ledger_in_memory_has_the_costs_of_every_phase_after_a_restart(tmp_path, cache):
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, cache=cache)
    _, quiet = train(run)
    in_memory = {"checkpoint_dir": tmp_path, **SAVE_ALWAYS}
    for step in (3, run.timeline.first_step(1), run.timeline.first_step(1) + 2):
        with pytest.raises(KilledError):
            train(run, heartbeat=Killer(step), **in_memory)
    for _ in range(2):  # once to its end, and once more when it has ended
        _, rows = train(run, **in_memory)
        assert counts(rows) == counts(quiet)
        assert sum(row.model_flops for row in rows) == run.flops()


def test_a_run_that_stopped_inside_an_epoch_goes_on_there_with_activations_cached_since(tmp_path):
    phase = Phase("head", 4, ("head",), 1e-2, augment=False)
    runs = {mode: tiny.make_run([phase], encoder=ENCODER, data=DATA, cache=mode) for mode in ("off", "auto")}
    quiet, quiet_rows = train(runs["off"])
    with pytest.raises(KilledError):
        train(runs["off"], tmp_path, **SAVE_ALWAYS, heartbeat=Killer(7))
    assert max(saved_steps(tmp_path)) == 6  # of 4 in an epoch
    resumed, rows = train(runs["auto"], tmp_path)
    assert rows[0].steps == runs["auto"].timeline.steps
    np.testing.assert_allclose(curve(rows), curve(quiet_rows), rtol=1e-5)
    for one, other in zip(quiet, resumed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def saved_steps(folder):
    return {int(path.name) for path in (folder / "state").iterdir() if path.name.isdigit()}


def test_a_notice_to_another_process_at_the_end_of_a_phase_stops_this_one(tmp_path, monkeypatch):
    """The other process ends there: the next step would wait for it."""
    run = tiny.make_run([tiny.HEAD, tiny.FULL], encoder=ENCODER, data=DATA)
    wait, told = Checkpointer.wait, [0]
    monkeypatch.setattr(Checkpointer, "wait", lambda self: (wait(self), told.append(signal.SIGTERM)))
    monkeypatch.setattr(
        processes, "all_reduce_max", lambda *values: (max(values[0], *told), *map(int, values[1:]))
    )
    with pytest.raises(Stopped, match="SIGTERM"):
        train(run, tmp_path, **SAVE_ALWAYS)
    assert max(saved_steps(tmp_path)) == run.timeline.first_step(1)


def test_a_notice_that_comes_while_processes_agree_is_for_the_next_step(tmp_path, monkeypatch):
    """The others have not heard of it, and wait for this process in their next step."""
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    handler, agreed = PreemptionHandler(), []

    def agree(*values):
        if len(values) == 2:  # a signal, and whether a save is due
            agreed.append(values[0])
            handler.signal_received = signal.SIGTERM if len(agreed) > 1 else 0
        return tuple(map(int, values))

    monkeypatch.setattr(processes, "all_reduce_max", agree)
    with pytest.raises(Stopped, match="SIGTERM"):
        train(run, tmp_path, sync_every_s=0.0, preemption_handler=handler)
    assert agreed == [0, 0, signal.SIGTERM]
    assert saved_steps(tmp_path) == {3}


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA)
    quiet, _ = train(run, tmp_path, **SAVE_ALWAYS)
    for file in (tmp_path / "state" / str(max(saved_steps(tmp_path))) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    again, _ = train(run, tmp_path, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "_METADATA"),
        ValueError("RESOURCE_EXHAUSTED: Error opening file [OS error 24: EMFILE Too many open files]"),
        MemoryError(),
    ],
)
def test_a_checkpoint_that_is_out_of_reach_for_now_is_not_given_up(tmp_path, monkeypatch, error):
    run = tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA)
    quiet, _ = train(run, tmp_path, **SAVE_ALWAYS)
    before = saved_steps(tmp_path)
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise error

        patch.setattr(CheckpointFolder, "_item", fail)
        with pytest.raises(UserError, match=r"state/8: this checkpoint is out of reach \(.*\); expected one"):
            train(run, tmp_path, **SAVE_ALWAYS)
    assert saved_steps(tmp_path) == before
    again, _ = train(run, tmp_path, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))


def test_a_batch_that_does_not_divide_into_its_parts_is_one_line():
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA, batch_size=8, grad_accum_steps=3)
    with pytest.raises(
        UserError, match="batch_size 8 does not divide among 1 devices and there into 3 parts; 6"
    ):
        train(run, mesh=make_mesh(jax.devices()[:1]))


def test_the_checkpoints_of_another_run_are_refused_and_its_surroundings_may_change(tmp_path):
    """With those of earlier versions, which do not say what their run is, it goes on."""
    phase = Phase("full", 2, ("*",), 1e-2)
    options = {"encoder": ENCODER, "data": DATA, "augment": Augment("horizontal", 0.1)}
    run = tiny.make_run([phase], **options)
    quiet, _ = train(run, tmp_path, **SAVE_ALWAYS)
    renamed = dataclasses.replace(run, tag=RunTag("other"), caching=Caching("auto", 1 << 20))
    again, _ = train(renamed, tmp_path, mesh=make_mesh(jax.devices()[:1]))
    assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))
    relabelled = dataclasses.replace(DATA, labels=np.roll(DATA.labels, 1))
    for part, other in {
        "phases": tiny.make_run([dataclasses.replace(phase, lr=1e-3)], **options),
        "optimizer": dataclasses.replace(run, optimizer=Optimizer("sgd")),
        "loss": dataclasses.replace(run, loss=CrossEntropy(3, label_smoothing=0.1)),
        "plateau": dataclasses.replace(run, plateau=Plateau(patience=1)),
        "augmentation": dataclasses.replace(run, augment=Augment()),
        "batch size": dataclasses.replace(run, grad_accum_steps=2),
        "seed": dataclasses.replace(run, seed=1),
        "rows": tiny.make_run([phase], val=9, **options),
        "images": tiny.make_run(
            [phase], **{**options, "data": dataclasses.replace(tiny.dataset(seed=3), labels=DATA.labels)}
        ),
        "labels": tiny.make_run([phase], **{**options, "data": relabelled}),
    }.items():
        with pytest.raises(
            UserError, match=rf"state holds checkpoints of another run: other are its {part}; expected"
        ):
            train(other, tmp_path)
    with pytest.raises(UserError, match="of another run: other are its phases; expected"):  # with fewer steps
        train(tiny.make_run([dataclasses.replace(phase, epochs=1)], **options), tmp_path)
    for meta in (tmp_path / "state").glob("*/meta/metadata"):
        stored = json.loads(meta.read_text())
        assert stored.pop("run")
        meta.write_text(json.dumps(stored))
    train(dataclasses.replace(run, seed=1), tmp_path)


@pytest.mark.parametrize(("begun", "goes_on"), [("", "int8"), ("int8", ""), ("bfloat16", "int8")])
def test_a_run_does_not_go_on_with_activations_cached_in_another_dtype(tmp_path, begun, goes_on):
    """But where nothing is cached it does, since the dtype then changes nothing."""
    phase = Phase("partial", 4, ("stage3", "head"), 1e-2, augment=False)

    def run(dtype, mode="auto"):
        made = tiny.make_run([phase], encoder=ENCODER, data=DATA, cache=mode)
        return dataclasses.replace(made, caching=dataclasses.replace(made.caching, dtype=dtype))

    for mode in ("auto", "off"):
        with pytest.raises(KilledError):
            train(run(begun, mode), tmp_path / mode, **SAVE_ALWAYS, heartbeat=Killer(7))
    with pytest.raises(
        UserError, match="of another run: other are its dtype of cached activations; expected"
    ):
        train(run(goes_on), tmp_path / "auto")
    train(run(begun), tmp_path / "auto")
    train(run(goes_on, "off"), tmp_path / "off")


def test_a_checkpoint_of_an_earlier_version_with_another_state_of_the_optimizer_is_named_as_such(
    tmp_path, monkeypatch
):
    run, said = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA), []
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpointer,
            "saved_part",
            lambda *given: {**saved_part(*given), "opt_state": {"count": np.int32(0)}},
        )
        quiet, _ = train(run, tmp_path, **SAVE_ALWAYS)
    reporter = Reporter(1, quiet=True)
    reporter.say = said.append
    again, _ = train(run, tmp_path, reporter=reporter, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))
    assert len(said) == 2
    assert all("arrays have another layout, as those of an earlier version" in line for line in said)


def test_a_run_needs_nothing_but_itself_and_says_what_it_cost():
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, cache="auto")
    trained = loop.train(run, *run.model.init(1))
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves(trained))
    assert [point["epoch"] for point in trained.curve] == [0, 1, 2, 3]
    assert {"loss", "lr", "val_loss", "val_auc"} <= set(trained.curve[0])
    assert sum(row.model_flops for row in trained.costs) == run.flops()


class Looking(Classifier):
    """A classifier that notes the functions of the package that have called its suffix."""

    frames: ClassVar[list[str]] = []

    def suffix(self, *arguments):
        stack = traceback.extract_stack()
        self.frames[:] = [frame.name for frame in stack if "dapt_jax" in Path(frame.filename).parts]
        return super().suffix(*arguments)


def test_few_frames_lie_between_the_loop_and_the_gradient():
    run = tiny.make_run([tiny.FULL], encoder=ENCODER, data=DATA, val=0)
    run = dataclasses.replace(run, model=Looking(ENCODER, 3))
    loop.train(run, *run.model.init(1))
    # FLOPs are counted first; the last to ask is the gradient, while the step is traced to be compiled.
    below = Looking.frames[Looking.frames.index("train") :]
    assert below == ["train", "compile", "compiled", "jit_step", "train_step", "update", "loss_of"]


def test_a_non_finite_loss_stops_with_one_line():
    run = tiny.make_run(
        [Phase("full", 3, ("*",), 1e30)], encoder=ENCODER, data=DATA, optimizer=Optimizer("sgd")
    )
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
    shares = [
        list(pipeline.batches(DATA, order, 2, share=slice(2 * host, 2 * host + 2))) for host in range(4)
    ]
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


# ---- uncertain labels
# ---------------------------------------------------------------------------------------------


def uncertain_data():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, -1, np.nan], (len(DATA), 3), p=[0.3, 0.3, 0.3, 0.1]).astype(np.float32)
    return dataclasses.replace(DATA, labels=labels, uncertain=(0.55, 0.85))


def test_targets_of_uncertain_labels_are_new_in_every_epoch_and_the_same_from_a_cache():
    data = uncertain_data()
    objective = BinaryCrossEntropy(3, multi_label=True, uncertain=data.uncertain)
    phases = [tiny.PARTIAL, Phase("late", 3, ("head",), 1e-2)]
    curves = {}
    for mode in (
        "off",
        "auto",
    ):  # one by one from images; then from activations, one by one and many epochs at once
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


# ---- early stopping
# -----------------------------------------------------------------------------------------------


def stopping_run(epochs, val=12):
    phases = [tiny.HEAD, Phase("full", epochs, ("*",), 3e-2, batch_norm="train")]
    return tiny.make_run(phases, encoder=ENCODER, data=DATA, val=val, mix=Mix(mixup=0.5, cutmix=1.0))


def stop_early(folder, patience, **others):
    run = stopping_run(30)
    stop = EarlyStopping(patience, run, folder / "best.safetensors")
    params, batch_stats = run.model.init(1)
    trained = loop.train(run, params, batch_stats, context(folder, callbacks=(stop,), **others))
    best = stop.best_weights(trained.params, trained.batch_stats)
    return jax.tree.leaves(best), trained.costs, stop


def test_early_stopping_returns_the_weights_of_the_best_epoch(tmp_path):
    found, rows, stop = stop_early(tmp_path, 2)
    losses = [point["val_loss"] for point in rows[-1].curve]
    best = int(np.argmin(losses))
    assert len(losses) == best + 1 + 3 < 30  # three in a row were no better
    assert stop.stopped
    assert rows[-1].steps == len(losses) * stopping_run(30).timeline.steps_per_epoch
    assert rows[-1].images == len(losses) * (len(DATA) - 12)
    short, _ = train(stopping_run(best + 1))  # the same run, of as many epochs
    assert all(np.array_equal(a, b) for a, b in zip(found, short, strict=True))


def test_early_stopping_without_a_file_remembers_the_best_epoch():
    run = stopping_run(30)
    stop = EarlyStopping(2, run)
    trained = loop.train(run, *run.model.init(1), context(callbacks=(stop,)))
    best = stop.best_weights(trained.params, trained.batch_stats)
    short, _ = train(
        stopping_run(int(np.argmin([point["val_loss"] for point in trained.costs[-1].curve])) + 1)
    )
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(best), short, strict=True))


def test_the_best_weights_of_a_run_restarted_without_a_file_for_them_are_one_line(tmp_path):
    run = stopping_run(30)

    def start():
        stop = EarlyStopping(2, run)
        return stop, loop.train(run, *run.model.init(1), context(tmp_path, callbacks=(stop,), **SAVE_ALWAYS))

    stop, trained = start()
    assert stop.epoch < stop.done - 1
    stop.best_weights(trained.params, trained.batch_stats)
    restarted, trained = start()
    line = rf"weights of epoch {stop.epoch + 1}, the best of {stop.done}, were kept in memory.*expected EarlyStopping"
    with pytest.raises(UserError, match=line):
        restarted.best_weights(trained.params, trained.batch_stats)


def test_a_killed_run_stops_early_where_it_would_have(tmp_path):
    quiet, quiet_rows, _ = stop_early(tmp_path / "quiet", 2, **SAVE_ALWAYS)
    for step in (6, 15):
        with pytest.raises(KilledError):
            stop_early(tmp_path / "killed", 2, **SAVE_ALWAYS, heartbeat=Killer(step))
    for _ in range(2):  # once to its end, and once more when it has ended
        again, rows, _ = stop_early(tmp_path / "killed", 2, **SAVE_ALWAYS)
        assert all(np.array_equal(a, b) for a, b in zip(quiet, again, strict=True))
        assert [row.curve for row in rows] == [row.curve for row in quiet_rows]


# ---- callbacks
# ----------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Notes every epoch, and ends the run after some of them."""

    def __init__(self, until=99, name="watch"):
        self.until, self.seen, self._name = until, [], name

    @property
    def name(self):
        return self._name

    def after_epoch(self, phase, epoch, params, batch_stats, metrics):
        self.seen.append([phase, epoch, metrics["val_loss"], float(np.asarray(params["head"]["bias"]).sum())])
        return epoch + 1 >= self.until

    def state(self):
        return {"seen": list(self.seen)}

    def restore(self, state):
        self.seen = state["seen"]
        return len(self.seen) >= self.until


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_several_callbacks_see_every_epoch_and_each_may_end_the_run(cache):
    phases = [dataclasses.replace(tiny.HEAD, epochs=3), tiny.PARTIAL]
    run = tiny.make_run(phases, encoder=ENCODER, data=DATA, cache=cache)
    first, second, stop = Watch(), Watch(until=4, name="another"), EarlyStopping(9, run)
    trained = loop.train(run, *run.model.init(1), context(callbacks=(first, second, stop)))
    assert [each[:2] for each in first.seen] == [[0, 0], [0, 1], [0, 2], [1, 3]]
    assert [each[2] for each in first.seen] == [point["val_loss"] for point in trained.curve]
    assert first.seen == second.seen
    assert (
        len({each[3] for each in first.seen}) == 4
    )  # the parameters of each epoch, though a program may run many
    assert stop.done == 4
    _, rows = train(run)
    assert [point["loss"] for point in trained.curve] == curve(rows)[:4]


def test_the_state_of_every_callback_is_resumed_under_its_name(tmp_path):
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, cache="auto")

    def callbacks():
        return Watch(name="one"), Watch(until=3, name="other")

    quiet = callbacks()
    train(run, tmp_path / "quiet", callbacks=quiet, **SAVE_ALWAYS)
    with pytest.raises(KilledError):
        train(run, tmp_path / "killed", callbacks=callbacks(), heartbeat=Killer(10), **SAVE_ALWAYS)
    for _ in range(2):  # once to its end, and once more when it has ended
        resumed = callbacks()
        train(run, tmp_path / "killed", callbacks=resumed, **SAVE_ALWAYS)
        assert [each.seen for each in resumed] == [each.seen for each in quiet]
    with pytest.raises(UserError, match="2 callbacks are named 'watch'; expected each name once"):
        context(callbacks=(Watch(), Watch()))


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_run_is_one_line():
    rows, model = np.arange(32), tiny.make_run([tiny.HEAD], encoder=ENCODER, data=DATA).model
    lines = {
        "tiny: train_rows holds 40; expected rows from 0 to 39": lambda: TrainData(DATA, [3, 40]),
        "tiny: val_rows holds -1; expected rows from 0 to 39": lambda: TrainData(DATA, rows, [-1]),
        "tiny: no rows to train on": lambda: TrainData(DATA, []),
        "tiny: 2 weights for 32 training rows": lambda: TrainData(DATA, rows, weights=(1.0, 1.0)),
        "tiny: 2 clusters for 32 training rows": lambda: TrainData(DATA, rows, clusters=(0, 1)),
        "tiny: the weight of row 2 is 0.0; expected a positive number": lambda: TrainData(
            DATA, [3, 2], weights=(1.0, 0.0)
        ),
        r"tiny: train_rows is an array \[40\] of bool; expected numbers of rows": lambda: TrainData(
            DATA, DATA.labels == 1
        ),
        r"tiny: val_rows is an array \[1\] of float64; expected numbers of rows": lambda: TrainData(
            DATA, rows, [1.5]
        ),
        "2 phases are named 'head'": lambda: TrainingRun(
            model, (tiny.HEAD, tiny.HEAD), TrainData(DATA, rows), CrossEntropy(3)
        ),
        "batch_size is 0; expected 1 or more": lambda: TrainingRun(
            model, (tiny.HEAD,), TrainData(DATA, rows), CrossEntropy(3), batch_size=0
        ),
        "batch_norm_groups is 4, which does not divide the 6 images of a batch in each of 2 parts; 3 does": lambda: (
            tiny.make_run(
                [Phase("full", 1, ("*",), 1e-2, batch_norm="train")],
                encoder=ENCODER,
                data=DATA,
                batch_size=12,
                grad_accum_steps=2,
                batch_norm_groups=4,
            )
        ),
        "seed is -1; expected 0 to 4294967295": lambda: TrainingRun(
            model, (tiny.HEAD,), TrainData(DATA, rows), CrossEntropy(3), seed=-1
        ),
        "view_seed is 4294967296; expected -1 to 4294967295": lambda: TrainingRun(
            model, (tiny.HEAD,), TrainData(DATA, rows), CrossEntropy(3), view_seed=2**32
        ),
        "loss 'dice' takes all images of a batch together, but grad_accum_steps=2 computes it in parts; expected "
        "grad_accum_steps=1, or batchwise=False": lambda: TrainingRun(
            model, (tiny.HEAD,), TrainData(DATA, rows), Dice(1, batchwise=True), grad_accum_steps=2
        ),
        "early_stopping_patience=2 watches the validation loss, but the run has no images to validate on": lambda: (
            EarlyStopping(2, stopping_run(1, val=0))
        ),
    }
    for line, make in lines.items():
        with pytest.raises(UserError, match=line):
            make()


@pytest.mark.parametrize("batch_size", [3, 8, 32])
def test_a_run_derives_its_steps_from_its_rows_and_its_batch_size(batch_size):
    run = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, batch_size=batch_size)
    assert run.steps_per_epoch == -(-32 // batch_size)
    assert [program.first_step for program in run.programs] == [0, 2 * run.steps_per_epoch]
    larger = dataclasses.replace(run, batch_size=2 * batch_size)
    assert larger.programs[1].first_step == 2 * larger.steps_per_epoch == 2 * -(-32 // (2 * batch_size))
