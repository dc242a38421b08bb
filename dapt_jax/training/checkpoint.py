"""Checkpoints of a run with state, data position, random seed and ledger, saved by orbax.

A checkpoint holds only leaves that a phase has trained so far; all others are restored from the source
weights.
"""

import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dapt_jax.errors import UserError, is_full
from dapt_jax.runtime import home, processes, sharding
from dapt_jax.training import freezing
from dapt_jax.training.steps import PhaseProgram, State

_SECONDS_OF_STRAGGLERS = 10

_OUT_OF_REACH = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
"""Errors of reading that say nothing of what is stored: it may be whole, and must not be given up for them."""

Flat = dict[str, Any]
Restored = tuple[int, State, dict[str, Any]]
"""Step, the saved part of the state, and what was stored beside it."""


def _flat(tree: object) -> Flat:
    """Return a pytree as a flat dict from dotted paths to leaves, so that orbax files stay readable."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def saved_part(state: State, programs: Sequence[PhaseProgram], phase: int) -> State:
    """Return the content of a checkpoint in `phase`: leaves that may differ from the source weights."""
    seen = programs[: phase + 1]
    touched = frozenset().union(*(program.mask.trainable for program in seen))
    has_new_stats = any(program.mask.batch_norm_modes for program in seen)
    return {
        **state,
        "params": freezing.prune(freezing.partition(state["params"], touched)[0]),
        "batch_stats": state["batch_stats"] if has_new_stats else {},
    }


@functools.cache
def _ignore_late_callbacks() -> None:
    """Print no traceback where an array is written after its save failed and its event loop was closed.

    The failure itself is raised by `save` or `wait`; tensorstore has nobody to raise this one to.
    """
    earlier = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            earlier(unraisable)

    sys.unraisablehook = hook


class _OtherLayoutError(Exception):
    """The arrays of a checkpoint are not those that the run would save there."""


def _out_of_reach(error: BaseException) -> str:
    """Return why a checkpoint could not be read if that says nothing of what is stored; else nothing."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, MemoryError):
            return os.strerror(errno.ENOMEM)
        for number in _OUT_OF_REACH:  # tensorstore passes them on in words
            if getattr(below, "errno", None) == number or os.strerror(number) in str(below):
                return os.strerror(number)
        below = below.__cause__ or below.__context__
    return ""


