"""Lists in files: tables with a header, rows without one, and one name per line."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapt_jax.data import identity
from dapt_jax.errors import UserError, nearest, nearest_beside

TABLES = (".csv", ".tsv")
"""Suffixes of tables."""
_LINE = 1 << 20
"""Most characters of a line of a table; a parser takes a hundred bytes of memory for each empty cell."""


@dataclass(frozen=True)
class Row:
    """One row of a list without a header.

    Attributes:
        place: Location of the row ("row 1" is the first line).
        cells: Cells without outer blanks; the first is never empty.
    """

    place: str
    cells: tuple[str, ...]


def read_rows(path: Path, fields: int, separator: str | None = None) -> list[Row]:
    """Read a list without a header; any line ends, trailing blanks and blank lines are allowed.

    Args:
        path: The file.
        fields: Number of cells in each row.
        separator: Separator of cells, such as ","; None for any run of blanks or tabs.

    Raises:
        UserError: The file does not exist, is not text, has no rows, has a row with another number of cells,
            or a blank first cell.
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
    """Return cells that are each 0 or 1, one per class.

    Raises:
        UserError: A cell is anything else; names the file, the row and the class.
    """
    for cell, name in zip(cells, names, strict=True):
        if cell not in ("0", "1"):
            raise UserError(f"{path}: {place}: {name} is {cell!r}, expected 0 or 1")
    return tuple(map(float, cells))


def class_name(path: Path, place: str, cell: str, names: Sequence[str]) -> str:
    """Return the class whose number a cell holds.

    Raises:
        UserError: The cell is not a number from 0 to that of the last class; names the file and the row.
    """
    if not cell.isdecimal() or int(cell) >= len(names):
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise UserError(f"{path}: {place}: class {cell!r}, expected one of {numbered}")
    return names[int(cell)]


def read_columns(
    path: Path, what: str = "manifest", example: str = "image,label,patient and one row per image"
) -> tuple[list[str], dict[str, list[str]]]:
    """Read a CSV file by column.

    Cells are separated by commas, semicolons or tabs, whichever is most frequent in the header outside
    quotation marks; a first line "sep=;" as written by spreadsheets takes precedence. Columns without a name
    and without values are left out, and so is a first column without a name, the row numbers of pandas.

    Args:
        path: The file, UTF-8, or UTF-16 with its byte-order mark; a byte-order mark, any line ends and blank
            lines are allowed.
        what: Name of the file's kind in errors.
        example: A header and what its rows are of, in errors.

    Returns:
        The location of each row in the file ("row 2" is the first below the header, as in a spreadsheet), and
        the cells of each column as returned by `identity.clean`.

    Raises:
        UserError: The file does not exist, is not text, has no rows, has two columns of one name, or a row of
            the wrong length.
    """
    text = _text(path, what)
    if long := re.search(rf"[^\r\n]{{{_LINE + 1},}}", text):
        line = text.count("\n", 0, long.start()) + 1
        raise UserError(f"{path}: line {line} has {len(long[0]):,} characters; expected at most {_LINE:,}")
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
                    f"{path}: row {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the "
                    "header"
                )
            places.append(f"row {reader.line_num}")
            rows.append(cells[: len(header)])
    except csv.Error as error:
        raise UserError(f"{path}: row {reader.line_num}: {error}; is a quotation mark left open?") from error
    if not rows:
        raise UserError(f"{path}: no rows; expected a header such as {example}")
    columns = [(name, [row[index] for row in rows]) for index, name in enumerate(header)]
    columns = [(name, cells) for index, (name, cells) in enumerate(columns) if name or (index and any(cells))]
    names = [name for name, _ in columns]
    if names.count("") > 1:
        nameless = ", ".join(str(index + 1) for index, name in enumerate(header) if not name)
        raise UserError(
            f"{path}: no name above the values of columns {nameless}; expected the first row to be a header such as "
            f"{example}"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} is there twice")
    return places, dict(columns)


def header(path: Path) -> list[str]:
    """Return the names of the columns of a CSV file; see `read_columns`.

    Raises:
        UserError: The file is not text, or empty.
    """
    for _, cells in _rows(path):
        return [identity.clean(cell) for cell in cells]
    raise UserError(f"{path}: no rows; expected a header such as image,patient and one row per image")


def iterate(
    path: Path, column: str, names: Sequence[str], more: Sequence[str] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the cells of one column of a CSV file, or of several, row by row, however many rows there are.

    Args:
        path: The file; see `read_columns`.
        column: Name of the column.
        names: Keys of other usual names of it.
        more: Names of other columns.

    Yields:
        Location of the row, its cell, which may be empty, and its cells of the other columns.

    Raises:
        UserError: The file is not text, or no or several columns have such a name.
    """
    places: list[int] = []
    for number, raw in _rows(path):
        if not places:
            columns = [identity.clean(cell) for cell in raw]
            places = [
                _place(path, columns, column, names),
                *(_place(path, columns, each, ()) for each in more),
            ]
        elif max(places) >= len(raw):
            expected = max(places) + 1
            raise UserError(f"{path}: row {number}: {len(raw)} cells, expected {expected} or more")
        else:
            yield f"row {number}", *(identity.clean(raw[place]) for place in places)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each row of a CSV file that is not blank, the header first.

    Raises:
        UserError: The file is not text.
    """
    encoding, reader = _encoding(path), None
    try:
        with path.open(encoding=encoding, newline="") as file:
            delimiter, skipped = _delimiter(file.read(1 << 16))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=delimiter != "\t")
            for number, raw in enumerate(reader):
                if number >= skipped and any(raw):
                    yield reader.line_num, raw
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8") from error
    except csv.Error as error:
        number = reader.line_num if reader else 0
        raise UserError(f"{path}: row {number}: {error}; is a quotation mark left open?") from error


def _place(path: Path, header: Sequence[str], column: str, names: Sequence[str]) -> int:
    found = identity.column(column, header, names)
    if len(found) != 1:
        held = f"columns {', '.join(found)} may all be it" if found else nearest(column, header)
        raise UserError(f"{path}: no column {column!r}; {held}")
    return list(header).index(found[0])


def _delimiter(text: str) -> tuple[str, int]:
    """Return the separator of cells, and the number of lines before the header."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    if said := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first):
        return said[1], 1
    bare = re.sub(r'"[^"]*"', "", first)
    # Spreadsheets write semicolons if the comma is the decimal separator.
    return max(",;\t", key=bare.count), 0


def _text(path: Path, what: str) -> str:
    if path.is_dir():
        raise UserError(
            f"{path}: a folder; expected a CSV file, or kind 'folder' for images sorted into folders"
        )
    if not path.is_file():
        hint = nearest_beside(path, lambda entry: entry.suffix.lower() in (*TABLES, ".txt"))
        raise UserError(f"{path}: no such {what}; {hint}")
    try:
        return path.read_bytes().decode(_encoding(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as CSV UTF-8") from error


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return "utf-16" if is_wide else "utf-8-sig"
