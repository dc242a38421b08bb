"""Multi-process start-up, and decisions that must agree on every process.

Every process runs the same code and issues the same collectives in the same order. What only one process can
know (the contents of the workdir, the time, a signal to stop) is broadcast before any process acts on it. The
first process alone writes the study's files; the others write to a temporary folder that is deleted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pickle
import socket
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
"""Seconds without a heartbeat after which a process is considered dead."""

LAST_S = 2.0
"""Seconds that the first process, which hosts the coordinator, waits for the others to end before it."""

_CHUNK = 1 << 26
"""Bytes per broadcast."""

_CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
"""Variables with which a cluster that JAX recognises gives the number of processes."""


class PeerFailed(BaseException):
    """Another process of the study has failed and reported why: this process ends with the same code."""

    def __init__(self, code: int = EXIT_CODE):
        """End without a message.

        Args:
            code: Exit code of the other process.
        """
        super().__init__()
        self.code = code


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings with which the processes of a study find each other.

    Attributes:
        mode: "auto" (multi-process if the environment says so), "on" or "off".
        coordinator_address: HOST:PORT of the first process; empty to use the cluster's.
        num_processes: Number of processes; 0 to use the cluster's.
        process_id: Index of this process, from 0; -1 to use the cluster's.
    """

    mode: str = "auto"
    coordinator_address: str = ""
    num_processes: int = 0
    process_id: int = -1

    def completed(self, environment: Mapping[str, str] = os.environ) -> "Group":
        """Return the group with missing values from `JAX_COORDINATOR_ADDRESS` and related variables.

        Args:
            environment: Environment variables.

        Raises:
            UserError: A variable is not a number, or only some of the three values are known.
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
                "runtime.process_id together (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID), or none of them on a cluster"
            )
        if full.num_processes and full.process_id >= full.num_processes:
            raise UserError(
                f"runtime.process_id is {full.process_id}; expected 0 to {full.num_processes - 1}"
            )
        return full

    @property
    def is_several(self) -> bool:
        """Whether the group has several processes."""
        if self.mode == "off" or self.num_processes == 1:
            return False
        if self.mode == "on" or self.num_processes > 1:
            return True
        sizes = {name: os.environ.get(name, "") for name in _CLUSTERS}
        return any(
            int(size) > 1 if size.isdigit() else len(size.split(",")) > 1 for size in sizes.values() if size
        )


def start(group: Group) -> None:
    """Connect to the other processes, if there are any; call it before any other use of JAX.

    Clusters that JAX recognises (TPU pods, Slurm, Open MPI, Kubernetes) need no settings.

    Args:
        group: Settings of the processes.

    Raises:
        UserError: The connection fails.
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
    """Return whether this process writes the study's files."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Return whether the study has more than one process."""
    return jax.process_count() > 1


@functools.cache
def hosts() -> int:
    """Return the number of machines that the processes of the study run on; all processes call it together."""
    if not is_multi_process():
        return 1
    boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one machine share it, and no name
    own = boot.read_bytes() if boot.exists() else socket.gethostname().encode()
    digest = np.frombuffer(hashlib.blake2b(own, digest_size=8).digest(), np.uint8)
    return len(np.unique(multihost_utils.process_allgather(digest), axis=0))


def broadcast_from_primary(value: Callable[[], Any]) -> Any:
    """Return a value computed by the first process alone, on every process.

    Args:
        value: Function that computes it; the result must be picklable.

    Raises:
        UserError: `value` raised it, on the first process.
        PeerFailed: On the other processes, in that case.
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
    """Return the first process's bytes, on every process."""
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
    """Return the maximum of every value over all processes; values are small numbers or flags."""
    if not is_multi_process():
        return tuple(int(value) for value in values)
    return tuple(
        int(value) for value in multihost_utils.process_allgather(np.asarray(values, np.int32)).max(0)
    )


def sync_file(path: Path) -> bool:
    """Copy a file of the first process to the local path of every process; return whether it exists."""
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
    """Continue after the block only if all processes have completed it.

    Raises:
        UserError: This process failed.
        PeerFailed: Another process failed.
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
    """Yield a temporary folder that replaces the workdir on all processes but the first.

    Their standard output is discarded as well.
    """
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
"""Words in an error of JAX that indicate the failure of another process."""


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error means that another process of the study is gone."""
    said = str(error).lower()
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError | RuntimeError)
    is_of_jax &= not isinstance(error, UserError)  # which is a ValueError as well
    return is_of_jax and is_multi_process() and any(word in said for word in _GONE)


def exit_now(code: int) -> None:
    """End this process at once, the first process last.

    A regular shutdown of JAX would wait for processes that are gone, and abort the remaining ones.
    """
    if is_primary():
        time.sleep(LAST_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
