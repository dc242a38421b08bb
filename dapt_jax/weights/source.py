"""What a weight file holds: arrays by name, each read when it is asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dapt_jax.errors import UserError

SPARE = 64 << 20
"""Bytes that reading may take beyond twice a file's size: room for names, and for files of a few bytes."""


def check_unpacked(size: int, path: Any, packed: int) -> None:
    """Refuses what would unpack to more than twice its file (and `SPARE`): weights hardly compress, bombs do.

    Args:
        size: bytes when unpacked.
        path: of the file, for the error line.
        packed: bytes of the file.

    Raises:
        UserError: it is too large.
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
        shape: of the array.
        dtype: of its elements in the file.
        read: gets the numbers; raises UserError where the file is damaged there.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
    """Arrays by the names that the file gives them, in the file's order; each is read anew when it is asked for.

    So what nobody asks for (an optimiser's state, a second encoder) costs no memory.

    Attributes:
        origin: where they come from, as reports and error lines name it: the path, and the container inside the file
            where the arrays are not at its top level (`moco.pth.tar ['state_dict']`).
    """

    def __init__(self, arrays: Mapping[str, Stored | np.ndarray], origin: str):
        self._arrays = dict(arrays)
        self.origin = origin

    def __getitem__(self, key: str) -> np.ndarray:
        found = self._arrays[key]
        return found.read() if isinstance(found, Stored) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, key: object) -> bool:
        return key in self._arrays

    def like(self, key: str) -> np.ndarray:
        """An array's shape and dtype without its numbers: a read-only view of one zero."""
        found = self._arrays[key]
        return np.broadcast_to(np.zeros((), found.dtype), found.shape)

    def only(self, keep: Callable[[str], bool]) -> "Weights":
        """Those whose name passes."""
        return Weights({key: found for key, found in self._arrays.items() if keep(key)}, self.origin)
