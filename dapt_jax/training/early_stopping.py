"""Early stopping on the validation loss, with a return to the best epoch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.runtime import processes
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.freezing import Tree
from dapt_jax.training.run import TrainingRun
from dapt_jax.weights import export
from dapt_jax.weights.paths import flatten, unflatten


class EarlyStopping(Callback):
    """Callback that ends the last phase of a run when its validation loss stops improving.

    Attributes:
        stopped: Whether the run has ended early.
        done: Number of finished epochs of the run.
    """

    def __init__(self, patience: int, run: TrainingRun, file: Path | None = None):
        """Start before the first epoch.

        Args:
            patience: Consecutive epochs without a lower loss that are tolerated; one more ends the run.
            run: The run.
            file: File for the weights of the best epoch, a `.safetensors`; a restarted run writes the same
                ones. Without a file they stay in memory and do not survive a restart.

        Raises:
            UserError: The run has no validation rows, and so no validation loss.
        """
        if not len(run.val_rows):
            raise UserError(
                f"{run.title}: early_stopping_patience={patience} watches the validation loss, but the run has no "
                "images to validate on; expected val_fraction above 0 and a compute_budget that leaves no images out, "
                "or early_stopping_patience=0"
            )
        self.patience, self.phase, self.file = patience, len(run.phases) - 1, file
        self.best, self.epoch, self.waited, self.stopped, self.done = math.inf, -1, 0, False, 0
        self._weights: dict[str, np.ndarray] = {}

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Record the validation loss of an epoch, and return whether the run stops: see `Callback`."""
        self.done = epoch + 1
        if phase != self.phase:
            return False
        if metrics["val_loss"] < self.best:
            self.best, self.epoch, self.waited = metrics["val_loss"], epoch, 0
            self._save(params, batch_stats)
        else:
            self.waited += 1
            self.stopped = self.waited > self.patience
        return self.stopped

    def _save(self, params: Tree, batch_stats: Tree) -> None:
        params, batch_stats = jax.device_get((params, batch_stats))
        if self.file:
            export.write(self.file, params, batch_stats)
        else:
            self._weights = {
                path: np.array(leaf) for path, leaf in (flatten(params) | flatten(batch_stats)).items()
            }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {name: getattr(self, name) for name in ("best", "epoch", "waited", "stopped", "done")}

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore the result of `state`, and return whether the run has stopped there."""
        for name, value in state.items():
            setattr(self, name, value)
        return self.stopped

    def best_weights(self, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
        """Return parameters and statistics of the best epoch.

        Args:
            params: Parameters of the last epoch.
            batch_stats: Batch-norm statistics of the last epoch.

        Raises:
            UserError: They were kept in memory, and the run has been restarted since.
        """
        if self.epoch < 0 or self.epoch == self.done - 1:
            return params, batch_stats
        stored = self._weights
        if self.file:
            processes.sync_file(self.file)
            stored = safetensors.numpy.load_file(self.file)
        elif not stored:
            raise UserError(
                f"the weights of epoch {self.epoch + 1}, the best of {self.done}, were kept in memory, and the run has been "
                "restarted since; expected EarlyStopping(patience, run, file) with a file .safetensors for them"
            )
        best = [unflatten({path: stored[path] for path in flatten(tree)}) for tree in (params, batch_stats)]
        return best[0], best[1]
