"""Several processes that run one study: how they find each other, and how they stay of one mind.

Each runs the same code, and each comes to every collective in the same order. What only one of them can know
(what the workdir holds, what the time is, that a notice to stop was given) is told to all before anybody acts
on it. The first process alone writes the study's files; what the others write goes to a folder of their own
that is thrown away.
"""

import contextlib
import dataclasses
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dapt_jax.errors import EXIT_CODE, UserError

START_S = 300
"""Seconds that a process waits for the others to start."""

HEARTBEAT_S = 20
"""Seconds of silence after which a process is taken for dead."""

LAST_S = 2.0
"""Seconds that the first process, by which the others know each other, gives them to end before it."""

_CHUNK = 1 << 26
"""Bytes that are told at once."""

_CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
"""Variables by which a cluster that JAX recognises says how many processes there are."""


class PeerFailed(BaseException):
    """Another process of the study has failed, and has said why: this one ends as it does."""

    def __init__(self, code: int = EXIT_CODE):
        """Ends quietly.

        Args:
            code: that the other one exits with.
        """
        super().__init__()
        self.code = code


@dataclasses.dataclass(frozen=True)
class Group:
    """How the processes of a study find each other.

    Attributes:
        mode: "auto" (several if the environment says so), "on" or "off".
        coordinator_address: HOST:PORT of the first process; empty for what the cluster says.
        num_processes: Number of processes; 0 for what the cluster says.
        process_id: Number of this one, from 0; -1 for what the cluster says.
    """

    mode: str = "auto"
    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = -1

    def completed(self, environment: Mapping[str, str] = os.environ) -> "Group":
        """Return the group with what it does not say taken from `JAX_COORDINATOR_ADDRESS` and its like.

        Args:
            environment: Environment variables.

        Raises:
            UserError: A variable is no number, or some of the three are known and others are not.
        """

        def number(name: str, given: int, absent: int) -> int:
            if given != absent or not environment.get(name):
                return given
            try:
                return int(environment[name])
            except ValueError:
                raise UserError(f"{name} is {environment[name]!r}; expected a number") from None

        full = Group(
            self.mode,
            self.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS", ""),
            number("JAX_NUM_PROCESSES", self.num_processes, 0),
            number("JAX_PROCESS_ID", self.process_id, -1),
        )
        known = {
            "coordinator_address": bool(full.coordinator_address),
            "num_processes": full.num_processes > 0,
            "process_id": full.process_id >= 0,
        }
        if full.mode != "off" and any(known.values()) and not all(known.values()):
            missing = ", ".join(f"runtime.{name}" for name, is_known in known.items() if not is_known)
            raise UserError(
                f"{missing} is not set; expected runtime.coordinator_address, runtime.num_processes and "
                "runtime.process_id together (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), "
                "or none of them on a cluster"
            )
        if full.num_processes and full.process_id >= full.num_processes:
            raise UserError(
                f"runtime.process_id is {full.process_id}; expected 0 to {full.num_processes - 1}"
            )
        return full

    @property
    def is_several(self) -> bool:
        """Whether there are other processes to be found."""
        if self.mode == "off" or self.num_processes == 1:
            return False
        if self.mode == "on" or self.num_processes > 1:
            return True
        sizes = {name: os.environ.get(name, "") for name in _CLUSTERS}
        return any(
            int(size) > 1 if size.isdigit() else len(size.split(",")) > 1 for size in sizes.values() if size
        )


def start(group: Group) -> None:
    """Find the other processes, if there are any; before anything else is asked of JAX.

    Clusters that JAX recognises (TPU pods, Slurm, Open MPI, Kubernetes) need no settings.

    Args:
        group: What the settings say of the processes.

    Raises:
        UserError: They cannot be found.
    """
    group = group.completed()
    if not group.is_several:
        return
    explicit: dict[str, Any] = {
        "coordinator_address": group.coordinator_address,
        "num_processes": group.num_processes,
        "process_id": group.process_id,
    }
    try:
        jax.distributed.initialize(
            **(explicit if group.coordinator_address else {}),
            heartbeat_timeout_seconds=HEARTBEAT_S,
            initialization_timeout=START_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as error:
        who = f" at {group.coordinator_address}" if group.coordinator_address else ""
        raise UserError(
            f"the other processes of the study were not found{who} ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_primary() -> bool:
    """Whether this process writes the study's files."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def broadcast_from_primary(value: Callable[[], Any]) -> Any:
    """What the first process finds; the others do not look.

    Args:
        value: finds it: anything that pickles.

    Raises:
        UserError: it did, in the first process.
        Lost: in the others, then.
    """
    if not is_multi_process():
        return value()
    content, failed = b"", None
    if is_primary():
        try:
            content = pickle.dumps(value())
        except UserError as error:
            failed = error
    content = _broadcast(content)
    if failed or not content:
        raise failed or PeerFailed()
    return pickle.loads(content)


def _broadcast(content: bytes) -> bytes:
    """The first process's bytes, in every process."""
    chunks, rest = multihost_utils.broadcast_one_to_all(np.asarray(divmod(len(content), _CHUNK), np.int32))
    sizes = [_CHUNK] * int(chunks) + ([int(rest)] if rest else [])
    parts = []
    for number, size in enumerate(sizes):
        own = (
            np.frombuffer(content, np.uint8, size, number * _CHUNK)
            if is_primary()
            else np.zeros(size, np.uint8)
        )
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes())
    return b"".join(parts)


def all_reduce_max(*values: float) -> tuple[int, ...]:
    """The largest of every value over all processes: small numbers, flags among them."""
    if not is_multi_process():
        return tuple(int(value) for value in values)
    return tuple(
        int(value) for value in multihost_utils.process_allgather(np.asarray(values, np.int32)).max(0)
    )


def sync_file(path: Path) -> bool:
    """Whether the first process has a file; if so, all have it afterwards, at their own place for it."""
    if not is_multi_process():
        return path.exists()
    content = broadcast_from_primary(lambda: path.read_bytes() if path.exists() else None)
    if content is None:
        return False
    if not is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return True


@contextlib.contextmanager
def barrier_or_raise() -> Iterator[None]:
    """Goes on behind the block only if all processes have come through it.

    Raises:
        UserError: this one did not.
        Lost: it was another one that did not.
    """
    failed: BaseException | None = None
    try:
        yield
    except UserError as error:
        failed = error
    if all_reduce_max(failed is not None)[0]:
        raise failed or PeerFailed()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """What all processes but the first have in place of the workdir, and of the screen: both are thrown away."""
    with (
        tempfile.TemporaryDirectory(prefix=f"dapt_jax-process{jax.process_index()}-") as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield Path(folder)


_GONE = (
    "gloo",
    "coordination service",
    "connection closed",
    "connection reset",
    "broken pipe",
    "barrier",
    "nccl",
    "halted",
)
"""Of an error of JAX: words that speak of another process."""


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error means that another process of the study is gone."""
    said = str(error).lower()
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError | RuntimeError)
    is_of_jax &= not isinstance(error, UserError)  # a ValueError as well
    return is_of_jax and is_multi_process() and any(word in said for word in _GONE)


def exit_now(code: int) -> None:
    """Ends this process at once, the first one last: JAX would wait for those that are gone, and abort those that are left."""
    if is_primary():
        time.sleep(LAST_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
