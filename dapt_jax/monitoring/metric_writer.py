"""Writers of metrics: of a whole study, and of one run with the methods of `clu.metric_writers.MetricWriter`.

Any of clu's writers, which need TensorFlow, can write the metrics of a run:

    Heartbeat(workdir, [PerRun(lambda epoch: clu.metric_writers.create_default_writer(logs / epoch.run))])
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from absl import logging


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The metrics of an epoch of a run.

    Attributes:
        strategy: Strategy of the arm.
        seed: Seed of the arm.
        stage: Stage in the ledger, "dapt" or "transfer".
        phase: Phase as in the ledger, with the run's label before the name.
        epoch: Epoch of the run, from 0.
        step: Optimizer steps of the run by the epoch's end.
        values: Values by name: loss, lr, images_per_s, and scores of validation rows where there are any.
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
        """Name of the arm."""
        return f"{self.strategy}-seed{self.seed}"

    @property
    def prefix(self) -> str:
        """Prefix of the values' names where one arm has several runs.

        "" for its adaptation, else `TASK/finetune/foldN/`.
        """
        label, slash, _ = self.phase.rpartition("/")
        return label + slash

    @property
    def run(self) -> str:
        """Name of the run: the arm, and the prefix where there is one."""
        return f"{self.arm}/{self.prefix}".rstrip("/")


class Writer(Protocol):
    """Destination of the metrics and the status of a whole study."""

    def epoch(self, epoch: Epoch) -> None:
        """Write the metrics of a finished epoch; an epoch that a restart repeats replaces the earlier one."""
        ...

    def beat(self, status: Mapping[str, Any]) -> None:
        """Write the status of the study; called every few seconds from another thread: see `Heartbeat`."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


class MetricWriter(Protocol):
    """Destination of the metrics of one run: the subset in use of `clu.metric_writers.MetricWriter`."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers of a step, by name."""
        ...

    def flush(self) -> None:
        """Write out buffered values."""
        ...

    def close(self) -> None:
        """Close the writer and write out buffered values."""
        ...


class ScalarWriter:
    """Base class with the methods of `clu.metric_writers.MetricWriter` for writers that support only scalars.

    Other kinds of values are ignored with a warning, once per kind.
    """

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Warn that summaries are not written."""
        self._warn("summaries", step, values, metadata)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write numbers of a step, by name."""
        raise NotImplementedError

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Warn that images are not written."""
        self._warn("images", step, images)

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Warn that videos are not written."""
        self._warn("videos", step, videos)

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Warn that audios are not written."""
        self._warn("audios", step, audios, sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Warn that texts are not written, unless a writer overrides this."""
        self._warn("texts", step, texts)

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Warn that histograms are not written."""
        self._warn("histograms", step, arrays, num_buckets)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Warn that hyper-parameters are not written, unless a writer overrides this."""
        self._warn("hyper-parameters", hparams)

    def flush(self) -> None:
        """Do nothing: values are not buffered."""

    def close(self) -> None:
        """Do nothing: values are not buffered."""
        self.flush()

    def _warn(self, what: str, *given: Any) -> None:
        del given
        logging.log_first_n(logging.WARNING, "%s writes no %s", 1, type(self).__name__, what)


class PerRun:
    """A `Writer` that opens a `MetricWriter` for each run of a study, or for each of its arms."""

    def __init__(self, open_writer: Callable[[Epoch], MetricWriter], per_arm: bool = False):
        """Start with no writer open.

        Args:
            open_writer: Function from the first epoch of a run to its writer.
            per_arm: Whether the runs of an arm share a writer; the names of their scalars then have
                `Epoch.prefix`.
        """
        self._open_writer, self._per_arm = open_writer, per_arm
        self._arm, self._writers = "", dict[str, MetricWriter]()

    def epoch(self, epoch: Epoch) -> None:
        """See `Writer`; the writers of other arms are closed."""
        if epoch.arm != self._arm:
            self.close()
            self._arm = epoch.arm
        name = epoch.arm if self._per_arm else epoch.run
        if name not in self._writers:
            self._writers[name] = self._open_writer(epoch)
        prefix = epoch.prefix if self._per_arm else ""
        self._writers[name].write_scalars(
            epoch.step, {f"{prefix}{key}": value for key, value in epoch.values.items()}
        )
        self._writers[name].flush()

    def beat(self, status: Mapping[str, Any]) -> None:
        """Do nothing: metrics are written by epoch only."""

    def close(self) -> None:
        """See `Writer`."""
        while self._writers:
            self._writers.popitem()[1].close()
