"""Parameters and statistics as nnx variables, one class per kind; every parameter of a model is one of these.

The class is chosen where a layer defines its parameter (`self.kernel = DenseKernel(jnp.zeros((4, 8)))`).
Outside of models, variables are plain arrays, and the kind is looked up by path: see `Encoder.kinds`.
"""

from typing import Any, ClassVar

from flax import nnx

from dapt_jax.parameters import Kind


class Parameter(nnx.Param):
    """A trainable parameter; the subclasses declare its kind."""

    kind: ClassVar[Kind]


class ConvKernel(Parameter):
    """Kernel (height, width, in, out) of a convolution."""

    kind = Kind.CONV_KERNEL


class GroupedKernel(Parameter):
    """Kernel (height, width, in / groups, out) of a convolution of several groups of channels."""

    kind = Kind.GROUPED_KERNEL


class DepthwiseKernel(Parameter):
    """Kernel (height, width, 1, channels) of a convolution with as many groups as channels."""

    kind = Kind.DEPTHWISE_KERNEL


class DenseKernel(Parameter):
    """Kernel (in, out) of a dense layer."""

    kind = Kind.DENSE_KERNEL


class Bias(Parameter):
    """Bias (out,) of a convolution or a dense layer."""

    kind = Kind.BIAS


class BatchNormScale(Parameter):
    """Scale (features,) of a batch norm."""

    kind = Kind.BATCH_NORM_SCALE


class BatchNormBias(Parameter):
    """Bias (features,) of a batch norm."""

    kind = Kind.BATCH_NORM_BIAS


class LayerNormScale(Parameter):
    """Scale (features,) of a layer norm."""

    kind = Kind.LAYER_NORM_SCALE


class LayerNormBias(Parameter):
    """Bias (features,) of a layer norm."""

    kind = Kind.LAYER_NORM_BIAS


class LayerScale(Parameter):
    """Factors (features,) of a residual branch."""

    kind = Kind.LAYER_SCALE


class Position(Parameter):
    """Learnt positions (1, tokens, features)."""

    kind = Kind.POSITION


class RelativePositionBias(Parameter):
    """Bias (offsets, heads) of attention by relative position."""

    kind = Kind.RELATIVE_POSITION_BIAS


class Token(Parameter):
    """Learnt tokens (1, tokens, features): a class token, registers."""

    kind = Kind.TOKEN


class LoraDown(Parameter):
    """First factor of a low-rank update: a kernel (..., in, rank)."""

    kind = Kind.LORA_DOWN


class LoraUp(Parameter):
    """Second factor of a low-rank update: a matrix (rank, out)."""

    kind = Kind.LORA_UP


class RowsKernel(Parameter):
    """Changes (in, rows) of some outputs of a kernel."""

    kind = Kind.ROWS_KERNEL


class RowsBias(Parameter):
    """Changes (rows,) of their biases."""

    kind = Kind.ROWS_BIAS


class RunningMean(nnx.BatchStat):
    """Mean (features,) of the inputs of a batch norm."""

    kind: ClassVar[Kind] = Kind.RUNNING_MEAN


class RunningVariance(nnx.BatchStat):
    """Variance (features,) of the inputs of a batch norm."""

    kind: ClassVar[Kind] = Kind.RUNNING_VARIANCE


def kinds_of(prefix: str, *states: Any) -> dict[str, Kind]:
    """Return the kind of every variable of nnx states by slash-separated path.

    Args:
        prefix: Name of the layer group that the states belong to; it leads every path.
        *states: States of one module, such as its parameters and its statistics.

    Raises:
        TypeError: A variable is a bare `nnx.Param` or `nnx.BatchStat`, which has no kind.
    """
    kinds: dict[str, Kind] = {}
    for state in states:
        for path, variable in nnx.to_flat_state(state):
            name = "/".join([prefix, *map(str, path)])
            kind = getattr(type(variable), "kind", None)
            if kind is None:
                raise TypeError(
                    f"{name} is a {type(variable).__name__}; "
                    "expected one of the classes of dapt_jax.models.parameters, which declare the kind"
                )
            kinds[name] = kind
    return kinds
