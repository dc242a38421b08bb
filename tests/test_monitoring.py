"""What a study tells of itself: heartbeat, metrics, trace; read from files alone, and as true after a restart."""

import importlib.util
import inspect
import json
import os
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapt_jax.errors import UserError
from dapt_jax.monitoring import heartbeat, metric_writer, status, writers
from dapt_jax.monitoring.heartbeat import STATUS, Heartbeat
from dapt_jax.monitoring.profiler import Profiler
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.records.ledger import Ledger, Row
from dapt_jax.study import study
from dapt_jax.training import loop
from tests import tiny
from tests.command import rows, run
from tests.test_training_loop import DATA, ENCODER, context


def epoch(number, loss=0.5, phase="head", stage="dapt", strategy="full"):
    return metric_writer.Epoch(
        strategy, 0, stage, phase, number, 4 * (number + 1), {"loss": loss, "lr": 1e-3}
    )


def told(folder, **changes):
    """A heartbeat of a study under way, with changes."""
    teller = Heartbeat(folder)
    teller.arms(["none seed 0"], "full seed 0", ["full seed 1"])
    teller.progress(3e12, 12e12, 90.0, "full seed 0  all epoch 2/4", 123.4)
    teller.at(
        {"phase": "all", "epoch": 2, "epochs": 4, "step": 17, "steps": 40},
        {"key": ["full", 0, "dapt", "all"], "model_flops": 5 * 10**11, "wall_s": 30.0, "energy_kwh": 0.25},
    )
    teller.close("running")
    path = folder / STATUS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return json.loads(path.read_text())["time"]


def test_the_status_says_how_far_what_now_and_at_what_cost(tmp_path):
    now = told(tmp_path)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.put(Row("full", 0, "dapt", "head", model_flops=10**12, wall_s=60.0, energy_kwh=0.5))
    ledger.put(
        Row("full", 0, "dapt", "all", model_flops=9 * 10**12, wall_s=9e9, energy_kwh=9.0)
    )  # of before a kill
    lines = status.lines(tmp_path, now + 1)
    assert f"running, process {os.getpid()}" in lines[0]
    assert "heard of 1 s ago" in lines[0]
    assert lines[1:5] == [
        "arms: 1 done, 1 running, 1 left", "  done: none seed 0", "  running: full seed 0", "  left: full seed 1"
    ]  # fmt: skip
    assert "full seed 0  all epoch 2/4, 123 images/s" in lines[5]
    assert "phase all, epoch 2 of 4, step 17 of 40 of the run" in lines[6]
    assert lines[7] == "progress: 3 of 12 TFLOP (25%), about 90 s left"
    assert lines[8] == "cost so far: 1.5 TFLOP, 90 s, 0.75 kWh"


@pytest.mark.parametrize(
    ("changes", "later", "words"),
    [
        ({"host": "elsewhere"}, 400.0, "no sign of life for 6 min"),
        ({"host": "elsewhere"}, 5.0, "running"),
        ({"pid": 2**22 + 1}, 1.0, "no sign of life for 1 s"),  # of this host, where no such process is
        ({"state": "stopped"}, 500.0, "stopped 8 min ago; the same command goes on"),
        ({"state": "done"}, 9000.0, "done, 2 h 30 min ago"),
    ],
)
def test_a_heartbeat_that_is_old_says_so(tmp_path, changes, later, words):
    assert words in status.lines(tmp_path, told(tmp_path, **changes) + later)[0]


@pytest.mark.parametrize("changes", [{"state": "stopped"}, {"state": "failed"}, {"pid": 2**22 + 1}])
def test_a_study_that_ended_has_nothing_running(tmp_path, changes):
    text = "\n".join(status.lines(tmp_path, told(tmp_path, **changes) + 1))
    assert "running" not in text
    assert "now:" not in text
    assert "about 90 s left at the speed that it had" in text


@pytest.mark.parametrize("batch_size", [5, 8, 64])
def test_the_bar_reaches_what_was_planned_and_no_more(batch_size):
    """Batches that rows do not fill: 13 rows in batches of 16 once stood at 123%."""
    run = tiny.make_run(
        [tiny.HEAD, tiny.FULL], encoder=tiny.encoder(), data=tiny.dataset(), batch_size=batch_size
    )
    assert run.flops_until(run.timeline.steps) == pytest.approx(run.flops())
    reporter = Reporter(run.flops(), quiet=True)
    reporter.advance(run.flops_until(run.timeline.steps), "both phases")
    reporter.reach(run.flops())
    assert reporter.done == pytest.approx(reporter.total)


