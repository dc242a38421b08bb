"""What a weight file holds once it is read."""

from collections.abc import Mapping

import numpy as np


class Weights(dict[str, np.ndarray]):
    """Arrays by the names that the file gives them.

    Attributes:
        origin: where they come from, as reports and error lines name it: the path, and the container inside the file
            where the arrays are not at its top level (`moco.pth.tar ['state_dict']`).
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], origin: str):
        super().__init__(arrays)
        self.origin = origin
