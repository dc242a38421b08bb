"""Limits for reading a file: memory for decoded data, and a context that makes decoder errors one line."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from dapt_jax.cost import hardware
from dapt_jax.data.plane import one_line
from dapt_jax.errors import UserError

DECODED_BYTES = 1 << 30
"""Default limit of the bytes of memory that reading one file may take in addition to the file itself."""

_limit = DECODED_BYTES


def decoded_bytes() -> int:
    """Return the limit in bytes."""
    return _limit


def set_decoded_bytes(limit: int) -> None:
    """Set the limit for this process.

    Args:
        limit: Bytes that decoding one file may take.

    Raises:
        UserError: The limit is below 1 MiB.
    """
    global _limit
    if limit < 1 << 20:
        raise UserError(f"a limit of {limit:,} bytes for decoded data; expected at least {1 << 20:,}")
    _limit = int(limit)


def check(path: Path, size: int, what: str) -> None:
    """Refuse, from a header alone, data that would take more memory than the limit.

    Args:
        path: The file.
        size: Peak number of bytes needed to read it.
        what: Contents that the header declares, such as "an image of 9 x 9 pixels".

    Raises:
        UserError: The size is above the limit, or negative.
    """
    if not 0 <= size <= _limit:
        raise UserError(
            f"{path}: {what} takes {_gibibytes(size)} to read, and the limit for decoded data is "
            f"{_gibibytes(_limit)}; expected a smaller image (cut it into tiles or slices), or a higher "
            "data.max_image_mb"
        )


def check_memory(path: Path, size: int, what: str, expected: str) -> None:
    """Refuse decoded data of a whole set that do not fit into the memory that is free.

    A small file may declare ten million images of one pixel, each of which becomes one of the model's size.

    Args:
        path: The file.
        size: Bytes that stay in memory.
        what: What the file declares, such as "9 images of 28 pixels".
        expected: What would fit, for the end of the line.

    Raises:
        UserError: More than the free memory; never where the system does not report it.
    """
    if 0 < (free := hardware.free_memory_bytes()) < size:
        raise UserError(
            f"{path}: {what} take {_gibibytes(size)}, and {_gibibytes(free)} of memory are free; "
            f"expected {expected}"
        )


def _gibibytes(size: int) -> str:
    return f"{size / (1 << 30):,.3g} GiB"


class Bounded(io.BufferedReader):
    """A file that never reads more bytes than it has.

    Decoders allocate buffers of the length that a damaged header declares.
    """

    def __init__(self, path: Path):
        """Open a file."""
        super().__init__(io.FileIO(path))
        self._length = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        """Read at most this many bytes, and no more than are left."""
        left = max(self._length - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@contextlib.contextmanager
def border(path: Path, expected: str) -> Iterator[None]:
    """Turn any exception of a decoder into one `UserError`; by design, not by a list of exceptions.

    Decoders of damaged files raise any exception: `TokenError`, `RecursionError`, `MemoryError`,
    `struct.error` and, if Python runs with `-W error`, warnings. Only exceptions that end a process on
    request pass.

    Args:
        path: The file that is read inside the `with` block.
        expected: Contents that were expected, for the end of the line.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected {expected}") from error
