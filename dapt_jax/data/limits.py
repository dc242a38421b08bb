"""What a file may cost: one limit for decoded data, and one border at which whatever a decoder raises becomes one line."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from dapt_jax.data.plane import one_line
from dapt_jax.errors import UserError

DECODED_BYTES = 1 << 30
"""Default of the limit: bytes that reading one file may take in memory beside the file itself."""

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
    """Refuse, from a header alone, what would take more memory than the limit.

    Args:
        path: The file.
        size: Bytes that reading it takes at its worst moment.
        what: What the header asks for, such as "an image of 9 x 9 pixels".

    Raises:
        UserError: The size is above the limit, or below zero.
    """
    if not 0 <= size <= _limit:
        raise UserError(
            f"{path}: {what} takes {_gibibytes(size)} to read, and the limit for decoded data is {_gibibytes(_limit)}; "
            "expected a smaller image (cut it into tiles or slices), or a higher limit"
        )


def _gibibytes(size: int) -> str:
    return f"{size / (1 << 30):,.3g} GiB"


class Bounded(io.BufferedReader):
    """A file of which nobody asks for more bytes than it has: buffers are made as long as damaged headers say."""

    def __init__(self, path: Path):
        """Opens a file."""
        super().__init__(io.FileIO(path))
        self._length = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        """Read at most so many bytes, and no more than are left."""
        left = max(self._length - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@contextlib.contextmanager
def border(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one `UserError`; by design, not by a list of exceptions.

    Decoders of damaged files raise anything: `TokenError`, `RecursionError`, `MemoryError`, `struct.error`,
    and, for callers who run with `-W error`, warnings. Only what ends a process on request passes.

    Args:
        path: The file that is read inside the `with` block.
        expected: What should have been there, for the end of the line.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); expected {expected}") from error
