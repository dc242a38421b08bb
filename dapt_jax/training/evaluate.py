"""Loss and AUC, or Dice, on the validation rows."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, Shaped

from dapt_jax.data import crops, pipeline
from dapt_jax.losses import Loss, SegmentationLoss
from dapt_jax.models.network import Network
from dapt_jax.objectives import Objective
from dapt_jax.runtime import processes, sharding
from dapt_jax.training.cache.prefix import Activations
from dapt_jax.training.epoch_metrics import validation_metrics
from dapt_jax.training.freezing import Tree
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram, State, eval_transform, evaluation_params


@functools.cache
def forward_fn(model: Network, boundary: int | None) -> Callable[..., jax.Array]:
    """Return the jitted function from activations at a boundary, or images for None, to logits."""
    if boundary is None:
        return jax.jit(model.__call__)
    return jax.jit(lambda params, batch_stats, x: model.suffix(params, batch_stats, x, boundary)[0])


class ShardedForward:
    """A function of a network and a batch whose rows are sharded over the devices."""

    def __init__(self, function: Callable[..., jax.Array], params: Tree, batch_stats: Tree, mesh: Mesh):
        """Put the network on every device.

        Args:
            function: Jitted function from parameters, statistics and a batch to an array with a row for each
                of the batch's.
            params: Parameters of the network.
            batch_stats: Batch-norm statistics of the network.
            mesh: Devices.
        """
        self._function, self._mesh = function, mesh
        self._weights = sharding.shard_state((params, batch_stats), mesh)

    def __call__(self, local_batch: PyTree[jax.Array | np.ndarray]) -> np.ndarray:
        """Return the rows of the global batch, from this process's slice: see `sharding.local_slice`."""
        return sharding.gather_to_host(
            self._function(*self._weights, sharding.shard_batch(local_batch, self._mesh))
        )


class Evaluator:
    """Metrics of a phase's network on the run's validation rows, through the cached prefix if any."""

    def __init__(self, run: TrainingRun, program: PhaseProgram, clean: Activations | None, mesh: Mesh):
        """Prepare the forward pass.

        Args:
            run: The run.
            program: Program of its phase.
            clean: Activations of the run's data set without augmentation, or None to start from images.
            mesh: Devices.
        """
        self._run, self._program, self._clean, self._mesh = run, program, clean, mesh
        self._forward = forward_fn(program.model, program.mask.boundary if clean else None)
        self._collection = validation_metrics(run.dataset)

    def __call__(self, state: State, logits: np.ndarray | None = None) -> dict[str, float]:
        """Return `val_loss`, and `val_auc` or of masks `val_dice`; nothing without validation rows.

        Args:
            state: State of the phase.
            logits: Logits of the validation rows, float32 [v, outputs] or [v, h, w, outputs], where they are
                known.
        """
        if not len(self._run.val_rows):
            return {}
        known = self._logits(state) if logits is None else logits
        # Schedules and early stopping depend on these metrics: rounding must not make processes diverge.
        return processes.broadcast_from_primary(lambda: self._metrics(known))

    def _logits(self, state: State) -> np.ndarray:
        """Return the logits of the validation rows."""
        run = self._run
        forward = ShardedForward(self._forward, evaluation_params(state), state["batch_stats"], self._mesh)
        own = sharding.local_slice(run.batch_size, self._mesh)
        parts = []
        if self._clean:
            for start in range(0, len(run.val_rows), run.batch_size):
                rows = run.val_rows[start : start + run.batch_size]
                x = self._program.to_compute_dtype(self._clean.rows(0, np.resize(rows, run.batch_size)[own]))
                parts.append(forward(x)[: len(rows)])
        else:
            side = eval_transform(self._program.model, self._program.augment).size(run.dataset.images.size)
            for images, rows in pipeline.in_order(run.dataset, run.val_rows, run.batch_size, own):
                parts.append(forward(crops.centre(images, side))[: len(rows)])
        return np.concatenate(parts)

    def _metrics(self, logits: np.ndarray) -> dict[str, float]:
        """Return the metrics of logits."""
        run, objective = self._run, self._program.objective
        assert not isinstance(objective, Objective)
        targets = run.dataset.targets[run.val_rows]
        # Of classes, rows are padded to a number that seeds share, and with it the program.
        rows = len(logits) if targets.ndim > 2 else len(run.padded_val_rows)
        padded = (np.resize(each, (rows, *each.shape[1:])) for each in (logits, targets))
        loss, predicted = (
            np.asarray(each)[: len(logits)] for each in _losses_and_predictions(objective, *padded)
        )
        truth = targets if isinstance(objective, SegmentationLoss) else run.dataset.truth[run.val_rows]
        found = self._collection.single_from_model_output(loss=loss, truth=truth, predicted=predicted)
        return dict(found.compute())


@functools.partial(jax.jit, static_argnums=0)
def _losses_and_predictions(
    objective: Loss, logits: Float[Array, "v ..."], targets: Shaped[Array, "v ..."]
) -> tuple[Float[Array, " v"], Shaped[Array, "v ..."]]:
    """Return the loss of each row, and its probabilities, or of masks the classes that they decide for."""
    probabilities = objective.probabilities(logits)
    predicted = objective.decide(probabilities) if isinstance(objective, SegmentationLoss) else probabilities
    return objective(logits, targets), predicted
