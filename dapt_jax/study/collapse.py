"""Alarm when the features of a label-free arm lose their rank."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.models.encoder import Tree
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.context import RunContext
from dapt_jax.training.label_free_evaluator import LabelFreeEvaluator
from dapt_jax.training.run import TrainingRun

SHARE = 0.5
"""Of the RankMe before training, what it may fall to."""


class CollapseAlarm(Callback):
    """Warns, or ends the study, when RankMe falls below half of its value before training.

    Attributes:
        starts: RankMe of the same images before training, at the size that each phase trains on.
    """

    def __init__(self, title: str, starts: Sequence[float], policy: str, say: Callable[[str], None]):
        """Watch a run.

        Args:
            title: Name of the run in the line.
            starts: RankMe before training, for each phase.
            policy: `halt` or `warn`.
            say: Function that receives the warning, once.
        """
        self._title, self.starts, self._policy, self._say = title, tuple(starts), policy, say
        self._is_reported = False

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Compare the epoch's RankMe with the start; never stops the run quietly.

        Raises:
            UserError: It has collapsed, and the policy is `halt`.
        """
        start = self.starts[phase]
        rank = metrics.get("rankme", start)
        if not rank < SHARE * start or self._is_reported:  # NaN is divergence, which the next step finds
            return False
        line = (
            f"{self._title}: collapse: RankMe of its features fell from {start:.4g} to {rank:.4g} in epoch "
            f"{epoch + 1} of the run, below half of its start"
        )
        if self._policy == "halt":
            raise UserError(
                f"{line}; expected a lower adapt.lr, or adapt.objective='reconstruct' or 'distil', whose targets "
                "are fixed; monitoring.collapse='warn' goes on"
            )
        self._is_reported = True
        self._say(f"warning: {line}")
        return False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {"reported": self._is_reported}

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore the result of `state`; the run has not stopped."""
        self._is_reported = state["reported"]
        return False


def alarm_for(
    run: TrainingRun, params: Tree, batch_stats: Tree, policy: str, context: RunContext
) -> CollapseAlarm:
    """Return the alarm of a label-free run, with the RankMe of the weights before training.

    Args:
        run: The run.
        params: Parameters before training.
        batch_stats: Batch-norm statistics before training.
        policy: `halt` or `warn`.
        context: Environment of the run.
    """
    sizes = [program.phase.image_size for program in run.programs]
    starts = {
        size: LabelFreeEvaluator(run, program, None, None, context.mesh).spectrum((params, batch_stats))[
            "rankme"
        ]
        for size, program in dict(zip(sizes, run.programs, strict=True)).items()
    }
    return CollapseAlarm(run.title, [starts[size] for size in sizes], policy, context.reporter.say)
