"""What every score is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
    """One number about one set of predictions.

    Attributes:
        metric: its name; `<metric>/<class>` of one class alone.
        value: NaN where it is undefined.
        n: examples that it covers.
        classes: names of the classes that it covers.
    """

    metric: str
    value: float
    n: int
    classes: tuple[str, ...]
