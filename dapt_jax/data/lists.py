"""Lists in files: tables with a header, rows without one, and names one to a line."""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapt_jax.data import identity
from dapt_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Row:
    """One row of a list without a header.

    Attributes:
        place: where it is ("row 1" is the first line).
        cells: its stripped cells; the first is never blank.
    """

    place: str
    cells: tuple[str, ...]


def read_rows(path: Path, fields: int, separator: str | None = None) -> list[Row]:
    """Reads a list without a header; any line ends, trailing blanks and blank lines are allowed.

    Args:
        path: the file.
        fields: cells of each row.
        separator: between cells, such as ","; None for any run of blanks or tabs.

    Raises:
        UserError: no such file, not text, no rows, a row with another number of cells, or a blank first cell.
    """
    rows = []
    for number, line in enumerate(_text(path, "list").splitlines(), start=1):
        if not line.strip():
            continue
        cells = (
            tuple(cell.strip() for cell in line.strip().split(separator))
            if separator
            else tuple(line.split())
        )
        if len(cells) != fields:
            raise UserError(
                f"{path}: row {number}: {len(cells)} fields, expected {fields}: {line.strip()[:60]!r}"
            )
        if not cells[0]:
            raise UserError(f"{path}: row {number}: no image named")
        rows.append(Row(f"row {number}", cells))
    if not rows:
        raise UserError(f"{path}: no rows; expected one image on each line")
    return rows


def flags(path: Path, place: str, cells: Sequence[str], names: Sequence[str]) -> tuple[float, ...]:
    """Cells that each are 0 or 1, one per class.

    Raises:
        UserError: anything else; names the file, the row and the class.
    """
    for cell, name in zip(cells, names, strict=True):
        if cell not in ("0", "1"):
            raise UserError(f"{path}: {place}: {name} is {cell!r}, expected 0 or 1")
    return tuple(map(float, cells))


def class_name(path: Path, place: str, cell: str, names: Sequence[str]) -> str:
    """The class whose number a cell holds.

    Raises:
        UserError: it is no number from 0 to the last class's; names the file and the row.
    """
    if not cell.isdecimal() or int(cell) >= len(names):
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise UserError(f"{path}: {place}: class {cell!r}, expected one of {numbered}")
    return names[int(cell)]


def read_columns(path: Path, what: str = "manifest") -> tuple[list[str], dict[str, list[str]]]:
    """Read a CSV file by column.

    Commas, semicolons or tabs separate cells, whichever the header holds most of outside quotation marks; a
    first line "sep=;" as spreadsheets write it says so itself. Columns without a name in which no row has a
    value are left out, and so is a first column without a name, the row numbers of pandas.

    Args:
        path: The file; a byte-order mark, any line ends and blank lines are allowed. UTF-8, or UTF-16 with
            its mark.
        what: What to call it in error lines.

    Returns:
        Where each row is in the file ("row 2" is the first below the header, as a spreadsheet counts), and
        the cells of each column as `identity.clean` gives them.

    Raises:
        UserError: No such file, not text, no rows, a column named twice, or a row of the wrong length.
    """
    text = _text(path, what)
    delimiter, skipped = _delimiter(text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t"
    )
    header: list[str] = []
    places: list[str] = []
    rows: list[list[str]] = []
    try:
        for number, raw in enumerate(reader):
            cells = [identity.clean(cell) for cell in raw]
            if number < skipped or not any(cells):
                continue
            if not header:
                header = cells
                continue
            extra = cells[len(header) :]
            if len(cells) < len(header) or any(extra):
                raise UserError(
                    f"{path}: row {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the header"
                )
            places.append(f"row {reader.line_num}")
            rows.append(cells[: len(header)])
    except csv.Error as error:
        raise UserError(f"{path}: row {reader.line_num}: {error}; is a quotation mark left open?") from error
    if not rows:
        raise UserError(
            f"{path}: no rows; expected a header such as image,label,patient and one row per image"
        )
    columns = [(name, [row[index] for row in rows]) for index, name in enumerate(header)]
    columns = [(name, cells) for index, (name, cells) in enumerate(columns) if name or (index and any(cells))]
    names = [name for name, _ in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice")
    return places, dict(columns)


def _delimiter(text: str) -> tuple[str, int]:
    """The mark between cells, and how many lines come before the header."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    if said := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first):
        return said[1], 1
    bare = re.sub(r'"[^"]*"', "", first)
    # Spreadsheets write semicolons where the comma is the decimal mark.
    return max(",;\t", key=bare.count), 0


def _text(path: Path, what: str) -> str:
    if path.is_dir():
        raise UserError(
            f"{path}: a folder; expected a CSV file, or kind 'folder' for images sorted into folders"
        )
    if not path.is_file():
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{path}: no such {what}; there is no folder {folder}")
        there = sorted(file.name for file in folder.iterdir())
        hint = nearest(path.name, there) if there else "the folder is empty"
        raise UserError(f"{path}: no such {what}; {hint}")
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8") from error
