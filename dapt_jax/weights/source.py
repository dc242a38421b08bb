"""Contents of a weight file: arrays by name, each read when it is accessed."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.data import limits
from dapt_jax.errors import UserError

SPARE = 64 << 20
"""Bytes that reading may use beyond twice a file's size, for names and for very small files."""


def check_unpacked(size: int, path: Path, packed: int) -> None:
    """Refuse data that decompress to more than twice their file's size (plus `SPARE`).

    Weights are hardly compressible; decompression bombs are.

    Args:
        size: Decompressed size in bytes.
        path: Path of the file, for the error line.
        packed: Size of the file in bytes.

    Raises:
        UserError: The decompressed size is too large.
    """
    if size > 2 * packed + SPARE:
        raise UserError(
            f"{path}: {packed:,} bytes that unpack to {size:,}; expected at most twice the file's size "
            "(save the weights without compression)"
        )


def metadata_of(text: bytes, origin: str) -> dict[str, str]:
    """Return the metadata that a file of ours stores as JSON, text by text.

    Raises:
        UserError: The text is not such metadata.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise UserError(f"{origin}: damaged metadata; expected those that dapt_jax writes, or none")
    return found


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that is still in its file.

    Attributes:
        shape: Shape of the array.
        dtype: Type of its elements in the file.
        read: Function that reads the values; raises UserError if the file is damaged there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
    """Arrays by their names in a file, in the file's order; each is read again at every access.

    Arrays that are not accessed (an optimiser's state, a second encoder) therefore use no memory.

    Attributes:
        origin: Origin in reports and errors: the path, and the container inside the file if the arrays are
            not at its top level (`moco.pth.tar ['state_dict']`).
        path: The file or folder; None for arrays without a file.
        files: Further files with arrays, if `path` is an index of them.
        containers: Names of dicts that the keys start with, if several dicts contain arrays.
        alternatives: Other encoders of the file, by the name that selects them.
        note: Reason why these arrays were chosen instead of the alternatives, in words.
        unread: Classes of objects in the file that were not built.
        metadata: Text that the file stores beside its arrays.
    """

    def __init__(
        self,
        arrays: Mapping[str, Stored | np.ndarray],
        origin: str,
        *,
        path: Path | None = None,
        files: Sequence[Path] = (),
        containers: Sequence[str] = (),
        alternatives: Mapping[str, "Weights"] | None = None,
        note: str = "",
        unread: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
    ):
        self._arrays = dict(arrays)
        self.origin = origin
        self.path = path
        self.files = tuple(files)
        self.containers = tuple(containers)
        self.alternatives = dict(alternatives or {})
        self.note = note
        self.unread = tuple(unread)
        self.metadata = dict(metadata or {})

    def __getitem__(self, key: str) -> np.ndarray:
        found = self._arrays[key]
        if not isinstance(found, Stored):
            return found
        with limits.border(self.path or Path(self.origin), f"the array {key[:80]!r}"):
            return found.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def stored(self, key: str) -> Stored:
        """Return an array that is still in its file."""
        found = self._arrays[key]
        return found if isinstance(found, Stored) else Stored(found.shape, found.dtype, lambda: found)

    def like(self, key: str) -> np.ndarray:
        """Return an array's shape and dtype without its values: a read-only view of one zero."""
        found = self._arrays[key]
        # A shape with a side of 0 may have others whose product no array can have.
        with limits.border(self.path or Path(self.origin), f"a possible shape of {key[:80]!r}"):
            return np.broadcast_to(np.zeros((), found.dtype), found.shape)

    def only(self, keep: Callable[[str], bool]) -> "Weights":
        """Return the arrays whose names satisfy a condition."""
        return self._with({key: found for key, found in self._arrays.items() if keep(key)}, self.origin)

    def inside(self, container: str) -> "Weights":
        """Return the arrays of one of `containers`, by their names in it."""
        start = f"{container}."
        arrays = {
            key.removeprefix(start): found for key, found in self._arrays.items() if key.startswith(start)
        }
        names = "".join(f" [{part!r}]" for part in container.split("."))
        made = self._with(arrays, f"{self.origin}{names}")
        made.containers = ()
        return made

    def replaced(self, arrays: Mapping[str, Stored | np.ndarray]) -> "Weights":
        """Return other arrays of the same file."""
        return self._with(arrays, self.origin)

    def _with(self, arrays: Mapping[str, Stored | np.ndarray], origin: str) -> "Weights":
        about = {name: getattr(self, name) for name in _ABOUT}
        return Weights(arrays, origin, **about)


_ABOUT = ("path", "files", "containers", "alternatives", "note", "unread", "metadata")
