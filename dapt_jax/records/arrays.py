"""Array files of a workdir: written atomically, and read with type checks."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dapt_jax.errors import UserError
from dapt_jax.runtime import atomic_files

LARGEST_BYTES = 8 << 30
"""A file whose arrays claim more than this is taken for damaged."""


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, without unpickling anything.

    Raises:
        UserError: The file cannot be read or is damaged.
    """
    try:
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            if (claimed := sum(member.file_size for member in archive.infolist())) > LARGEST_BYTES:
                raise UserError(f"{path}: claims {claimed} bytes of arrays; expected {LARGEST_BYTES} at most")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (Exception, MemoryError) as error:
        raise UserError(f"{path}: not an .npz of arrays ({_words(error)}); delete the file") from error
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # NumPy returns a member that is not an array as bytes
            raise UserError(f"{path}: {name} is no array; delete the file")
    return found


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replace an .npz file atomically: a reader sees the old file or the new one, even after a kill."""
    with atomic_files.replacing(path) as file:
        np.savez_compressed(file, **arrays)


def _words(error: BaseException) -> str:
    """Return the first line of an exception's text, or the exception's name if the text is empty."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
