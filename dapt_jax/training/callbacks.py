"""What looks at a run after each of its epochs, and may end it: early stopping, scores, your own."""

from collections.abc import Mapping, Sequence
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.training.freezing import Tree


class Callback:
    """Looks at the network of a run after every epoch.

    A subclass defines `after_epoch`; one that remembers something between epochs also defines `state` and
    `restore`, and then a run that is killed and started again goes on as if nothing had happened. With
    several processes every process calls the same callbacks in the same order, and all of them have to return
    the same.

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
        """Name under which a checkpoint keeps the callback's state; unique within a run."""
        return type(self).__name__

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Look at an epoch that is done, and return whether the run stops here.

        Args:
            phase: Index of the epoch's phase.
            epoch: Index of the epoch in the run.
            params: Parameters to evaluate with: averaged ones where an average is kept. The next step donates
                their buffers, so what is kept has to be copied.
            batch_stats: Batch-norm statistics.
            metrics: Metrics of the validation rows; empty where the run has none.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on from what `state` returned, and return whether the run has stopped there."""
        del state
        return False


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks of one name: a checkpoint would hold the state of one of them.

    Raises:
        UserError: Names them.
    """
    names = [callback.name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} callbacks are named {name!r}; expected each name once")
