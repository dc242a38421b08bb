"""Callbacks after each epoch, which may end a run: early stopping, scores, and custom ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.training.freezing import Tree


class Callback:
    """Callback with access to the network of a run after every epoch.

    A subclass defines `after_epoch`; one with state between epochs also defines `state` and `restore`, so
    that a run that is killed and restarted resumes exactly. With several processes, every process calls the
    same callbacks in the same order, and all processes must return the same value.

        >>> class Print(Callback):
        ...     def after_epoch(self, phase, epoch, params, batch_stats, metrics):
        ...         print(epoch, metrics)
        ...         return False
        >>> Print().after_epoch(0, 3, {}, {}, {"val_loss": 0.5})
        3 {'val_loss': 0.5}
        False
    """

    @property
    def name(self) -> str:
        """Name of the callback's state in a checkpoint; unique within a run."""
        return type(self).__name__

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Process a finished epoch, and return whether the run stops here.

        Args:
            phase: Index of the epoch's phase.
            epoch: Index of the epoch in the run.
            params: Parameters for evaluation: averaged ones if there is an average. The next step donates
                their buffers, so copy what must outlive the call.
            batch_stats: Batch-norm statistics.
            metrics: Metrics of the validation rows; empty where the run has none.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore the result of `state`, and return whether the run has stopped there."""
        del state
        return False


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks with the same name, since a checkpoint holds one state per name.

    Raises:
        UserError: Two callbacks have the same name.
    """
    names = [callback.name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} callbacks are named {name!r}; expected each name once")
