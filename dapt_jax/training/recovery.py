"""Recovery from a non-finite loss: a replay finds the step that caused it, and saves its batch."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dapt_jax.data import file_crops
from dapt_jax.runtime import sharding
from dapt_jax.training.freezing import Tree
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.step_runners import StepReport
from dapt_jax.training.steps import State

NAN = "nan"
"""Name of the folder of such batches in a workdir."""


class PhaseDiverged(Exception):
    """The loss, or a parameter, is no longer finite.

    Attributes:
        step: Steps of the run that were finished at detection.
        value: The loss.
    """

    def __init__(self, step: int, value: float):
        super().__init__(f"the loss is {value} at step {step}")
        self.step, self.value = step, value


@dataclasses.dataclass(frozen=True)
class Rollback:
    """The single rollback of a run to the start of a phase that has diverged.

    Attributes:
        phase: Index of the phase.
        step: Step of the run at which it had diverged.
        steps: Steps of the phase in the failed attempt.
        lr_factor: Factor on the learning rate of the second attempt.
        spent: Cost of the first attempt: the state of its meter, and its cache fill.
    """

    phase: int
    step: int
    steps: int
    lr_factor: float
    spent: dict[str, Any]


def check_loss(report: StepReport) -> None:
    """Refuse a non-finite loss.

    Raises:
        PhaseDiverged: The loss is not finite.
    """
    if not math.isfinite(loss := report.metrics.compute()["loss"]):
        raise PhaseDiverged(report.step, loss)


def checksum(params: Tree) -> str:
    """Return BLAKE2b of all parameters in tree order, to compare them with those of another machine."""
    hashed = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(sharding.gather_to_host(params)):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()


@dataclasses.dataclass(frozen=True)
class NonFiniteStep:
    """The step that made the loss or a parameter non-finite.

    Attributes:
        step: Index of the step in the run.
        checksum: Checksum of the parameters before it.
        loss: Weighted mean loss of its batch.
    """

    step: int
    checksum: str
    loss: float


def find_step(state: State, replayed: Iterator[State], last_step: int) -> NonFiniteStep | None:
    """Find the step that made the loss or a parameter non-finite.

    Args:
        state: State that the replay starts from; it is finite.
        replayed: State after each step from there.
        last_step: Steps of the run at detection.

    Returns:
        The first step after which the loss or a parameter is not finite; None where that is not
        reproduced.
    """
    before, total, weight = checksum(state["params"]), float(state["loss"]), float(state["weight"])
    for state in replayed:
        step = int(state["step"])
        is_new_epoch = float(state["weight"]) <= weight
        loss = float(state["loss"]) - (0.0 if is_new_epoch else total)
        mean = loss / max(float(state["weight"]) - (0.0 if is_new_epoch else weight), 1e-9)
        if not (np.isfinite(mean) and sharding.all_finite(state["params"])):
            return NonFiniteStep(step - 1, before, mean)
        if step >= last_step:
            return None
        before, total, weight = checksum(state["params"]), float(state["loss"]), float(state["weight"])
    return None


def save_batch(folder: Path, run: TrainingRun, number: int, found: NonFiniteStep) -> Path:
    """Write the unaugmented batch of a step, with everything needed to rerun it.

    Args:
        folder: Folder of a workdir for such files.
        run: Run that has diverged.
        number: Index of the phase.
        found: The step.

    Returns:
        Path of an npz with `images` uint8 [b, size, size, 3], `labels` (see `Dataset.targets`), `weights`
        float32 [b], `rows` int32 [b] (of the data set), `names` of the images, and `step`, `epoch`, `phase`,
        `seed`, `lr`, `loss`, `params_checksum`.
    """
    epoch, batch = divmod(found.step, run.steps_per_epoch)
    rows, weights = (each[batch] for each in run.order.epoch(epoch))
    program, tag = run.programs[number], run.tag
    arm = f"{tag.strategy}-seed{run.seed}" + (
        f"-{tag.label.strip('/').replace('/', '-')}" if tag.label else ""
    )
    path = folder / f"{arm}-step{found.step + 1}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        images=file_crops.batch(
            run.images_of(program), program.augment, rows, program.view_seed, program.view(epoch)
        ),
        labels=run.dataset.targets[rows],
        weights=weights,
        rows=rows,
        names=np.asarray([run.dataset.images.names[row] for row in rows]),
        step=found.step,
        epoch=epoch,
        phase=program.phase.name,
        seed=run.seed,
        lr=program.lr(found.step),
        loss=found.loss,
        params_checksum=found.checksum,
    )
    return path
