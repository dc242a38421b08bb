"""Figures as parts of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from PIL import Image

from dapt_jax.report import figures
from dapt_jax.report.prediction_figures import Picture
from dapt_jax.report.style import STYLE, save

_PANEL_DPI = 125
"""Of figures that stand side by side."""


def picture(path: Path, folder: Path, caption: str, alt: str = "") -> dict[str, str]:
    """Return a figure for a template.

    Args:
        path: PNG file.
        folder: Folder of the page.
        caption: Text below it.
        alt: Text in its place; the first sentence of the caption where there is none.
    """
    return {
        "file": path.relative_to(folder).as_posix(),
        "data": _embedded(path),
        "caption": caption,
        "alt": alt or caption.partition(". ")[0],
    }


def drawn(draw: Callable[[], Sequence[Picture]], of: str, workdir: Path) -> list[dict[str, str]]:
    """Draw and save figures that stand side by side, and return them for a template.

    Args:
        draw: Function that draws them.
        of: What they are of, as a part of the names of their files.
        workdir: Folder of the page.
    """
    found = []
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for each in draw():
            name = figures.slug(f"{each.name}_{of}")
            path = save(each.figure, workdir / "figures" / f"{name}.png", dpi=_PANEL_DPI)
            found.append(picture(path, workdir, each.caption, each.alt))
    return found


def _embedded(path: Path) -> str:
    """Return a figure in 128 colours, a third of the bytes of the file, as base64 of a PNG."""
    file = io.BytesIO()
    with Image.open(path) as figure:
        few = figure.convert("RGB").quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
