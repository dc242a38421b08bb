"""The result of one metric."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
    """The value of one metric on one set of predictions.

    Attributes:
        metric: Name of the metric; `<metric>/<class>` for a single class.
        value: Value of the metric; NaN where it is undefined.
        n: Number of examples that it covers.
        classes: Names of the classes that it covers.
    """

    metric: str
    value: float
    n: int
    classes: tuple[str, ...]