def test_what_was_spared_counts_as_done_and_not_as_speed():
    reporter = Reporter(100, quiet=True)
    reporter.advance(30, "a prefix that another arm computed")
    reporter.reach(50)
    assert (reporter.done, reporter.skipped) == (50, 20)
    reporter.reach(40)
    assert reporter.done == 50


def test_a_status_of_nothing_is_one_line(tmp_path, capsys):
    assert run("--config.mode=status", f"--workdir={tmp_path}") == 2
    assert "no such file; expected the --workdir of a study" in capsys.readouterr().err
    assert run("--config.mode=status") == 2
    (tmp_path / STATUS).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        status.lines(tmp_path, 0.0)


def test_the_heart_beats_while_the_study_is_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    teller = Heartbeat(tmp_path)
    first = json.loads((tmp_path / STATUS).read_text())["time"]
    deadline = time.monotonic() + 10
    while json.loads((tmp_path / STATUS).read_text())["time"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    teller.close("done")
    assert json.loads((tmp_path / STATUS).read_text())["state"] == "done"


def test_a_heartbeat_that_cannot_be_written_is_told_of_once_and_ends_nothing(tmp_path, monkeypatch):
    said = []

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat.atomic_files, "write_text", full)
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    teller = Heartbeat(tmp_path, say=said.append)
    time.sleep(0.1)
    teller.close("done")
    assert said == ["the heartbeat cannot be written (No space left on device): the study goes on without"]


def test_an_epoch_that_a_restart_runs_again_replaces_its_line_and_those_after_it(tmp_path):
    path = tmp_path / writers.METRICS
    first = writers.Jsonl(path)
    for number in range(4):
        first.epoch(epoch(number))
    first.epoch(epoch(0, phase="cells/finetune/fold0/head", stage="transfer"))
    with path.open("a") as file:
        file.write('{"strategy": "full", "se')  # torn by a kill
    second = writers.Jsonl(path)
    second.epoch(epoch(2, loss=0.25, phase="all"))
    second.epoch(epoch(3, loss=0.125, phase="all"))
    assert [(row["phase"], row["epoch"], row["loss"]) for row in rows(path)] == [
        ("head", 0, 0.5), ("head", 1, 0.5), ("cells/finetune/fold0/head", 0, 0.5), ("all", 2, 0.25), ("all", 3, 0.125),
    ]  # fmt: skip


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / writers.METRICS
    writer = writers.Jsonl(path)
    writer.epoch(epoch(0))

    def cut(value):
        with path.open("a") as other:
            other.write('{"torn')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.json, "dumps", cut)
    with pytest.raises(OSError, match="No space"):
        writer.epoch(epoch(1))
    monkeypatch.undo()
    writer.epoch(epoch(2))
    assert [row["epoch"] for row in rows(path)] == [0, 2]


def test_every_epoch_of_a_run_is_in_the_metrics_with_its_speed(tmp_path):
    heartbeat = Heartbeat(tmp_path, [writers.Jsonl(tmp_path / writers.METRICS)])
    used = context(tmp_path, heartbeat=heartbeat)
    made = tiny.make_run([tiny.HEAD, tiny.PARTIAL], encoder=ENCODER, data=DATA, cache="auto")
    loop.train(made, *made.model.init(1), used)
    used.heartbeat.close("done")
    found = rows(tmp_path / writers.METRICS)
    curves = [(row.phase, point) for row in used.ledger.rows() for point in row.curve]
    assert [(row["phase"], row["epoch"]) for row in found] == [
        (phase, point["epoch"]) for phase, point in curves
    ]
    for row, (_, point) in zip(found, curves, strict=True):
        assert {key: row[key] for key in point} == point
        assert row["images_per_s"] > 0
        assert row["step"] == (row["epoch"] + 1) * made.timeline.steps_per_epoch
    shown = json.loads((tmp_path / STATUS).read_text())
    assert shown["at"] == {"phase": "partial", "epoch": 2, "epochs": 2, "step": 16, "steps": 16}
    planned = sum(row.model_flops for row in used.ledger.rows() if row.phase == "partial")
    padded = planned * 1.0  # 32 rows in batches of 8: no example is only there to fill up
    assert shown["row"]["model_flops"] == pytest.approx(padded, rel=1e-6)


