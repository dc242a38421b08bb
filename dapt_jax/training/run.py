"""One training run, fully known from the config before anything is loaded, and the tools that it runs with."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dapt_jax.cost.hardware import Hardware
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.pipeline import Order
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.monitoring.profiler import Profiler
from dapt_jax.monitoring.progress import Reporter
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime import sharding
from dapt_jax.runtime.preemption import PreemptionHandler
from dapt_jax.training import accounting
from dapt_jax.training.cache.policy import CacheDecision, Caching, Tier, choose_cache
from dapt_jax.training.cache.store import ActivationCache, Prefix
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
        plateau: the plateau schedule.
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

    @functools.cached_property
    def order(self) -> Order:
        """In which order the rows are seen."""
        return Order(tuple(int(row) for row in self.train_rows), self.batch_size, self.seed, self.weights)

    @functools.cached_property
    def timeline(self) -> Timeline:
        """The phases along the steps."""
        return Timeline(tuple(program.phase for program in self.programs), self.order.steps_per_epoch)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{self.strategy} seed {self.seed}" + (f" {self.label.rstrip('/')}" if self.label else "")

    def cache_decision(self, program: PhaseProgram) -> CacheDecision:
        """Whether a phase trains on cached activations."""
        return choose_cache(program, len(self.dataset), self.dataset.images.size, self.caching)

    def check_cache(self) -> None:
        """Decides for every phase whether it trains on cached activations.

        Raises:
            UserError: the config insists where it cannot be, or the network does not take images of this size.
        """
        for program in self.programs:
            self.cache_decision(program)

    def flops_per_image(self, number: int) -> int:
        """Model FLOPs of one image in one step of a phase; its frozen prefix is left out where that is cached."""
        program = self.programs[number]
        cost = accounting.image_cost(program, self.dataset.images.size)
        return cost.suffix.model + (0 if self.cache_decision(program).cached else cost.prefix.model)

    def flops(self, epochs: int | None = None) -> int:
        """Model FLOPs of the run, or of its first epochs."""
        total, left = 0, self.timeline.epochs if epochs is None else epochs
        for number, program in enumerate(self.programs):
            done = min(left, program.phase.epochs)
            if not done:
                break
            total += self.flops_per_image(number) * len(self.train_rows) * done + self.fill_flops(number)
            left -= done
        return total

    def prefixes_to_compute(self, number: int) -> list[tuple[Prefix, Tier]]:
        """What a phase needs of frozen prefixes before it begins, lowest boundary first and its own last.

        Lower ones are what other phases train on: an earlier phase has kept them, and its own is computed from there; a
        later phase will need them, and computed on the way up they cost nothing.
        """
        first = self.programs[number]
        decision = self.cache_decision(first)
        if not decision.place:
            return []
        own = Prefix.of(first, decision.views)
        chosen = {own.boundary: decision}
        for place, program in enumerate(self.programs):
            other = self.cache_decision(program)
            boundary = program.mask.boundary
            is_below = other.place and Prefix.of(program, other.views) == dataclasses.replace(own, boundary=boundary)
            since = self.programs[min(number, place) : max(number, place)]
            is_left_alone = all(between.mask.boundary >= boundary for between in since)
            if is_below and boundary < own.boundary and is_left_alone and self._fit([*chosen.values(), other]):
                chosen[boundary] = other
        return [(dataclasses.replace(own, boundary=boundary), chosen[boundary].place) for boundary in sorted(chosen)]

    def _fit(self, decisions: list[CacheDecision]) -> bool:
        """Whether entries are within the budgets together."""
        budgets = {"memory": self.caching.memory_bytes, "disk": self.caching.disk_bytes}
        return all(
            sum(each.bytes for each in decisions if each.place == place) <= budget for place, budget in budgets.items()
        )

    def fill_flops(self, number: int) -> int:
        """Model FLOPs of what a phase computes of frozen prefixes, beyond what the phases before it have kept."""
        kept: set[Prefix] = set()
        cost = 0
        for index in range(number + 1):
            cost = below = 0
            for prefix, _ in self.prefixes_to_compute(index):
                whole = prefix.flops(self.dataset.images.size) * len(self.dataset) * prefix.views
                cost, below = cost + (0 if prefix in kept else whole - below), whole
                kept.add(prefix)
            # What the phase trains makes everything above its boundary stale.
            kept = {prefix for prefix in kept if prefix.boundary <= self.programs[index].mask.boundary}
        return cost


class Hook(Protocol):
    """Looks at the network of a run after its epochs, and may end it."""

    @property
    def ends(self) -> bool:
        """Whether the run ends where it is."""
        ...

    def after_epoch(self, number: int, epoch: int, params: Any, batch_stats: Any, scores: Mapping[str, float]) -> bool:
        """Called when an epoch that may have changed the encoder is done; returns `ends`.

        Args:
            number: of its phase.
            epoch: of the run.
            params: to evaluate with.
            batch_stats: batch-norm statistics.
            scores: on the watched rows; empty where there are none.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, as plain JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned; from nothing where it is empty."""
        ...


ON_NAN = ("halt", "rollback")


@dataclasses.dataclass(frozen=True)
class NonFinitePolicy:
    """What a run does about a loss that is no number.

    Attributes:
        nan: of `ON_NAN`; a rollback goes to the start of the phase, once in a run.
        nan_factor: what the rate of the phase is multiplied by then.
        folder: where the batch is kept; None to keep none.
    """

    nan: str = "halt"
    nan_factor: float = 0.1
    folder: Path | None = None


@dataclasses.dataclass
class RunContext:
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
        heartbeat: is told of epochs and of where a run is.
        profiler: traces some steps.
        preemption_handler: says when to save and stop.
        debug: what to do about a loss that is no number.
        hook: looks at the network along the run; None for nobody.
        workdir: of the study, where predictions are kept; None to keep none.
        executables: compiled steps by what they depend on: phases, arms and seeds that agree share them.
    """

    folder: Path | None
    every_s: float
    ledger: Ledger
    store: ActivationCache
    mesh: Mesh
    hardware: Hardware
    reporter: Reporter
    threads: int = 2
    heartbeat: Heartbeat = dataclasses.field(default_factory=Heartbeat)
    profiler: Profiler = dataclasses.field(default_factory=Profiler)
    preemption_handler: PreemptionHandler = dataclasses.field(default_factory=PreemptionHandler)
    debug: NonFinitePolicy = dataclasses.field(default_factory=NonFinitePolicy)
    hook: Hook | None = None
    workdir: Path | None = None
    executables: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def compiled(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function compiled for arguments (the first of them is donated), or the one that `key` has already."""
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments)
        full_key = (key, function.__name__, str(shapes))
        if full_key not in self.executables:
            step = sharding.jit_step(function, *arguments, mesh=self.mesh)
            self.executables[full_key] = step.lower(*arguments).compile()
        return self.executables[full_key]
