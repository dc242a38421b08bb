"""Ends a run when the loss on its watched rows falls no longer, and goes back to its best epoch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import safetensors.numpy

from dapt_jax.runtime import processes
from dapt_jax.training.freezing import Tree
from dapt_jax.training.run import Run
from dapt_jax.weights import export
from dapt_jax.weights.paths import flatten, unflatten


class EarlyStop:
    """The hook of one run: see the module. It watches the run's last phase.

    Attributes:
        stopped: whether the run has ended early.
        done: epochs of the run that it has seen the end of.
    """

    def __init__(self, patience: int, run: Run, file: Path):
        """Waits for the first epoch.

        Args:
            patience: epochs in a row without a lower loss that are let pass; one more ends the run.
            run: that is watched.
            file: where the weights of its best epoch are kept, a `.safetensors`; a run that is killed and started again
                writes the same ones.
        """
        self.patience, self.phase, self.file = patience, len(run.programs) - 1, file
        self.best, self.epoch, self.waited, self.stopped, self.done = math.inf, -1, 0, False, 0

    @property
    def ends(self) -> bool:
        """Whether the run ends where it is."""
        return self.stopped

    def after_epoch(
        self, number: int, epoch: int, params: Tree, batch_stats: Tree, scores: Mapping[str, float]
    ) -> bool:
        """Takes in the loss on the watched rows; see `run.Hook`."""
        self.done = epoch + 1
        if number != self.phase:
            return False
        if scores["val_loss"] < self.best:
            self.best, self.epoch, self.waited = scores["val_loss"], epoch, 0
            export.write(self.file, jax.device_get(params), jax.device_get(batch_stats))
        else:
            self.waited += 1
            self.stopped = self.waited > self.patience
        return self.stopped

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, as plain JSON values."""
        return {name: getattr(self, name) for name in ("best", "epoch", "waited", "stopped", "done")}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def chosen(self, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
        """The weights of the best epoch; those given where that is the last."""
        if self.epoch < 0 or self.epoch == self.done - 1:
            return params, batch_stats
        processes.sync_file(self.file)
        kept = safetensors.numpy.load_file(self.file)
        return tuple(unflatten({path: kept[path] for path in flatten(tree)}) for tree in (params, batch_stats))  # type: ignore[return-value]