def events(folder):
    """Tags and values in the event files of a folder: TFRecords of length, checksum, proto, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.rglob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, round(value.simple_value, 6)) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_gets_a_folder_per_arm(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = writers.tensorboard_writer(tmp_path)
    writer.epoch(epoch(0))
    writer.epoch(epoch(1, loss=0.25))
    writer.epoch(epoch(0, phase="cells/finetune/fold0/head", stage="transfer", strategy="none"))
    writer.close()
    assert events(tmp_path / "full-seed0") == [
        ("loss", 4, 0.5), ("lr", 4, 0.001), ("loss", 8, 0.25), ("lr", 8, 0.001)
    ]  # fmt: skip
    assert events(tmp_path / "none-seed0" / "cells" / "finetune" / "fold0") == [
        ("loss", 4, 0.5),
        ("lr", 4, 0.001),
    ]


class Recorder(metric_writer.ScalarWriter):
    """Records what is written."""

    def __init__(self, run):
        self.run, self.written, self.closed = run, [], 0

    def write_scalars(self, step, scalars):
        self.written.append((step, dict(scalars)))

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("per_arm", [False, True])
def test_a_metric_writer_is_opened_per_run_or_per_arm_and_closed_when_another_arm_begins(per_arm):
    opened = []
    writer = metric_writer.PerRun(lambda first: opened.append(Recorder(first.run)) or opened[-1], per_arm)
    writer.epoch(epoch(0))
    writer.epoch(epoch(0, phase="cells/finetune/fold0/head", stage="transfer"))
    assert [each.closed for each in opened] == [0] * (1 if per_arm else 2)
    writer.epoch(epoch(0, strategy="none"))
    writer.close()
    assert [each.closed for each in opened] == [1] * (2 if per_arm else 3)
    prefix = "cells/finetune/fold0/" if per_arm else ""
    written = [each for recorder in opened for each in recorder.written]
    assert written[1] == (4, {f"{prefix}loss": 0.5, f"{prefix}lr": 1e-3})


def test_writers_have_the_methods_of_clu_s_metric_writer():
    spec = importlib.util.find_spec("clu")
    path = Path(spec.submodule_search_locations[0]) / "metric_writers" / "interface.py"
    loaded = importlib.util.spec_from_file_location(
        "clu_interface", path
    )  # the package itself imports TensorFlow
    interface = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(interface)
    for name in interface.MetricWriter.__abstractmethods__:
        theirs = inspect.signature(getattr(interface.MetricWriter, name)).parameters
        ours = inspect.signature(getattr(metric_writer.ScalarWriter, name)).parameters
        assert [(each.name, each.kind) for each in theirs.values()] == [
            (each.name, each.kind) for each in ours.values()
        ]
    called = {name for name in vars(metric_writer.MetricWriter) if not name.startswith("_")}
    assert called <= interface.MetricWriter.__abstractmethods__


def test_clu_s_own_writer_can_be_plugged_in(tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    pytest.importorskip("tensorboard")  # which clu imports, too
    from clu import metric_writers

    teller = Heartbeat(
        tmp_path,
        [metric_writer.PerRun(lambda first: metric_writers.SummaryWriter(str(tmp_path / first.run)))],
    )
    teller.epoch(epoch(0))
    teller.close("done")
    (path,) = (tmp_path / "full-seed0").glob("events*")
    found = [
        value
        for each in tensorflow.compat.v1.train.summary_iterator(str(path))
        for value in each.summary.value
    ]
    assert {value.tag for value in found} == {"loss", "lr"}


def test_arms_that_lost_the_competition_for_a_budget_are_not_left_to_run(tmp_path):
    def arm(name, seed, phases=("all",)):
        return SimpleNamespace(
            name=name, seed=seed, title=f"{name} seed {seed}", strategy=SimpleNamespace(phases=phases)
        )

    arms = [
        arm(name, seed, phases) for seed in (0, 1) for name, phases in (("none", ()), ("a", "p"), ("b", "p"))
    ]
    none_0, _, b_0, none_1, a_1, _ = arms
    (tmp_path / "config.json").write_text("{}")
    found = study.Results(tmp_path, {})
    for budget, left in (
        (0.5, ["none seed 1", "a seed 1", "b seed 1"]),
        (0.0, ["a seed 0", "none seed 1", "a seed 1", "b seed 1"]),
    ):
        made = SimpleNamespace(arms=arms, settings=SimpleNamespace(compute_budget=budget))
        found.finished = {("none", 0)}
        assert found.progress(made, b_0) == (["none seed 0"], "b seed 0", left)
    made.settings.compute_budget = 0.5
    found.finished = {(each.name, each.seed) for each in (none_0, b_0, none_1, a_1)}
    assert found.progress(made)[1:] == ("", [])


def test_prometheus_gets_a_file_it_can_parse(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    told(tmp_path)
    writer = writers.Prometheus(tmp_path / "study.prom", "wbc")
    writer.epoch(epoch(0))
    writer.beat(json.loads((tmp_path / STATUS).read_text()))
    families = parser.text_string_to_metric_families((tmp_path / "study.prom").read_text())
    found = {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}
    assert found["dapt_jax_up"] == ({"study": "wbc"}, 1.0)
    assert found["dapt_jax_flops_done"][1] / found["dapt_jax_flops_planned"][1] == 0.25
    assert found["dapt_jax_arms_left"][1] == 2
    assert found["dapt_jax_loss"] == ({"study": "wbc", "arm": "full-seed0"}, 0.5)
    teller = Heartbeat(tmp_path, [writer])
    teller.arms(["none seed 0", "full seed 0"], "", [])
    teller.close("done")
    assert 'dapt_jax_arms_left{study="wbc"} 0.0' in (tmp_path / "study.prom").read_text()
    assert found["dapt_jax_row_energy_joules"][1] == pytest.approx(0.25 * 3.6e6)
    with pytest.raises(UserError, match=r"NAME\.prom"):
        writers.Prometheus(tmp_path / "study.txt", "wbc")


class Wandb:
    """Records what is asked of the package."""

    def __init__(self):
        self.runs = []

    Settings = SimpleNamespace

    def init(self, **settings):
        run = SimpleNamespace(settings=settings, logged=[], steps={}, finished=0)
        run.log = run.logged.append
        run.define_metric = lambda name, step_metric="": run.steps.update({name: step_metric})
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        self.runs.append(run)
        return run


def test_weights_and_biases_get_a_run_per_arm_that_a_restart_goes_on_with(tmp_path, monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    writer = writers.wandb_writer("cells", tmp_path / "study", "wbc")
    writer.epoch(epoch(0))
    writer.epoch(epoch(0, phase="cells/finetune/fold0/head", stage="transfer"))
    writer.epoch(epoch(0, strategy="none"))
    writer.close()
    first, second = package.runs
    assert (first.settings["project"], first.settings["group"]) == ("cells", "wbc")
    assert (first.settings["id"], first.settings["resume"]) == ("study-full-seed0", "allow")
    assert second.settings["id"] == "study-none-seed0"
    assert first.logged[0] == {"step": 4, "loss": 0.5, "lr": 1e-3}
    assert first.logged[1]["cells/finetune/fold0/loss"] == 0.5
    assert first.steps["cells/finetune/fold0/loss"] == "cells/finetune/fold0/step"
    assert (first.finished, second.finished) == (1, 1)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = writers.wandb_writer("cells", tmp_path, "wbc")
    writer.epoch(epoch(0))
    writer.close()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"full-seed0" in written.read_bytes()


@pytest.mark.parametrize(
    ("extra", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("prometheus", "")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, extra, module):
    value = {"tensorboard": True, "wandb": "cells", "prometheus": str(tmp_path / "a.prom")}[extra]
    monkeypatch.setitem(sys.modules, module or "prometheus_client", None)
    with pytest.raises(UserError, match=rf"needs the package .*dapt_jax\[{extra}\]"):
        writers.open_writers(tmp_path, "wbc", **{extra: value})


def test_a_trace_of_some_steps_is_left_where_it_was_asked_for(tmp_path):
    traced = []

    class Noted(Profiler):
        def before(self, step, state):
            super().before(step, state)
            traced.extend([step] if self._until else [])

    used = context(profiler=Noted(tmp_path / "profile", step=3, steps=2))
    made = tiny.make_run([tiny.PARTIAL], encoder=ENCODER, data=DATA)
    loop.train(made, *made.model.init(1), used)
    assert traced == [3, 4]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
