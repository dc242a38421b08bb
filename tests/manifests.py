"""A folder of phantoms with a manifest that a test may spoil."""

import os
import shutil
from pathlib import Path

from dapt_jax.data import phantoms


class Data:
    """Phantoms as files with a manifest that a test may spoil."""

    def __init__(self, folder: Path, source: Path):
        self.folder, self.manifest = folder, folder / "manifest.csv"
        folder.mkdir()
        for name in phantoms.SOURCES:
            shutil.copytree(source / name, folder / name, copy_function=os.link)
        self.lines = (source / "manifest.csv").read_text().splitlines()
        self.write(self.lines)

    def write(self, lines, encoding="utf-8"):
        self.manifest.write_bytes(("\n".join(lines) + "\n").encode(encoding))

    def change(self, row, column, value):
        """Puts a value into a row of the manifest, counted as a spreadsheet does, or into its header (row 1)."""
        cells = self.lines[row - 1].split(",")
        cells[self.lines[0].split(",").index(column)] = value
        self.lines[row - 1] = ",".join(cells)
        self.write(self.lines)

    def image(self, row):
        return self.folder / self.lines[row - 1].split(",")[0]

    def spoil(self, row, content: bytes):
        path = self.image(row)
        path.unlink()
        path.write_bytes(content)
