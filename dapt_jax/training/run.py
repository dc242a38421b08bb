"""One training run, fully known from the config before anything is loaded, and the tools that it runs with."""

import dataclasses
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.cost.hardware import Hardware
from dapt_jax.cost.ledger import Ledger
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.pipeline import Order
from dapt_jax.progress import Reporter
from dapt_jax.training.caching import Caching, Decision, decide
from dapt_jax.training.features import Store
from dapt_jax.training.optim import Plateau
from dapt_jax.training.phases import Timeline
from dapt_jax.training.steps import PhaseProgram


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: phases of one model on one data set.

    Attributes:
        strategy: for the ledger.
        seed: of data order, augmentation and new weights.
        stage: of the ledger.
        label: put before the phases' names in the ledger.
        programs: one per phase.
        dataset: where all rows are.
        train_rows: that are trained on.
        val_rows: that the loss is watched on; may be empty.
        weights: of the training rows in the loss; empty for 1 each.
        batch_size: images per step, over all devices.
        caching: what of a frozen prefix may be cached, and where.
        plateau: fresh state of the plateau schedule.
    """

    strategy: str
    seed: int
    stage: str
    label: str
    programs: tuple[PhaseProgram, ...]
    dataset: Dataset
    train_rows: np.ndarray
    val_rows: np.ndarray
    weights: tuple[float, ...]
    batch_size: int
    caching: Caching
    plateau: Plateau

    @property
    def order(self) -> Order:
        """In which order the rows are seen."""
        return Order(tuple(int(row) for row in self.train_rows), self.batch_size, self.seed, self.weights)

    @property
    def timeline(self) -> Timeline:
        """The phases along the steps."""
        return Timeline(tuple(program.phase for program in self.programs), self.order.steps_per_epoch)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.strategy} seed {self.seed}" + (f" {self.label.rstrip('/')}" if self.label else "")

    def cache_decision(self, program: PhaseProgram) -> Decision:
        """Whether a phase trains on cached activations."""
        return decide(program, len(self.dataset), self.dataset.images.size, self.caching)


@dataclasses.dataclass
class Tools:
    """What a run needs of its surroundings.

    Attributes:
        folder: where its checkpoints go; None to keep none.
        every_s: seconds between checkpoints.
        ledger: where its costs go.
        store: cached activations, shared by all runs of a study.
        mesh: the devices.
        hardware: what they are.
        reporter: tells the user.
        threads: that decode images.
        executables: compiled steps by what they depend on: phases, arms and seeds that agree share them.
    """

    folder: Path | None
    every_s: float
    ledger: Ledger
    store: Store
    mesh: Mesh
    hardware: Hardware
    reporter: Reporter
    threads: int = 2
    executables: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def compiled(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function compiled for arguments (the first of them is donated), or the one that `key` has already."""
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments)
        full_key = (key, function.__name__, str(shapes))
        if full_key not in self.executables:
            self.executables[full_key] = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
        return self.executables[full_key]
