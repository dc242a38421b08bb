"""Loss and AUC, or Dice, on the rows that a run does not train on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dapt_jax import metrics
from dapt_jax.data import crops, pipeline
from dapt_jax.models.network import Network
from dapt_jax.objectives import MaskObjective
from dapt_jax.training.features import Activations
from dapt_jax.training.run import Run
from dapt_jax.training.steps import PhaseProgram, State, at_rest, evaluation_params


@functools.cache
def logits_of(model: Network, boundary: int | None) -> Callable[..., jax.Array]:
    """Activations at a boundary, or images where it is None, to logits; compiled once for all arms."""
    if boundary is None:
        return jax.jit(model.__call__)
    return jax.jit(lambda params, stats, x: model.suffix(params, stats, x, boundary)[0])


class Evaluator:
    """Scores the network of a phase on the run's validation rows, through the cached prefix where there is one."""

    def __init__(self, run: Run, program: PhaseProgram, clean: Activations | None):
        """Prepares.

        Args:
            run: the run.
            program: its phase.
            clean: activations of the run's data set without augmentation, or None to start from images.
        """
        self._run, self._program, self._clean = run, program, clean
        self._logits = logits_of(program.model, program.mask.boundary if clean else None)

    def __call__(self, state: State) -> dict[str, float]:
        """Returns `val_loss`, and `val_auc` or of masks `val_dice`; or nothing where the run watches no rows."""
        run = self._run
        if not len(run.val_rows):
            return {}
        params = evaluation_params(state)
        parts = []
        if self._clean:
            for start in range(0, len(run.val_rows), run.batch_size):
                rows = run.val_rows[start : start + run.batch_size]
                x = self._program.as_computed(self._clean.rows(0, np.resize(rows, run.batch_size)))
                parts.append(np.asarray(self._logits(params, state["stats"], x))[: len(rows)])
        else:
            side = at_rest(self._program.model, self._program.augment).size(run.dataset.images.size)
            for whole, rows in pipeline.in_order(run.dataset, run.val_rows, run.batch_size):
                images = crops.centre(whole, side)
                parts.append(np.asarray(self._logits(params, state["stats"], images))[: len(rows)])
        return self.scores(np.concatenate(parts))

    def scores(self, logits: np.ndarray) -> dict[str, float]:
        """The same from the logits of the watched rows, float32 [v, outputs] or [v, h, w, outputs]."""
        run, objective = self._run, self._program.objective
        if not len(run.val_rows):
            return {}
        targets = run.dataset.targets[run.val_rows]
        loss = float(objective(jnp.asarray(logits), jnp.asarray(targets)).mean())
        probabilities = objective.probabilities(jnp.asarray(logits))
        if isinstance(objective, MaskObjective):
            scored = metrics.Segmentation(run.dataset.segments, run.dataset.overlapping, surfaces=False)
            scored.add(targets, np.asarray(objective.decide(probabilities)))
            return {"val_loss": loss, "val_dice": scored.scores()[0].value}
        labels = run.dataset.truth[run.val_rows]
        scores = metrics.classification(labels, np.asarray(probabilities), run.dataset.classes)
        return {"val_loss": loss, "val_auc": scores[0].value}
