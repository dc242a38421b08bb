"""Where the metrics of an epoch go: JSON lines always; TensorBoard, Weights & Biases and Prometheus where asked for."""

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dapt_jax.errors import UserError
from dapt_jax.runtime import atomic_files

METRICS = "metrics.jsonl"
"""Name of the file of metrics in a workdir."""

TENSORBOARD = "tensorboard"
"""Name of the folder of event files in a workdir."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What an epoch of a run showed.

    Attributes:
        strategy: of the arm.
        seed: of the arm.
        stage: of the ledger, "dapt" or "transfer".
        phase: as in the ledger, with the run's label before the name.
        epoch: of the run, from 0.
        step: optimizer steps of the run by its end.
        values: loss, lr, images_per_s, and scores of watched rows where there are any.
    """

    strategy: str
    seed: int
    stage: str
    phase: str
    epoch: int
    step: int
    values: Mapping[str, float]

    @property
    def arm(self) -> str:
        """Whose epoch it is."""
        return f"{self.strategy}-seed{self.seed}"

    @property
    def prefix(self) -> str:
        """Of its values' names where one arm has several runs: empty for its adaptation, else `TASK/finetune/foldN/`."""
        label, slash, _ = self.phase.rpartition("/")
        return label + slash


class Writer(Protocol):
    """A place for metrics."""

    def epoch(self, epoch: Epoch) -> None:
        """Takes in an epoch that is done; one that a restart runs again replaces itself."""
        ...

    def beat(self, status: Mapping[str, Any]) -> None:
        """Takes in how far the study is, every few seconds and from another thread: see `heartbeat.Heartbeat`."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


def open_writers(
    workdir: Path, name: str, *, tensorboard: bool = False, wandb: str = "", prometheus: str = ""
) -> list[Writer]:
    """Return the writers that are asked for, the JSON lines first.

    Args:
        workdir: Folder of the study.
        name: Name of the study.
        tensorboard: Whether TensorBoard event files are written.
        wandb: Weights & Biases project; empty for none.
        prometheus: Folder of node_exporter's textfile collector; empty for none.

    Raises:
        UserError: A package is missing; names the extra that brings it.
    """
    writers: list[Writer] = [Jsonl(workdir / METRICS)]
    if tensorboard:
        writers.append(TensorBoard(workdir / TENSORBOARD))
    if wandb:
        writers.append(WeightsAndBiases(wandb, workdir, name))
    if prometheus:
        writers.append(Prometheus(Path(prometheus), name))
    return writers


def _package(module: str, extra: str) -> Any:
    """An optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"config.monitoring.{extra} needs the package {module}; expected pip install 'dapt_jax[{extra}]', "
            f"or another value for --config.monitoring.{extra}"
        ) from error