class CheckpointStore(Protocol):
    """Interface for storing the checkpoints of a run: see `CheckpointFolder`."""

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Save in the background."""

    def restore(self, layout: Callable[[int], State], at_most: int | None = None) -> Restored | None:
        """Return the newest checkpoint that can be read, or None."""

    def forget_after(self, step: int) -> None:
        """Remove every checkpoint of a later step."""

    def wait(self) -> None:
        """Wait until all saves are on disk."""

    def close(self) -> None:
        """Wait, and close."""


class NoCheckpoints:
    """Storage without checkpoints."""

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
    """The checkpoints of one run in a folder; the two newest remain, so a truncated one loses little.

    A full disk loses the checkpoint that did not fit, not the run: it is reported, and earlier ones remain.

    They hold whole arrays, written by the primary process and broadcast to the others when they are read: a
    run may resume with a different number of devices or processes, and only the primary process needs to
    reach the folder.
    """

    def __init__(
        self,
        folder: Path,
        keep: Sequence[int] = (),
        say: Callable[[str], None] = print,
        source: str = "",
        of_run: Mapping[str, str] | None = None,
    ):
        """Open a folder, which need not exist.

        Args:
            folder: Folder of the run.
            keep: Steps whose checkpoints remain in addition to the two newest.
            say: Function that receives a line for the user.
            source: Fingerprint of the weights that the run starts from; checkpoints of a run from others are
                refused.
            of_run: Digest of each part of the run by name (see `run_identity.digests`); checkpoints of a run of
                which one is another are refused. Those of earlier versions have none.
        """
        # Orbax also raises what it logs as an error, and one of the errors of tasks that fail together, of which
        # asyncio logs the others.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _ignore_late_callbacks()
        self._folder, self._keep, self._say = home.expanded(folder).resolve(), tuple(keep), say
        self._source, self._of_run = source, dict(of_run or {})
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
            preservation_policy=kept,
            multiprocessing_options=alone,
            create=False,
            # Where a folder cannot be made, threads would wait for it for 5 minutes, and so would the exit.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=("state", "meta"))

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Save in the background; `meta` holds plain JSON values. All processes must call it."""
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
        for torn in self._torn:  # they would block a save when training reaches these steps again
            self._remove(torn)
        self._torn = []
        if step in self._manager.all_steps():
            return
        about = {**meta, "source": self._source, "run": self._of_run}
        items = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(about))
        with self._tolerant():
            self._manager.save(step, args=items)

    def restore(self, layout: Callable[[int], State], at_most: int | None = None) -> Restored | None:
        """Return the newest checkpoint that can be read, or None.

        Args:
            layout: Function from a step to the abstract tree that `save` was given there.
            at_most: Largest step of the checkpoint.

        Returns:
            Step, the saved part of the state, and `meta`.

        Raises:
            UserError: The checkpoint belongs to another run, or to one from different source weights; or it is out
                of reach for now.
        """
        return processes.broadcast_from_primary(lambda: self._restore(layout, at_most))

    def _restore(self, layout: Callable[[int], State], at_most: int | None) -> Restored | None:
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            if at_most is not None and step > at_most:
                continue
            try:
                # First, since another run may have fewer steps, and arrays of another layout.
                meta = dict(self._item(step, meta=ocp.args.JsonRestore()).meta)
                self._check_same(meta.pop("source", self._source), meta.pop("run", {}))
                abstract = layout(step)
                leaves = self._arrays(step, _flat(abstract))
            except UserError:
                raise
            except _OtherLayoutError:
                self._pass_over(
                    step,
                    "a checkpoint whose arrays have another layout, as those of an earlier version: the one before is "
                    "used, or the run starts again",
                )
            except Exception as error:  # orbax raises many kinds of errors for a truncated file
                if why := _out_of_reach(error):
                    raise UserError(
                        f"{self._folder / str(step)}: this checkpoint is out of reach ({why}); expected one that can be "
                        "read, with the same command, or none: without it the one before is used"
                    ) from error
                reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
                self._pass_over(step, f"a checkpoint that cannot be read ({reason}): the one before is used")
            else:
                return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), meta
        return None

    def _pass_over(self, step: int, why: str) -> None:
        self._say(f"{self._folder / str(step)}: {why}")
        self._torn.append(step)

    def _check_same(self, source: str, of_run: Mapping[str, str]) -> None:
        """Refuse a checkpoint of other source weights, or of another run.

        Args:
            source: Fingerprint of the weights there.
            of_run: Digests of the run there; empty in a checkpoint of an earlier version.
        """
        if source != self._source:
            raise UserError(
                f"{self._folder}: this run was begun from other source weights (fingerprint "
                f"{source[:16]} there, "
                f"{self._source[:16]} now); expected the same file as then, or another --workdir"
            )
        others = [name for name, digest in self._of_run.items() if of_run.get(name, digest) != digest]
        if others:
            raise UserError(
                f"{self._folder} holds checkpoints of another run: other are its {', '.join(others)}; expected the run "
                "as it was begun, or another folder (checkpoint_dir, or --workdir of a study)"
            )

    def _arrays(self, step: int, flat: Flat) -> list[np.ndarray]:
        """Return the arrays of a checkpoint in the order of an abstract flat tree.

        Raises:
            _OtherLayoutError: They have other names or shapes.
        """
        stored = ocp.StandardCheckpointHandler().metadata(self._folder / str(step) / "state").tree
        there, here = ({name: leaf.shape for name, leaf in each.items()} for each in (stored, flat))
        if there != here:
            raise _OtherLayoutError
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flat)
        found = self._item(step, state=ocp.args.StandardRestore(wanted)).state
        return [np.asarray(found[name]) for name in flat]

    def _item(self, step: int, **how: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**how))

    def forget_after(self, step: int) -> None:
        """Remove every checkpoint of a later step, since a rollback repeats those steps."""
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
        """Wait until all saves are on disk."""
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
        """Continue after a save that failed for lack of space or, by orbax's wall clock, of time."""
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
            self._remove_partial()
            self._manager = self._open()

    def _remove_partial(self) -> None:
        """Remove what a failed save left; writers of its other arrays may still add files for a moment."""
        until = time.monotonic() + _SECONDS_OF_STRAGGLERS
        while partial := list(self._folder.glob("*.orbax-checkpoint-tmp*")):
            for folder in partial:
                shutil.rmtree(folder, ignore_errors=True)
            if time.monotonic() > until:
                return
            time.sleep(0.02)
