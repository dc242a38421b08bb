"""The result of one metric."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
    """One number about one set of predictions.

    Attributes:
        metric: Name of the metric; `<metric>/<class>` of one class alone.
        value: The number; NaN where it is undefined.
        n: Number of examples that it covers.
        classes: Names of the classes that it covers.
    """

    metric: str
    value: float
    n: int
    classes: tuple[str, ...]
