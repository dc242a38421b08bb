"""Kinds of parameters: declared where a model defines them, asked for where parameters are treated apart.

A parameter's path (`stage1/block1/conv1/kernel`) is its address and says nothing about it; its `Kind` decides
its initial value, whether weight decay applies, under which setting of normalisation it trains, and how other
frameworks lay it out. Models offer kinds as `kinds`, a dict from path to kind (see
`dapt_jax.models.parameters` for the declarations).
"""

import enum
from typing import Literal

BatchNormMode = Literal["frozen", "stats", "train"]
"""How batch norm runs.

`frozen`: on running statistics, with fixed scale and bias. `stats`: on those of the batch, which are
recorded, with fixed scale and bias. `train`: on those of the batch, with scale and bias that train.
"""

LayerNormMode = Literal["frozen", "train"]
"""Whether scale and bias of layer norm train; there are no statistics."""

BATCH_NORM_MODES = ("frozen", "stats", "train")
LAYER_NORM_MODES = ("frozen", "train")


class Kind(enum.StrEnum):
    """What a parameter or a statistic is.

    A module that adds parameters beside a kernel (a low-rank adapter, say) gets a kind of its own here: it is
    then frozen, decayed and initialised by that kind, and the kernel beside it by its own.
    """

    CONV_KERNEL = "conv_kernel"
    DEPTHWISE_KERNEL = "depthwise_kernel"
    DENSE_KERNEL = "dense_kernel"
    BIAS = "bias"
    BATCH_NORM_SCALE = "batch_norm_scale"
    BATCH_NORM_BIAS = "batch_norm_bias"
    LAYER_NORM_SCALE = "layer_norm_scale"
    LAYER_NORM_BIAS = "layer_norm_bias"
    LAYER_SCALE = "layer_scale"
    POSITION = "position"
    RELATIVE_POSITION_BIAS = "relative_position_bias"
    TOKEN = "token"
    RUNNING_MEAN = "running_mean"
    RUNNING_VARIANCE = "running_variance"

    @property
    def is_kernel(self) -> bool:
        """Whether it is the matrix of a linear layer: what weight decay applies to."""
        return self in (Kind.CONV_KERNEL, Kind.DEPTHWISE_KERNEL, Kind.DENSE_KERNEL)

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is scale or bias of a batch norm."""
        return self in (Kind.BATCH_NORM_SCALE, Kind.BATCH_NORM_BIAS)

    @property
    def is_layer_norm(self) -> bool:
        """Whether it is scale or bias of a layer norm."""
        return self in (Kind.LAYER_NORM_SCALE, Kind.LAYER_NORM_BIAS)

    @property
    def is_statistic(self) -> bool:
        """Whether it is a running statistic of batch norm, which no gradient changes."""
        return self in (Kind.RUNNING_MEAN, Kind.RUNNING_VARIANCE)
