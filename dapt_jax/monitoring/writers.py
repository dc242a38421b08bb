"""Writers of an epoch's metrics: always JSON lines; optionally TensorBoard, Weights & Biases, Prometheus."""

import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dapt_jax.errors import UserError
from dapt_jax.monitoring.metric_writer import Epoch, PerRun, ScalarWriter, Writer
from dapt_jax.runtime import atomic_files, home

if TYPE_CHECKING:
    import wandb

METRICS = "metrics.jsonl"
"""Name of the file of metrics in a workdir."""

TENSORBOARD = "tensorboard"
"""Name of the folder of event files in a workdir."""


def open_writers(
    workdir: Path, name: str, *, tensorboard: bool = False, wandb: str = "", prometheus: str = ""
) -> list[Writer]:
    """Return the requested writers, the JSON lines first.

    Args:
        workdir: Folder of the study.
        name: Name of the study.
        tensorboard: Whether TensorBoard event files are written.
        wandb: Weights & Biases project; empty for none.
        prometheus: File NAME.prom in the folder of node_exporter's textfile collector; empty for none.

    Raises:
        UserError: A package is missing; names the extra that installs it.
    """
    writers: list[Writer] = [Jsonl(workdir / METRICS)]
    if tensorboard:
        writers.append(tensorboard_writer(workdir / TENSORBOARD))
    if wandb:
        writers.append(wandb_writer(wandb, workdir, name))
    if prometheus:
        writers.append(Prometheus(home.expanded(prometheus), name))
    return writers


