"""Checkpoints of a run: state, data position, random seed and ledger as one, saved by orbax.

Saved are the leaves that some phase so far has trained, not the whole network again each time: what was never
trained is rebuilt from the source weights.
"""

import contextlib
import errno
import logging
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dapt_jax.errors import UserError
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import freezing
from dapt_jax.training.steps import PhaseProgram, State

Flat = dict[str, Any]
Restored = tuple[int, State, dict[str, Any]]
"""Step, the saved part of the state, and what was stored beside it."""


def _flat(tree: object) -> Flat:
    """Return a pytree as one dict from dotted paths to leaves, so that orbax files stay readable."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def saved_part(state: State, programs: Sequence[PhaseProgram], phase: int) -> State:
    """Return what a checkpoint in `phase` holds: what may differ from the source weights."""
    seen = programs[: phase + 1]
    touched = frozenset().union(*(program.mask.trainable for program in seen))
    has_new_stats = any(program.mask.batch_norm_modes for program in seen)
    return {
        **state,
        "params": freezing.prune(freezing.partition(state["params"], touched)[0]),
        "batch_stats": state["batch_stats"] if has_new_stats else {},
    }


class CheckpointStore(Protocol):
    """Where the checkpoints of a run go: see `CheckpointFolder`."""

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Save in the background."""

    def restore(self, layout: Callable[[int], State], at_most: int | None = None) -> Restored | None:
        """Return the newest checkpoint that can be read, or None."""

    def forget_after(self, step: int) -> None:
        """Remove every checkpoint of a later step."""

    def wait(self) -> None:
        """Wait until what was saved is on disk."""

    def close(self) -> None:
        """Wait, and close."""


class NoCheckpoints:
    """Saves nothing and holds nothing."""

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Do nothing."""

    def restore(self, layout: Callable[[int], State], at_most: int | None = None) -> None:
        """Return nothing."""

    def forget_after(self, step: int) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class CheckpointFolder:
    """The checkpoints of one run in a folder; the two newest are kept, so a torn one loses nothing.

    A full disk costs the checkpoint that did not fit, not the run: a line says so, and the ones before stay.

    They hold whole arrays, written by the primary process and broadcast to the others when they are read: a
    run may go on with another number of devices or processes, and only the primary process needs to reach the
    folder.
    """

    def __init__(
        self, folder: Path, keep: Sequence[int] = (), say: Callable[[str], None] = print, source: str = ""
    ):
        """Open a folder, which need not exist.

        Args:
            folder: Folder of the run.
            keep: Steps whose checkpoints stay beside the two newest.
            say: Receiver of a line for the user.
            source: Fingerprint of the weights that the run starts from; checkpoints of a run from others are
                refused.
        """
        # What orbax logs as an error it raises too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._folder, self._keep, self._say, self._source = folder.resolve(), tuple(keep), say, source
        self._torn: list[int] = []
        self._writes = processes.is_primary()
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._writes:
            self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = preservation_policy
        kept = policies.AnyPreservationPolicy([policies.LatestN(2), policies.CustomSteps(self._keep)])
        alone = ocp.options.MultiprocessingOptions()
        if processes.is_multi_process():
            alone = ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix="primary"
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept, multiprocessing_options=alone, create=False
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=("state", "meta"))

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Save in the background; `meta` holds plain JSON values. All processes have to call it."""
        flat = _flat(part)
        arrays = [leaf for leaf in flat.values() if isinstance(leaf, jax.Array)]
        is_sharded = processes.is_multi_process() or not all(leaf.is_fully_replicated for leaf in arrays)
        if is_sharded:
            flat = sharding.gather_to_host(flat)
        if not self._writes:
            return
        if is_sharded:
            flat = jax.tree.map(np.array, flat)  # copies: the next step donates the buffers
        self.wait()
        for torn in self._torn:  # where training comes to them again, they would be in its way
            self._remove(torn)
        self._torn = []
        if step in self._manager.all_steps():
            return
        about = {**meta, "source": self._source}
        items = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(about))
        with self._tolerant():
            self._manager.save(step, args=items)

    def restore(self, layout: Callable[[int], State], at_most: int | None = None) -> Restored | None:
        """Return the newest checkpoint that can be read, or None.

        Args:
            layout: Function from a step to the abstract tree that `save` was given there.
            at_most: Largest step that it may have.

        Returns:
            Step, the saved part of the state, and `meta`.

        Raises:
            UserError: The checkpoint is of a run from other source weights.
        """
        return processes.broadcast_from_primary(lambda: self._restore(layout, at_most))

    def _restore(self, layout: Callable[[int], State], at_most: int | None) -> Restored | None:
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            if at_most is not None and step > at_most:
                continue
            abstract = layout(step)
            flat = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _flat(abstract))
            items = ocp.args.Composite(state=ocp.args.StandardRestore(flat), meta=ocp.args.JsonRestore())
            try:
                found = self._manager.restore(step, args=items)
                leaves = [np.asarray(found.state[name]) for name in _flat(abstract)]
                meta = dict(found.meta)
            except Exception as error:  # orbax raises many kinds for a torn file
                reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
                self._say(
                    f"{self._folder / str(step)}: a checkpoint that cannot be read ({reason}): the one "
                    "before is used"
                )
                self._torn.append(step)
                continue
            if (source := meta.pop("source", self._source)) != self._source:
                raise UserError(
                    f"{self._folder}: this run was begun from other source weights (fingerprint "
                    f"{source[:16]} there, "
                    f"{self._source[:16]} now); expected the same file as then, or another --workdir"
                )
            return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta
        return None

    def forget_after(self, step: int) -> None:
        """Remove every checkpoint of a later step: a run that goes back comes to those steps again."""
        if not self._writes:
            return
        self.wait()
        for later in self._manager.all_steps():
            if later > step:
                self._remove(later)

    def _remove(self, step: int) -> None:
        shutil.rmtree(self._folder / str(step), ignore_errors=True)
        self._manager.reload()

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        if not self._writes:
            return
        with self._tolerant():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and free the manager's threads."""
        if not self._writes:
            return
        with self._tolerant():
            self._manager.close()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Go on after a save without room or, by the wall clock that orbax uses, without time."""
        try:
            yield
        except Exception as error:
            if not (is_full(error) or isinstance(error, TimeoutError)):
                raise
            lacking = "room" if is_full(error) else "time"
            self._say(
                f"{self._folder}: no {lacking} for a checkpoint: training goes on, and the last good one "
                "stays"
            )
            for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            self._manager = self._open()


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is a full disk, a quota or a largest file size."""
    limits = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while error is not None:
        if isinstance(error, OSError) and error.errno in limits:
            return True
        if any(
            os.strerror(limit) in str(error) for limit in limits
        ):  # tensorstore raises errors of its own kinds
            return True
        error = error.__cause__ or error.__context__
    return False
