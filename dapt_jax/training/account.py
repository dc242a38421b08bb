"""Running cost and loss curve of one phase, from which its ledger row is written."""

import dataclasses
from typing import Any

from dapt_jax.cost.clock import Clock
from dapt_jax.cost.flops import Flops
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes
from dapt_jax.training import accounting, approximations, freezing
from dapt_jax.training.context import RunContext
from dapt_jax.training.cost_meter import CostMeter, state_of_row
from dapt_jax.training.run import TrainingRun


@dataclasses.dataclass(frozen=True)
class FillCost:
    """Cost of the cached activations of a phase.

    Attributes:
        cached: "filled" if the phase computed any of them, "reused" if none, "off" if it trains without.
        flops: Model FLOPs that this phase has run for them.
        reused_flops: Model FLOPs that another arm has run for them.
        reused_s: Seconds that another arm has spent on them.
        rounding_error: Relative error of a reduced dtype, by `RoundingError`; 0 without.
    """

    cached: str = "off"
    flops: int = 0
    reused_flops: int = 0
    reused_s: float = 0.0
    rounding_error: float = 0.0


class PhaseAccount:
    """Seconds, energy, FLOPs and loss curve of one phase.

    Attributes:
        meter: Seconds and energy.
        curve: One point for every finished epoch.
        fill: Cost of cached activations.
        targets: Cost of a teacher's cached outputs.
    """

    def __init__(
        self,
        run: TrainingRun,
        number: int,
        context: RunContext,
        stored: dict[str, Any],
        repeated_steps: int = 0,
    ):
        """Start at zero, or resume from the checkpoint or the ledger row of the phase.

        The cost of filling a cache is entered into the ledger immediately, so that a phase that is killed
        before its first checkpoint finds it there.

        Args:
            run: The run.
            number: Index of the phase.
            context: Surroundings.
            stored: What `state` returned before a restart; empty at the start of the phase.
            repeated_steps: Steps of a diverged first attempt, which also count.
        """
        self._run, self._number, self._context = run, number, context
        self._program, self._ledger = run.programs[number], context.ledger
        self._repeated_steps = repeated_steps
        self.curve: list[dict[str, Any]] = list(stored.get("curve", []))
        self.fill, self._is_settled = FillCost(**stored.get("fill", {})), "fill" in stored
        self.targets = FillCost(**stored.get("targets", {}))
        self._are_targets_settled = "targets" in stored
        self._filled_before, self._targets_before, meter = 0, 0, stored.get("meter")
        if not stored and (run.cache_decision(self._program).cached or run.targets_to_compute(number)):
            meter = self._resume_fill()
        self.meter = CostMeter(context.hardware, meter)

    @property
    def clock(self) -> Clock:
        """Seconds of the phase."""
        return self.meter.clock

    def _resume_fill(self) -> dict[str, Any] | None:
        """Restore the cost of the cache fill from the ledger, and return the meter's state at that time."""
        key = self._run.row_key(self._number)
        row: Row | None = processes.broadcast_from_primary(lambda: self._ledger.find(key))
        has_targets = self._run.targets_to_compute(self._number) is not None
        if row is None or (row.cached == "off" and not has_targets):
            return None
        alone, targets_alone = (
            self._run.fill_flops(self._number),
            self._run.target_fill_flops(self._number),
        )
        self._targets_before = row.target_flops if has_targets else 0
        self._filled_before = (
            row.model_flops - self._per_image(row.cached).model * row.images - row.target_flops
        )
        spent = self._filled_before + self._targets_before
        is_settled = spent + row.reused_flops == alone + targets_alone
        reused = alone - self._filled_before if is_settled else 0
        self.fill = FillCost(row.cached, self._filled_before, reused, row.reused_s)
        self._is_settled = is_settled or self._filled_before == alone
        if not is_settled and self._targets_before != targets_alone:
            # Of steps whose targets could not be cached, and were computed with every batch.
            online = self._run.online_target_cost(self._number, is_cached=False).model * row.images
            self._targets_before = max(0, self._targets_before - online)
        if has_targets and (is_settled or self._targets_before == targets_alone):
            reused = targets_alone - self._targets_before
            self.targets = FillCost(
                "filled" if self._targets_before else "reused", self._targets_before, reused
            )
            self._are_targets_settled = True
        # Seconds of repeated steps are not counted twice.
        return None if row.steps else state_of_row(row)

    def add_fill(self, flops: int) -> None:
        """Enter the FLOPs of a cache fill into the ledger immediately."""
        if self._is_settled:  # work repeated after a kill is not counted twice
            return
        total = min(self.fill.flops + flops, self._run.fill_flops(self._number))
        self.fill = FillCost("filled", total)
        self.enter(self._first_step)

    def settle_fill(self, ran: int, seconds: float, cached: bool = True, error: float = 0.0) -> None:
        """Record the total cost of all cached activations of the phase.

        Args:
            ran: Model FLOPs that were run for them in this start.
            seconds: Seconds spent on the activations of this phase, now or earlier.
            cached: Whether the phase trains on them; if not, they could not be cached.
            error: Their relative error, where a reduced dtype holds them.
        """
        if self._is_settled:
            self.fill = dataclasses.replace(self.fill, rounding_error=error)
            return
        alone = self._run.fill_flops(self._number)
        spent = min(self._filled_before + ran, alone)
        if cached:
            reused_s = seconds if alone and not spent else 0.0
            self.fill = FillCost("filled" if spent else "reused", spent, alone - spent, reused_s, error)
        else:
            self.fill = FillCost("off", spent)
        self._is_settled = True
        self.enter(self._first_step)

    def add_targets(self, flops: int) -> None:
        """Enter the FLOPs of a teacher's cached outputs into the ledger immediately."""
        if self._are_targets_settled:
            return
        total = min(self.targets.flops + flops, self._run.target_fill_flops(self._number))
        self.targets = FillCost("filled", total)
        self.enter(self._first_step)

    def settle_targets(self, ran: int, seconds: float, cached: bool = True, error: float = 0.0) -> None:
        """Record the total cost of a teacher's cached outputs.

        Args:
            ran: Model FLOPs that were run for them in this start.
            seconds: Seconds spent on them, now or earlier.
            cached: Whether the phase trains on them; if not, they could not be cached.
            error: Their relative error, where a reduced dtype holds them.
        """
        if self._are_targets_settled:
            self.targets = dataclasses.replace(self.targets, rounding_error=error)
            return
        alone = self._run.target_fill_flops(self._number)
        spent = min(self._targets_before + ran, alone)
        if cached:
            reused_s = seconds if alone and not spent else 0.0
            self.targets = FillCost("filled" if spent else "reused", spent, alone - spent, reused_s, error)
        else:
            self.targets = FillCost("off", spent)
        self._are_targets_settled = True
        self.enter(self._first_step)

    @property
    def _first_step(self) -> int:
        return self._run.timeline.first_step(self._number)

    def add_epoch(self, epoch: int, values: dict[str, Any]) -> None:
        """Add an epoch to the curve."""
        self.curve.append({"epoch": epoch, **values})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {
            "curve": list(self.curve),  # written in the background, while epochs are added to the curve
            "fill": dataclasses.asdict(self.fill),
            **({"targets": dataclasses.asdict(self.targets)} if self._are_targets_settled else {}),
            "meter": self.meter.state(),
        }

    def enter(self, step: int) -> None:
        """Write the ledger row of the phase after a step of the run, replacing an earlier one."""
        self._ledger.put(self.meter.finalize(self._row(step)))

    def _per_image(self, cached: str) -> Flops:
        """Return FLOPs of one image in one step, besides the teacher's, by the use of the cached prefix."""
        cost = accounting.image_cost(self._program, self._run.dataset.images.size)
        return cost.prefix + cost.suffix if cached == "off" else cost.suffix

    def _row(self, step: int) -> Row:
        """Return the counts of the phase up to a step of the run."""
        run, program = self._run, self._program
        cost = accounting.image_cost(program, run.dataset.images.size)
        shapes, _ = program.model.abstract()
        own, per_epoch = step - self._first_step, run.steps_per_epoch
        # Steps before a rollback count as well, up to the one that caused it.
        repeated = self._repeated_steps
        steps = own + repeated
        images = len(run.train_rows) * (own // per_epoch + repeated // per_epoch)
        images += repeated % per_epoch * run.batch_size
        per_image = self._per_image(self.fill.cached)
        online = run.online_target_cost(self._number, self.targets.cached != "off")
        strategy, seed, stage, phase = run.row_key(self._number)
        return Row(
            strategy=strategy,
            seed=seed,
            stage=stage,
            phase=phase,
            steps=steps,
            images=images,
            model_flops=(per_image + online).model * images + self.fill.flops + self.targets.flops,
            hardware_flops=(per_image + online).hardware * steps * run.batch_size
            + self.fill.flops
            + self.targets.flops,
            head_flops=cost.head.model * images,
            target_flops=online.model * images + self.targets.flops,
            trainable_params=freezing.count(shapes, program.mask.trainable),
            total_params=freezing.count(shapes),
            cached=self.fill.cached,
            reused_flops=self.fill.reused_flops + self.targets.reused_flops,
            reused_s=self.fill.reused_s + self.targets.reused_s,
            peak_flops=self._context.hardware.peak_for(program.model.dtype),
            approximations=approximations.of_phase(
                run,
                self._number,
                is_cached=self.fill.cached != "off",
                has_cached_targets=self.targets.cached != "off",
                error=self.fill.rounding_error,
                targets_error=self.targets.rounding_error,
            ),
            curve=list(self.curve),
        )