def _package(module: str, extra: str) -> Any:
    """Return an optional package.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.monitoring.{extra} needs the package {module}; "
            f"expected pip install 'dapt_jax[{extra}]', "
            f"or another value for --config.monitoring.{extra}"
        ) from error


class Jsonl:
    """`metrics.jsonl`: one line per epoch, appended.

    An epoch that a restart repeats replaces its line and those after it.
    """

    def __init__(self, path: Path):
        """Start without reading or writing."""
        self._path = path

    @functools.cached_property
    def _last(self) -> dict[tuple[Any, ...], int]:
        """Return the last epoch of every run in the file; a last line truncated by a kill is dropped."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole, newline, torn = text.rpartition("\n")
        if torn:
            atomic_files.write_text(self._path, whole + newline)
        return {_run_of(row): int(row["epoch"]) for row in atomic_files.read(self._path)}

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`."""
        row = {**{field: getattr(epoch, field) for field in _KEYS}, **epoch.values}
        run = _run_of(row)
        if epoch.epoch <= self._last.get(run, -1):
            kept = [
                old
                for old in atomic_files.read(self._path)
                if _run_of(old) != run or old["epoch"] < epoch.epoch
            ]
            atomic_files.write(self._path, kept)
        self._last[run] = epoch.epoch
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            os.truncate(self._path, before)  # so that no line is appended to one that a full disk cut off
            raise

    def beat(self, status: Mapping[str, Any]) -> None:
        """Do nothing: metrics are written by epoch only."""

    def close(self) -> None:
        """Do nothing: lines are not buffered."""


_KEYS = ("strategy", "seed", "stage", "phase", "epoch", "step")


def _run_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the key of the run that a line belongs to."""
    return row["strategy"], row["seed"], row["stage"], str(row["phase"]).rpartition("/")[0]


class TensorBoardWriter(ScalarWriter):
    """TensorBoard event files, written with tensorboardX, which does not need TensorFlow."""

    def __init__(self, package: ModuleType, folder: Path, purge_step: int):
        """Open a folder; events of an earlier start from `purge_step` on are hidden."""
        self._writer = package.SummaryWriter(str(folder), purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers of a step, by name."""
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts of a step, by name."""
        for key, value in texts.items():
            self._writer.add_text(key, value, step)

    def flush(self) -> None:
        """Write out buffered values."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and close the files."""
        self._writer.close()


def tensorboard_writer(folder: Path) -> PerRun:
    """Return a writer of event files, one folder per run.

    Raises:
        UserError: The package tensorboardX is missing.
    """
    package = _package("tensorboardX", "tensorboard")
    return PerRun(lambda epoch: TensorBoardWriter(package, folder / epoch.run, epoch.step))


class WandbWriter(ScalarWriter):
    """A Weights & Biases run; scalars of each prefix have a separate step axis, since each counts from 0."""

    def __init__(self, run: "wandb.Run"):
        """Write to an open run."""
        self._run = run
        self._known: set[str] = set()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers of a step, by name."""
        for name in scalars:
            if name not in self._known:
                self._known.add(name)
                self._run.define_metric(_step_of(name))
                self._run.define_metric(name, step_metric=_step_of(name))
        self._run.log({**{_step_of(name): step for name in scalars}, **scalars})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Write hyper-parameters to the run's config."""
        self._run.config.update(dict(hparams))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _step_of(name: str) -> str:
    """Return the name of the step axis of a scalar."""
    prefix, slash, _ = name.rpartition("/")
    return f"{prefix}{slash}step"


def wandb_writer(project: str, workdir: Path, name: str) -> PerRun:
    """Return a writer with one Weights & Biases run per arm, all arms in one group.

    `WANDB_MODE=offline` needs no account.

    Args:
        project: Name of the Weights & Biases project.
        workdir: Folder of its files; its name distinguishes runs of different workdirs.
        name: Name of the study, used for the group.

    Raises:
        UserError: The package is missing.
    """
    package = _package("wandb", "wandb")

    def open_arm(epoch: Epoch) -> WandbWriter:
        run = package.init(
            project=project,
            group=name,
            name=epoch.arm,
            id=f"{workdir.resolve().name}-{epoch.arm}",
            resume="allow",
            dir=str(workdir),
            config={"strategy": epoch.strategy, "seed": epoch.seed},
            settings=package.Settings(silent=True),
        )
        return WandbWriter(run)

    return PerRun(open_arm, per_arm=True)


class Prometheus:
    """File for the textfile collector of Prometheus' node_exporter: progress, speed and cost."""

    def __init__(self, path: Path, name: str):
        """Start without writing.

        Args:
            path: Path of the file, which must end in `.prom`.
            name: Name of the study, used as a label.

        Raises:
            UserError: The package is missing, or the collector would not read the path.
        """
        if path.suffix != ".prom" or not path.parent.is_dir():
            raise UserError(
                f"config.monitoring.prometheus is {str(path)!r}; expected a file NAME.prom in a folder "
                "that exists, the one of node_exporter's --collector.textfile.directory"
            )
        self._package, self._path, self._name = _package("prometheus_client", "prometheus"), path, name
        self._epoch: Epoch | None = None

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`: shown with the next heartbeat."""
        self._epoch = epoch

    def beat(self, status: Mapping[str, Any]) -> None:
        """See `Writer`; the file is replaced atomically."""
        registry = self._package.CollectorRegistry()

        def gauge(name: str, about: str, value: float | None, **labels: str) -> None:
            if value is not None:
                named = {"study": self._name, **labels}
                made = self._package.Gauge(f"dapt_jax_{name}", about, list(named), registry=registry)
                made.labels(**named).set(value)

        gauge("up", "1 while the study runs", float(status["state"] == "running"))
        gauge("heartbeat_timestamp_seconds", "When this was written", status["time"])
        gauge("flops_done", "Model FLOPs done, those of earlier starts included", status["flops"]["done"])
        gauge("flops_planned", "Model FLOPs of the whole study", status["flops"]["total"])
        gauge("left_seconds", "Expected time to the end", status["left_s"])
        gauge("arms_done", "Strategies x seeds that are done", len(status["arms"]["done"]))
        gauge(
            "arms_left",
            "Strategies x seeds to come, the running one included",
            len(status["arms"]["left"]) + bool(status["arms"]["running"]),
        )
        gauge("images_per_second", "Speed of training now", status["images_per_s"])
        gauge(
            "row_energy_joules", "Energy of the phase under way", status["row"].get("energy_kwh", 0.0) * 3.6e6
        )
        if self._epoch is not None:
            gauge(
                "loss", "Training loss of the last epoch", self._epoch.values.get("loss"), arm=self._epoch.arm
            )
        self._package.write_to_textfile(str(self._path), registry)

    def close(self) -> None:
        """Do nothing: the last heartbeat has been written."""
