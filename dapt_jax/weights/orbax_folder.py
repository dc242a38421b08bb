"""Reading of our orbax checkpoints: a folder with one array per path (`export.write_orbax`)."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from dapt_jax.errors import UserError
from dapt_jax.weights.source import Stored, Weights, check_unpacked, metadata_of

ABOUT = "dapt_jax.json"
"""File beside the arrays of what a folder of ours says of them: see `export.about_encoder`."""
_MARK = "_METADATA"
_MOST_BYTES = 1 << 20


def is_one(path: Path) -> bool:
    """Return whether a folder is an orbax checkpoint."""
    return (path / _MARK).is_file()


def read(path: Path) -> Weights:
    """Read the arrays of an orbax checkpoint by path, each when it is accessed.

    Raises:
        UserError: The folder is not such a checkpoint, is damaged, or declares arrays of more than twice its
            size.
    """
    if not is_one(path):
        names = ", ".join(sorted(child.name for child in path.iterdir())[:6]) or "nothing"
        raise UserError(
            f"{path}: a folder that is not an orbax checkpoint (no {_MARK}); expected a weight file; it "
            f"holds {names}"
        )
    root = path.resolve()
    for child in path.rglob("*"):
        if child.is_symlink() and not child.resolve().is_relative_to(root):
            raise UserError(
                f"{path}: {child.relative_to(path)} in it leads to another folder; expected files, not links"
            )
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # the error's line contains what it would log
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path.resolve()).item_metadata.tree
    except Exception as error:  # orbax raises many types for an incomplete folder
        raise _damaged(path, error) from None
    arrays: dict[str, Stored] = {}
    size = 0
    for key, leaf in tree.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise UserError(
                f"{path}: {key!r} is not an array; expected one array per path, as mode=export writes"
            )
        # A chunk is allocated whole, however little of it belongs to the array.
        chunk = getattr(leaf.storage, "chunk_shape", None) or ()
        size += max(math.prod(leaf.shape), math.prod(chunk)) * np.dtype(leaf.dtype).itemsize
        arrays[key] = Stored(tuple(leaf.shape), np.dtype(leaf.dtype), _reader(path, key, leaf))
    if not arrays:
        raise UserError(f"{path}: an orbax checkpoint without arrays")
    check_unpacked(size, path, sum(child.stat().st_size for child in root.rglob("*")))
    about = path / ABOUT
    is_told = about.is_file() and about.stat().st_size <= _MOST_BYTES
    metadata = metadata_of(about.read_bytes(), str(about)) if is_told else {}
    return Weights(arrays, str(path), path=path, metadata=metadata)


def _reader(path: Path, key: str, leaf: ocp.metadata.ArrayMetadata) -> Callable[[], np.ndarray]:
    def build() -> np.ndarray:
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                wanted = {key: ocp.RestoreArgs(restore_type=np.ndarray)}
                arguments = ocp.args.PyTreeRestore(
                    item={key: leaf}, restore_args=wanted, partial_restore=True
                )
                return np.asarray(checkpointer.restore(path.resolve(), args=arguments)[key])
        except Exception as error:
            raise _damaged(path, error) from None

    return build


def _damaged(path: Path, error: Exception) -> UserError:
    told = " ".join(str(error).split())[:160]
    return UserError(f"{path}: an orbax checkpoint that cannot be read ({type(error).__name__}: {told})")
