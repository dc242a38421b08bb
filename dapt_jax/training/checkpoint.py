"""Checkpoints of a run: state, data position, random seed and ledger as one, saved by orbax.

Saved are the leaves that some phase so far has trained, not the whole network again each time: what was never trained
is rebuilt from the source weights.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dapt_jax.training import freezing
from dapt_jax.training.steps import PhaseProgram, State

Flat = dict[str, Any]


def _flat(tree: Any) -> Flat:
    """A pytree as one dict from dotted paths to leaves: the form in which orbax files stay readable."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def saved_part(state: State, programs: list[PhaseProgram], phase: int) -> State:
    """What a checkpoint in `phase` holds: everything that may differ from the source weights, and nothing else."""
    seen = programs[: phase + 1]
    touched = frozenset().union(*(program.mask.trainable for program in seen))
    has_new_stats = any(program.mask.norms for program in seen)
    return {
        **state,
        "params": freezing.prune(freezing.partition(state["params"], touched)[0]),
        "stats": state["stats"] if has_new_stats else {},
    }


class Checkpoints:
    """The checkpoints of one run in a folder; the two newest are kept, so a torn one loses nothing."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=("state", "meta"))

    def save(self, step: int, part: State, meta: dict[str, Any]) -> None:
        """Saves in the background; `meta` is JSON: data position, plateau, clock, curve."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(state=ocp.args.StandardSave(_flat(part)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items)

    def restore(self, layout: Callable[[int], State]) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None.

        Args:
            layout: from a step to the abstract tree that `save` was given there; known from the config alone.

        Returns:
            Step, the saved part of the state, and `meta`.
        """
        self._manager.wait_until_finished()
        for step in sorted(self._manager.all_steps(), reverse=True):
            abstract = layout(step)
            flat = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _flat(abstract))
            items = ocp.args.Composite(state=ocp.args.StandardRestore(flat), meta=ocp.args.JsonRestore())
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:  # orbax raises many kinds for a torn file
                logging.getLogger(__name__).warning(
                    "checkpoint %d cannot be read (%s): trying the one before", step, error
                )
                continue
            leaves = [np.asarray(found.state[name]) for name in _flat(abstract)]
            return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), found.meta
        return None

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the manager's threads."""
        self._manager.close()
