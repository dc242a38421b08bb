"""Environment of a run: devices, cache, ledger, checkpoints, display."""

import dataclasses
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dapt_jax.cost import hardware
from dapt_jax.cost.hardware import Hardware
from dapt_jax.fields import check_fields, setting
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.monitoring.profiler import Profiler
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime import sharding
from dapt_jax.runtime.preemption import PreemptionHandler
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.callbacks import Callback, check_callbacks
from dapt_jax.training.executables import Executables, compiles_ahead

ON_NON_FINITE = ("halt", "rollback")
SYNC_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True)
class NonFinitePolicy:
    """Handling of a non-finite loss: the section `non_finite` of the settings.

    Attributes:
        policy: Whether the run halts, or rolls back to the start of the phase, once per run.
        lr_factor: Factor on the learning rate of the phase after a rollback.
        folder: Folder for the batch that caused it; None to save none.
    """

    policy: str = setting(
        "halt", choices=ON_NON_FINITE, doc="Save the batch, then stop, or return to the phase's start once."
    )
    lr_factor: float = setting(0.1, above=0, below=1, doc="Factor on the learning rate after a rollback.")
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    """Environment of a run: `RunContext()` trains on all devices, without output or files.

    >>> RunContext().checkpoint_dir is None
    True

    Attributes:
        checkpoint_dir: Folder for the run's checkpoints, and those of no other run; None to save none.
        checkpoint_every_s: Seconds between checkpoints.
        ledger: Ledger of costs.
        cache: Cached activations, shared by all runs of a study.
        mesh: Devices.
        hardware: Description of the devices, for energy and peak FLOP/s.
        reporter: Display for the user.
        threads: Threads that decode images.
        heartbeat: Receiver of the metrics of every epoch and of the position of a run.
        profiler: Profiler that traces some steps.
        preemption_handler: Receiver of signals to save and stop.
        non_finite: What to do about a non-finite loss.
        callbacks: Callbacks after every epoch, in this order, which may end the run.
        workdir: Folder of the study, for predictions; None to save none.
        sync_every_s: Seconds between two moments at which the host waits for the device: at each of them the
            loss is checked, progress is shown, and a checkpoint may be saved. All processes reach them after
            the same step.
        executables: Compiled steps by key; phases, arms and seeds with equal keys share them on equal devices.
        compiles_ahead: Whether the step of the next phase is compiled while a phase trains.
    """

    checkpoint_dir: Path | None = None
    checkpoint_every_s: float = 30.0
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    cache: ActivationCache = dataclasses.field(default_factory=ActivationCache)
    mesh: Mesh = dataclasses.field(default_factory=sharding.make_mesh)
    hardware: Hardware = dataclasses.field(default_factory=hardware.describe)
    reporter: Reporter = dataclasses.field(default_factory=lambda: Reporter(1, quiet=True))
    threads: int = 2
    heartbeat: Heartbeat = dataclasses.field(default_factory=Heartbeat)
    profiler: Profiler = dataclasses.field(default_factory=Profiler)
    preemption_handler: PreemptionHandler = dataclasses.field(default_factory=PreemptionHandler)
    non_finite: NonFinitePolicy = dataclasses.field(default_factory=NonFinitePolicy)
    callbacks: tuple[Callback, ...] = ()
    workdir: Path | None = None
    sync_every_s: float = SYNC_EVERY_S
    executables: Executables = dataclasses.field(default_factory=Executables)
    compiles_ahead: bool = dataclasses.field(default_factory=compiles_ahead)

    def __post_init__(self) -> None:
        check_callbacks(self.callbacks)

    def study_folder(self) -> Path:
        """Return the folder of the study.

        Raises:
            ValueError: The run does not belong to a study.
        """
        if self.workdir is None:
            raise ValueError("RunContext.workdir is None; expected the folder of the study")
        return self.workdir

    def compiled(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a function compiled for its arguments, whose first is donated; compiled once.

        Args:
            key: Everything that the function depends on besides its arguments.
            function: Function from a state and other arguments to a state, or to a tuple that begins with
                one.
            arguments: Arguments with the shapes, dtypes and shardings of later calls.
        """
        full_key = self._full_key(key, function, arguments)
        compiled = self.executables.find(full_key)
        if compiled is None:
            step = sharding.jit_step(function, *arguments, mesh=self.mesh)
            compiled = step.lower(*arguments).compile()
            self.executables.add(full_key, compiled)
        return compiled

    def compile_ahead(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin to compile what `compiled` will return for arguments of the same shapes."""

        def compile_step() -> Any:
            return sharding.jit_step(function, *arguments, mesh=self.mesh).lower(*arguments).compile()

        self.executables.start(self._full_key(key, function, arguments), compile_step)

    def _full_key(self, key: Hashable, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Hashable:
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments)
        return key, function.__name__, str(shapes), self.mesh
