"""What a weight file holds: arrays by name, each read when it is asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.errors import UserError

SPARE = 64 << 20
"""Bytes that reading may take beyond twice a file's size: room for names, and for files of a few bytes."""


def check_unpacked(size: int, path: Path, packed: int) -> None:
    """Refuse what would unpack to more than twice its file (and `SPARE`): weights hardly compress, bombs do.

    Args:
        size: Bytes when unpacked.
        path: Path of the file, for the error line.
        packed: Bytes of the file.

    Raises:
        UserError: It is too large.
    """
    if size > 2 * packed + SPARE:
        raise UserError(
            f"{path}: {packed:,} bytes that unpack to {size:,}; expected at most twice the file's size "
            "(save the weights without compression)"
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array that is still in its file.

    Attributes:
        shape: Shape of the array.
        dtype: Type of its elements in the file.
        read: Function that reads the numbers; raises UserError where the file is damaged there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
    """Arrays by the names that the file gives them, in the file's order; each is read anew when it is asked for.

    So what nobody asks for (an optimiser's state, a second encoder) costs no memory.

    Attributes:
        origin: Where they come from, as reports and error lines name it: the path, and the container inside
            the file where the arrays are not at its top level (`moco.pth.tar ['state_dict']`).
        path: The file or folder; None for arrays that come from none.
        files: Further files that hold the arrays, where `path` is an index of them.
        containers: Names of dicts of the file that the keys start with, where several hold arrays.
        alternatives: Other encoders of the file, by the name that a user selects them with.
        note: Why these arrays and not the alternatives, in words.
        unread: Classes of objects in the file that were not built.
        metadata: Text that the file carries beside its arrays.
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
        return found.read() if isinstance(found, Stored) else found

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
        """Return an array's shape and dtype without its numbers: a read-only view of one zero."""
        found = self._arrays[key]
        return np.broadcast_to(np.zeros((), found.dtype), found.shape)

    def only(self, keep: Callable[[str], bool]) -> "Weights":
        """Return those whose name passes."""
        return self._with({key: found for key, found in self._arrays.items() if keep(key)}, self.origin)

    def inside(self, container: str) -> "Weights":
        """Return the arrays of one of `containers`, by their names within it."""
        start = f"{container}."
        arrays = {
            key.removeprefix(start): found for key, found in self._arrays.items() if key.startswith(start)
        }
        names = "".join(f" [{part!r}]" for part in container.split("."))
        made = self._with(arrays, f"{self.origin}{names}")
        made.containers = ()
        return made

    def _with(self, arrays: Mapping[str, Stored | np.ndarray], origin: str) -> "Weights":
        about = {name: getattr(self, name) for name in _ABOUT}
        return Weights(arrays, origin, **about)


_ABOUT = ("path", "files", "containers", "alternatives", "note", "unread", "metadata")
