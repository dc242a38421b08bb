"""The study of `benchmarks.chaos`: three convolutions, images of 16 pixels, two phases, one target task."""

import functools

import jax
from flax import nnx

from dapt_jax.models.encoder import Encoder, LayerGroup, Options
from dapt_jax.models.entry import MODELS, register_model
from dapt_jax.models.layers import BatchNorm, Conv
from dapt_jax.models.preprocess import IMAGENET
from dapt_jax.settings import default

MODEL = "three_convolutions"


class Block(nnx.Module):
    """A convolution of stride 2, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        self.conv = Conv(inputs, outputs, 3, stride=2)
        self.norm = BatchNorm(outputs)

    def __call__(self, x, mode):
        """Return the features."""
        return jax.nn.relu(self.norm(self.conv(x), mode))


def encoder(options: Options) -> Encoder:
    """Return the encoder."""
    widths = (options.channels, 4, 6, 8)
    groups = [
        LayerGroup(f"stage{number}", functools.partial(Block, widths[number - 1], widths[number]), widths[number],
                   2**number)
        for number in (1, 2, 3)
    ]  # fmt: skip
    return Encoder(MODEL, groups, preprocess=IMAGENET.for_channels(options.channels))


if MODEL not in MODELS:
    register_model(MODEL)(encoder)


def get_config():
    """Return the settings."""
    config = default()
    config.name = "chaos"
    config.synthetic = True
    config.strategies = ("switching",)
    config.seeds = (0,)
    config.weights = "random"
    config.model.name = MODEL
    config.model.image_size = 16
    phases = (
        {"name": "last", "epochs": 2, "trainable": ("stage3", "head"), "lr": 1e-3, "augment": False},
        {"name": "full", "epochs": 1, "trainable": ("*",), "lr": 1e-3},
    )
    config.custom_strategies.switching = {"phases": phases}
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 48})
    config.tasks.cells = {
        "development": {"kind": "phantoms", "name": "development", "n": 48},
        "external": {"kind": "phantoms", "name": "external", "n": 24},
    }
    config.adapt.batch_size = 8
    config.transfer.protocols = ("linear",)
    config.transfer.baseline = ""
    config.transfer.folds = 2
    config.transfer.head.epochs = 2
    config.runtime.checkpoint_every_s = 0.0
    return config
