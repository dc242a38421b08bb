"""Kinds of parameters, declared by models and queried where kinds are treated differently.

A parameter's path (`stage1/block1/conv1/kernel`) is only its address; its `Kind` determines
its initial value, whether weight decay applies, which normalisation setting controls its training, and its
layout in other frameworks. Models provide kinds as `kinds`, a dict from path to kind (see
`dapt_jax.models.parameters` for the declarations).
"""

import enum
from typing import Literal

BatchNormMode = Literal["frozen", "affine", "stats", "train"]
"""How batch norm runs.

`frozen`: on running statistics, with fixed scale and bias. `affine`: on running statistics, which stay, with
scale and bias that train (for a convolutional network, what SSF trains: arXiv 2210.08823). `stats`: on those
of the batch, which are recorded, with fixed scale and bias. `train`: on those of the batch, with scale and
bias that train.
"""

LayerNormMode = Literal["frozen", "train"]
"""Whether scale and bias of layer norm train; there are no statistics."""

BATCH_NORM_MODES = ("frozen", "affine", "stats", "train")
LAYER_NORM_MODES = ("frozen", "train")


class Kind(enum.StrEnum):
    """Kind of a parameter or a running statistic.

    Factors of a low-rank update beside a kernel, and changes of some of its rows, have separate kinds, which
    determine freezing, weight decay and initialisation independently of the kernel.
    """

    CONV_KERNEL = "conv_kernel"
    DEPTHWISE_KERNEL = "depthwise_kernel"
    GROUPED_KERNEL = "grouped_kernel"
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
    LORA_DOWN = "lora_down"
    LORA_UP = "lora_up"
    ROWS_KERNEL = "rows_kernel"
    ROWS_BIAS = "rows_bias"
    RUNNING_MEAN = "running_mean"
    RUNNING_VARIANCE = "running_variance"

    @property
    def is_kernel(self) -> bool:
        """Whether it is the weight of a linear layer, to which weight decay applies."""
        return self in (Kind.CONV_KERNEL, Kind.DENSE_KERNEL) or self.is_grouped

    @property
    def is_grouped(self) -> bool:
        """Whether it is the kernel of a convolution of several groups of channels, depthwise included."""
        return self in (Kind.DEPTHWISE_KERNEL, Kind.GROUPED_KERNEL)

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is a scale or bias of batch norm."""
        return self in (Kind.BATCH_NORM_SCALE, Kind.BATCH_NORM_BIAS)

    @property
    def is_layer_norm(self) -> bool:
        """Whether it is a scale or bias of layer norm."""
        return self in (Kind.LAYER_NORM_SCALE, Kind.LAYER_NORM_BIAS)

    @property
    def is_lora(self) -> bool:
        """Whether it is a factor of a low-rank update."""
        return self in (Kind.LORA_DOWN, Kind.LORA_UP)

    @property
    def is_rows(self) -> bool:
        """Whether it is the change of some rows of a weight or of its bias."""
        return self in (Kind.ROWS_KERNEL, Kind.ROWS_BIAS)

    @property
    def is_statistic(self) -> bool:
        """Whether it is a running statistic of batch norm, which has no gradient."""
        return self in (Kind.RUNNING_MEAN, Kind.RUNNING_VARIANCE)
