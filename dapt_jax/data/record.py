"""One image as a reader describes it, before any file is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dapt_jax.data.masks import Mask
from dapt_jax.data.plane import Plane


@dataclass(frozen=True)
class Record:
    """One image as described by its source.

    Attributes:
        place: Location in the source, for errors ("row 5").
        image: The image file, or the plane of a file that holds several images.
        written: The image's name as written in the source.
        labels: Names of its classes: exactly one, unless the set is multi-label.
        values: One 0, 1 or NaN per class, instead of `labels`, if the source has a column per class.
        mask: Location of its mask, or None.
        group: The patient, see `identity.patient`; "" for none.
        columns: All other columns.
    """

    place: str
    image: Path | Plane
    written: str
    labels: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    mask: Mask | None = None
    group: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
