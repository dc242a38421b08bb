"""A loss that is no number: which batch made it so, kept in a file."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dapt_jax.runtime import sharding
from dapt_jax.training.run import Run
from dapt_jax.training.steps import State

NAN = "nan"
"""Name of the folder of such batches in a workdir."""


class Diverged(Exception):
    """The loss, or a parameter, is no longer a number.

    Attributes:
        step: steps of the run that were done when it was noticed.
        value: of the loss.
    """

    def __init__(self, step: int, value: float):
        super().__init__(f"the loss is {value} at step {step}")
        self.step, self.value = step, value


def checksum(params: Any) -> str:
    """BLAKE2b of all parameters in tree order, to tell on another machine whether they are the same."""
    hashed = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(sharding.gather_to_host(params)):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()


@dataclasses.dataclass(frozen=True)
class Found:
    """The step that made something no number.

    Attributes:
        step: of the run, from 0.
        checksum: of the parameters before it.
        loss: of its batch, the weighted mean.
    """

    step: int
    checksum: str
    loss: float


def find(state: State, later: Iterator[State], until: int) -> Found | None:
    """Replays a run step by step.

    Args:
        state: where the replay starts; holds numbers only.
        later: the state after each step from there.
        until: number of steps of the run by which it was noticed.

    Returns:
        The first step after which the loss or a parameter is no number; None where that does not happen again.
    """
    before, total, weight = checksum(state["params"]), float(state["loss"]), float(state["weight"])
    for state in later:
        step = int(state["step"])
        fresh_epoch = float(state["weight"]) <= weight
        loss = float(state["loss"]) - (0.0 if fresh_epoch else total)
        mean = loss / max(float(state["weight"]) - (0.0 if fresh_epoch else weight), 1e-9)
        if not (np.isfinite(mean) and sharding.all_finite(state["params"])):
            return Found(step - 1, before, mean)
        if step >= until:
            return None
        before, total, weight = checksum(state["params"]), float(state["loss"]), float(state["weight"])
    return None


def keep_batch(folder: Path, run: Run, number: int, found: Found) -> Path:
    """Writes the batch of a step, as it was read and before any augmentation, with all that is needed to run it again.

    Args:
        folder: of a workdir, for such files.
        run: that diverged.
        number: of the phase.
        found: the step.

    Returns:
        The file: an npz with `images` uint8 [b, size, size, 3], `labels` (see `Dataset.targets`), `weights` float32 [b], `rows`
        int32 [b] (of the data set), `names` of the images, and `step`, `epoch`, `phase`, `seed`, `lr`, `loss`,
        `params_checksum`.
    """
    epoch, batch = divmod(found.step, run.timeline.steps_per_epoch)
    rows, weights = (each[batch] for each in run.order.epoch(epoch))
    program = run.programs[number]
    arm = f"{run.strategy}-seed{run.seed}" + (f"-{run.label.strip('/').replace('/', '-')}" if run.label else "")
    path = folder / f"{arm}-step{found.step + 1}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, images=run.dataset.images.batch(rows), labels=run.dataset.targets[rows], weights=weights, rows=rows,
        names=np.asarray([run.dataset.images.names[row] for row in rows]), step=found.step, epoch=epoch,
        phase=program.phase.name, seed=run.seed, lr=program.rate(found.step), loss=found.loss,
        params_checksum=found.checksum,
    )  # fmt: skip
    return path
