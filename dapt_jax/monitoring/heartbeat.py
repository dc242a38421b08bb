"""Heartbeat of a study for other processes to read: `status.json`, rewritten every few seconds."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dapt_jax.monitoring.metric_writer import Epoch, Writer
from dapt_jax.runtime import atomic_files

STATUS = "status.json"
"""Name of the heartbeat in a workdir."""

BEAT_S = 2.0


class Heartbeat:
    """Heartbeat that collects a study's progress and reports it to its readers.

    A separate thread writes it, so that a long compilation is not mistaken for a dead process. Its times are
    of the wall clock, since another machine may read them; no durations are measured with them.
    """

    def __init__(
        self, workdir: Path | None = None, writers: Sequence[Writer] = (), say: Callable[[str], None] = print
    ):
        """Start the heartbeat.

        Args:
            workdir: Folder of the study; None to write nothing.
            writers: Writers of metrics.
            say: Function that receives a line for the user.
        """
        self._workdir, self._writers, self._say = workdir, writers, say
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._failed: set[str] = set()
        now = time.time()
        self._status: dict[str, Any] = {
            "state": "running", "time": now, "started": now, "progressed": now, "pid": os.getpid(),
            "host": socket.gethostname(), "doing": "starting", "images_per_s": None,
            "flops": {"done": 0, "total": 0}, "left_s": None, "arms": {"done": [], "running": "", "left": []},
            "at": {}, "row": {},
        }  # fmt: skip
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        if workdir is not None:
            self._beat()
            self._thread.start()

    def arms(self, done: Sequence[str], running: str, left: Sequence[str]) -> None:
        """Record which arms are done, under way and to come."""
        with self._lock:
            self._status.update(
                arms={"done": list(done), "running": running, "left": list(left)}, at={}, row={}
            )

    def progress(
        self, done: float, total: float, left_s: float | None, doing: str, images_per_s: float | None
    ) -> None:
        """Record the progress of the study.

        Args:
            done: Model FLOPs done, including those of earlier starts.
            total: Model FLOPs of the study.
            left_s: Expected seconds to the end; None where no estimate exists yet.
            doing: Description of the current work.
            images_per_s: Its throughput in images per second.
        """
        with self._lock:
            self._status.update(
                progressed=time.time(), flops={"done": done, "total": total}, left_s=left_s, doing=doing,
                images_per_s=images_per_s,
            )  # fmt: skip

    def at(self, at: dict[str, Any], row: dict[str, Any]) -> None:
        """Record the position of a run.

        Args:
            at: `phase`, with its `epoch` and `epochs`, and `step` and `steps` of the run.
            row: Ledger row under way: `key`, and `model_flops`, `wall_s`, `energy_kwh` so far.
        """
        with self._lock:
            self._status.update(at=at, row=row)

    def epoch(self, epoch: Epoch) -> None:
        """Record the metrics of an epoch."""
        with self._tolerant("metrics"):
            for writer in self._writers:
                writer.epoch(epoch)

    def close(self, state: str) -> None:
        """End the heartbeat.

        Args:
            state: Final state: "done", "stopped" (a restart resumes) or "failed".
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._status.update(state=state)
        if self._workdir is not None:
            self._beat()
        for writer in self._writers:
            writer.close()

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        """Write the heartbeat."""
        assert self._workdir is not None
        with self._lock:
            self._status["time"] = time.time()
            text, status = json.dumps(self._status, indent=1), json.loads(json.dumps(self._status))
        with self._tolerant("the heartbeat"):
            atomic_files.write_text(self._workdir / STATUS, text + "\n", durable=False)
            for writer in self._writers:
                writer.beat(status)

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """Report a write error, such as a full disk or a missing folder, once, and do not end the study."""
        try:
            yield
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                self._say(f"{what} cannot be written ({error.strerror or error}): the study goes on without")
