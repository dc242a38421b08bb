"""Temperature scaling of probabilities (Guo et al., arXiv 1706.04599)."""

import numpy as np
from jaxtyping import Float, Shaped
from scipy import optimize

LOW, HIGH = 0.05, 20.0
"""Bounds of a temperature: a head that separates all held-out images has none that is best."""

_SMALLEST = 1e-7


def temperature(
    probabilities: Float[np.ndarray, "n classes"], labels: Shaped[np.ndarray, "n ..."], *, multi_label: bool
) -> float | None:
    """Return the temperature of lowest negative log-likelihood; None without a known label.

    >>> sure = np.array([[0.99, 0.01], [0.99, 0.01], [0.01, 0.99], [0.99, 0.01]])
    >>> temperature(sure, np.array([0, 0, 1, 1]), multi_label=False) > 2
    True

    Args:
        probabilities: Probabilities of images that the network was not trained on.
        labels: Class numbers, int [n]; or 0, 1 and NaN, float [n, classes].
        multi_label: Whether each class has a sigmoid of its own.
    """
    if multi_label:
        known = (labels == 0) | (labels == 1)
        values = np.stack([1 - probabilities[known], probabilities[known]], -1)
        truth = labels[known].astype(int)
    else:
        values, truth = probabilities, labels.astype(int)
    if not len(truth):
        return None
    rows = np.arange(len(truth))

    def loss(logarithm: float) -> float:
        return -float(np.log(np.maximum(_softened(values, np.exp(logarithm))[rows, truth], _SMALLEST)).mean())

    found = optimize.minimize_scalar(loss, bounds=(np.log(LOW), np.log(HIGH)), method="bounded")
    return float(np.exp(found.x))


def apply(
    probabilities: Float[np.ndarray, "n classes"], temperature: float, *, multi_label: bool
) -> Float[np.ndarray, "n classes"]:
    """Return probabilities at a temperature; at 1 they are unchanged.

    >>> apply(np.array([[0.8, 0.2]]), 2.0, multi_label=False).round(3).tolist()
    [[0.667, 0.333]]
    """
    if temperature == 1:
        return probabilities
    if multi_label:
        return _softened(np.stack([1 - probabilities, probabilities], -1), temperature)[..., 1]
    return _softened(probabilities, temperature)


def _softened(values: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax of log-probabilities divided by a temperature, over the last axis."""
    logits = np.log(np.maximum(values.astype(np.float64), _SMALLEST)) / temperature
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    found: np.ndarray = (powers / powers.sum(-1, keepdims=True)).astype(values.dtype)
    return found
