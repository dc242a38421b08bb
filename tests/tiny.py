"""A network and a corpus so small that a test can train them."""

import itertools

import numpy as np
from flax import nnx

from dapt_jax import losses
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, LayerGroup, Preprocess
from dapt_jax.models.layers import BatchNorm, Conv
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun


class Block(nnx.Module):
    def __init__(self, inputs, outputs):
        self.conv = Conv(inputs, outputs, 3, stride=2)
        self.norm = BatchNorm(outputs)

    def __call__(self, x, norm):
        return nnx.relu(self.norm(self.conv(x), norm))


def encoder():
    widths = (3, 4, 6, 8)
    groups = [
        LayerGroup(f"stage{n}/block1", lambda a=a, b=b: Block(a, b), b, 2**n)
        for n, (a, b) in enumerate(itertools.pairwise(widths), start=1)
    ]
    half = (127.5,) * 3
    return Encoder("tiny", groups, preprocess=Preprocess(half, half), image_size=16)


def dataset(n=40, size=16, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    images = rng.integers(0, 256, (n, size, size, 3))
    images[..., 0] = images[..., 0] // 2 + 40 * labels[:, None, None]
    names = tuple(f"class{number}" for number in range(classes))
    groups = np.asarray([f"p{row // 2}" for row in range(n)])
    return Dataset("tiny", ImageStore.from_arrays(images.astype(np.uint8), size), labels, names, groups)


def make_run(
    phases, *, encoder, data, batch_size=8, cache="off", val=8, dtype="float32", objective=None, **others
):
    """A run over `data`, whose last `val` rows are the validation rows; `others` as in `TrainingRun`."""
    rows = np.arange(len(data))
    objective = objective or losses.make(classes=len(data.classes))
    model = Classifier(encoder, objective.outputs, dtype)
    data = TrainData(data, rows[: len(rows) - val], rows[len(rows) - val :])
    caching = Caching(cache, 1 << 28) if isinstance(cache, str) else cache
    tag = RunTag(strategy="test")
    return TrainingRun(
        model, phases, data, objective, batch_size=batch_size, caching=caching, tag=tag, **others
    )


HEAD = Phase("head", 2, ("head",), 1e-2, augment=False)
PARTIAL = Phase("partial", 2, ("stage3", "head"), 1e-2)
FULL = Phase("full", 2, ("*",), 1e-2)
