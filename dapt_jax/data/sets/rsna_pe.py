"""RSNA-STR Pulmonary Embolism: CT studies with labels for every slice."""

from collections.abc import Iterator
from pathlib import Path

from dapt_jax.data.lists import read_columns
from dapt_jax.data.paths import named
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import file_set
from dapt_jax.errors import UserError, nearest

CLASSES = ("no embolism", "embolism")
_COLUMNS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "pe_present_on_image")


@file_set(
    kind="rsna_pe",
    title="RSNA Pulmonary Embolism",
    recipe="kaggle competitions download -c rsna-str-pulmonary-embolism-detection",
    licence="rules of the Kaggle competition (RSNA: research, not commercial)",
    size="7,279 labelled CT studies, about 1.79 million slices",
    splits="none official; the group of the benchmark drew 6,279 / 1,000 studies, which are not published",
    layout="train.csv and train/<study>/<series>/<slice>.dcm",
    classes=CLASSES,
)
def rsna_pe(root: Path, *, window: str = "-250,450", every: int = 1) -> Iterator[Record]:
    """Yield slices with `pe_present_on_image`; the group is the study.

    Args:
        root: Folder of train.csv.
        window: Black and white in Hounsfield units; by default the usual window for pulmonary arteries (level
            100, width 700).
        every: Stride in rows of the table; 1 reads every row.
    """
    shown = Window.parse(window)
    path = tree.needed(root, "train.csv")
    places, columns = read_columns(path, "table")
    if missing := [column for column in _COLUMNS if column not in columns]:
        raise UserError(f"{path}: no column {missing[0]!r}; {nearest(missing[0], columns)}")
    rows = list(zip(places, *(columns[column] for column in _COLUMNS), strict=True))
    for place, study, series, image, present in rows[:: max(every, 1)]:
        if not (study and series and image):
            raise UserError(f"{path}: {place}: no image named; expected a study, a series and an image")
        if present not in ("0", "1"):
            raise UserError(f"{path}: {place}: pe_present_on_image is {present!r}, expected 0 or 1")
        written = f"train/{study}/{series}/{image}.dcm"
        yield Record(
            f"{path.name} {place}",
            image=Plane(named(path.parent, written), window=shown),
            written=written,
            labels=(CLASSES[int(present)],),
            group=study,
        )
