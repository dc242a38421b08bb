"""Limits of what Pillow takes minutes for in a hostile file: pages, frames, scans, comments."""

import itertools
import mmap
import os
import re
from pathlib import Path
from typing import BinaryIO, Literal

from dapt_jax.errors import UserError

MOST = 10_000
"""Most pages or frames of a file."""


_SCANS = 200
"""Most scans of a JPEG: each goes over all pixels, whatever its own size."""

_PNM_HEADER = 1 << 16
"""Most bytes of the header of a PGM or PPM, with its comments, which Pillow reads byte by byte."""


def check_header(path: Path) -> None:
    """Refuse a PBM, PGM or PPM whose numbers do not follow within its first 64 KiB.

    Raises:
        UserError: They do not.
    """
    with path.open("rb") as file:
        head = file.read(_PNM_HEADER)
    if len(head) < _PNM_HEADER or not re.match(rb"P[0-6fFyY]", head):
        return
    numbers = 2 if head[1:2] in b"14" else 3
    if not re.match(rb"P\w+(?:(?:\s|#[^\r\n]*[\r\n])+[\d.eE+-]+){%d}\s" % numbers, head):
        raise UserError(
            f"{path}: a PGM or PPM header of more than {_PNM_HEADER:,} bytes; expected {numbers} numbers"
        )


def check(path: Path, format: str | None) -> None:
    """Refuse a TIFF or a GIF of more than `MOST` pages or frames, and a JPEG of more than `_SCANS` scans.

    Other formats state how many they hold in a header.

    Args:
        path: The file.
        format: Pillow's name of its format.

    Raises:
        UserError: There are more.
    """
    if format in ("JPEG", "MPO"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if sum(1 for _ in itertools.islice(re.finditer(rb"\xff\xda", content), _SCANS + 1)) > _SCANS:
                raise UserError(f"{path}: a JPEG of more than {_SCANS} scans; expected one, or about ten")
    count = {"TIFF": _pages, "GIF": _frames}.get(format or "")
    if count is None:
        return
    with path.open("rb") as file:
        if count(file) > MOST:
            raise UserError(
                f"{path}: more than {MOST:,} pages or frames; expected one picture, or a volume (.nii, .dcm)"
            )


def _pages(file: BinaryIO) -> int:
    """Return the number of pages of a TIFF (TIFF 6.0, section 2), up to `MOST` + 1; a damaged chain ends."""
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    is_big = int.from_bytes(head[2:4], order) == 43
    count_size, entry_size, offset_size = (8, 20, 8) if is_big else (2, 12, 4)
    at = int.from_bytes(head[8:16] if is_big else head[4:8], order)
    seen: set[int] = set()
    while at and at not in seen and len(seen) <= MOST:
        seen.add(at)
        file.seek(min(at, 1 << 62))
        entries = int.from_bytes(file.read(count_size), order)
        file.seek(min(at + count_size + entries * entry_size, 1 << 62))
        at = int.from_bytes(file.read(offset_size), order)
    return len(seen)


def _frames(file: BinaryIO) -> int:
    """Return the number of frames of a GIF (GIF89a, appendix A), up to `MOST` + 1; a damaged chain ends."""
    head = file.read(13)
    _skip_table(file, head[10] if len(head) == 13 else 0)
    count = 0
    while count <= MOST:
        kind = file.read(1)
        if kind == b",":
            count += 1
            about = file.read(9)
            _skip_table(file, about[8] if len(about) == 9 else 0)
            file.read(1)
        elif kind == b"!":
            file.read(1)
        elif kind == b"\0":
            continue
        else:
            break
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
    return count


def _skip_table(file: BinaryIO, packed: int) -> None:
    """Skip a table of colours, if the packed field of its descriptor says that there is one."""
    if packed & 0x80:
        file.seek(3 << ((packed & 7) + 1), os.SEEK_CUR)