class Jsonl:
    """`metrics.jsonl`: a line per epoch, appended; what a restart runs again replaces its lines and those after it."""

    def __init__(self, path: Path):
        """Reads and writes nothing yet."""
        self._path = path

    @functools.cached_property
    def _last(self) -> dict[tuple[Any, ...], int]:
        """The last epoch of every run that the file has; a last line that a kill has torn is dropped."""
        text = self._path.read_text() if self._path.exists() else ""
        whole, newline, torn = text.rpartition("\n")
        if torn:
            atomic_files.write_text(self._path, whole + newline)
        return {_run_of(row): int(row["epoch"]) for row in atomic_files.read(self._path)}

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`."""
        row = {**{field: getattr(epoch, field) for field in _KEYS}, **epoch.values}
        run = _run_of(row)
        if epoch.epoch <= self._last.get(run, -1):
            kept = [old for old in atomic_files.read(self._path) if _run_of(old) != run or old["epoch"] < epoch.epoch]
            atomic_files.write(self._path, kept)
        self._last[run] = epoch.epoch
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            os.truncate(self._path, before)  # a full disk leaves no half line for the next one to be added to
            raise

    def beat(self, status: Mapping[str, Any]) -> None:
        """See `Writer`: metrics come by epoch alone."""

    def close(self) -> None:
        """See `Writer`: nothing is held back."""


_KEYS = ("strategy", "seed", "stage", "phase", "epoch", "step")


def _run_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which of a study's runs a line is of."""
    return row["strategy"], row["seed"], row["stage"], str(row["phase"]).rpartition("/")[0]


class TensorBoard:
    """Event files for TensorBoard by tensorboardX, which needs no TensorFlow: a folder per arm."""

    def __init__(self, folder: Path):
        """Opens nothing yet.

        Raises:
            UserError: the package is missing.
        """
        self._package, self._folder = _package("tensorboardX", "tensorboard"), folder
        self._open: dict[str, Any] = {}

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`."""
        name = f"{epoch.arm}/{epoch.prefix}".rstrip("/")
        if name not in self._open:  # what an earlier start has written from this step on is to be shown no more
            self._open[name] = self._package.SummaryWriter(str(self._folder / name), purge_step=epoch.step)
        for key, value in epoch.values.items():
            self._open[name].add_scalar(key, value, epoch.step)
        self._open[name].flush()

    def beat(self, status: Mapping[str, Any]) -> None:
        """See `Writer`: metrics come by epoch alone."""

    def close(self) -> None:
        """See `Writer`."""
        for writer in self._open.values():
            writer.close()


class WeightsAndBiases:
    """A Weights & Biases run per arm, all arms of a study in one group; `WANDB_MODE=offline` needs no account."""

    def __init__(self, project: str, workdir: Path, name: str):
        """Opens nothing yet.

        Args:
            project: name of the project there.
            workdir: where its files go; its name tells runs of different workdirs apart.
            name: of the study: the group.

        Raises:
            UserError: the package is missing.
        """
        self._package = _package("wandb", "wandb")
        self._project, self._workdir, self._name = project, workdir, name
        self._arm, self._run = "", None
        self._known: set[str] = set()

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`."""
        if epoch.arm != self._arm:
            self.close()
            self._arm, self._known = epoch.arm, set()
            self._run = self._package.init(
                project=self._project,
                group=self._name,
                name=epoch.arm,
                id=f"{self._workdir.resolve().name}-{epoch.arm}",
                resume="allow",
                dir=str(self._workdir),
                config={"strategy": epoch.strategy, "seed": epoch.seed},
                settings=self._package.Settings(silent=True),
            )
        step = f"{epoch.prefix}step"
        run: Any = self._run
        if step not in self._known:  # runs of one arm count their steps each from 0
            self._known.add(step)
            run.define_metric(step)
            for key in epoch.values:
                run.define_metric(f"{epoch.prefix}{key}", step_metric=step)
        run.log({step: epoch.step, **{f"{epoch.prefix}{key}": value for key, value in epoch.values.items()}})

    def beat(self, status: Mapping[str, Any]) -> None:
        """See `Writer`: metrics come by epoch alone."""

    def close(self) -> None:
        """See `Writer`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Prometheus:
    """A file for the textfile collector of Prometheus' node_exporter: how far, how fast, at what cost."""

    def __init__(self, path: Path, name: str):
        """Writes nothing yet.

        Args:
            path: of the file, which the collector wants to end in `.prom`.
            name: of the study: a label.

        Raises:
            UserError: the package is missing, or the path is none that the collector reads.
        """
        if path.suffix != ".prom" or not path.parent.is_dir():
            raise UserError(
                f"config.monitoring.prometheus is {str(path)!r}; expected a file NAME.prom in a folder that exists, the one of "
                "node_exporter's --collector.textfile.directory"
            )
        self._package, self._path, self._name = _package("prometheus_client", "prometheus"), path, name
        self._epoch: Epoch | None = None

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`: shown with the next beat."""
        self._epoch = epoch

    def beat(self, status: Mapping[str, Any]) -> None:
        """See `Writer`; the file changes in one atomic step."""
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
        gauge("arms_left", "Strategies x seeds to come, the running one included", len(status["arms"]["left"]) + 1)
        gauge("images_per_second", "Speed of training now", status["images_per_s"])
        gauge("row_energy_joules", "Energy of the phase under way", status["row"].get("energy_kwh", 0.0) * 3.6e6)
        if self._epoch is not None:
            gauge("loss", "Training loss of the last epoch", self._epoch.values.get("loss"), arm=self._epoch.arm)
        self._package.write_to_textfile(str(self._path), registry)

    def close(self) -> None:
        """See `Writer`: the last beat has been written."""
