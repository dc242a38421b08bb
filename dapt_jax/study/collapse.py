"""Alarm when the features of a label-free arm lose their rank."""

from collections.abc import Callable, Mapping
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
        start: RankMe of the same images before training.
    """

    def __init__(self, title: str, start: float, policy: str, say: Callable[[str], None]):
        """Watch a run.

        Args:
            title: Name of the run in the line.
            start: RankMe before training.
            policy: `halt` or `warn`.
            say: Function that receives the warning, once.
        """
        self._title, self.start, self._policy, self._say = title, start, policy, say
        self._is_reported = False

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Compare the epoch's RankMe with the start; never stops the run quietly.

        Raises:
            UserError: It has collapsed, and the policy is `halt`.
        """
        rank = metrics.get("rankme", self.start)
        if rank >= SHARE * self.start or self._is_reported:
            return False
        line = (
            f"{self._title}: collapse: RankMe of its features fell from {self.start:.4g} to {rank:.4g} in epoch "
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
    evaluator = LabelFreeEvaluator(run, run.programs[0], None, None, context.mesh)
    start = evaluator.spectrum((params, batch_stats))["rankme"]
    return CollapseAlarm(run.title, start, policy, context.reporter.say)
