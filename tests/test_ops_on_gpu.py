"""What XLA is given for a GPU, checked without one: the program is lowered for CUDA and read."""

import re

import jax
import pytest

from dapt_jax import ops
from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.losses.cross_entropy import CrossEntropy
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import steps
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase

BATCH, SIZE, CLASSES = 7, 64, 3


def lowered(name, dtype):
    """Text of a full training step as StableHLO for CUDA."""
    model = Classifier(registry.build(name), CLASSES, dtype)
    (program,) = steps.programs(
        model,
        (Phase("full", 1, ("*",), 1e-4),),
        optimizer=Optimizer(),
        loss=CrossEntropy(CLASSES),
        augment=Augment(),
        mix=Mix(),
        seed=0,
        steps_per_epoch=1,
    )
    state = jax.eval_shape(program.init_state, *jax.eval_shape(lambda: model.init(0)))
    of = jax.ShapeDtypeStruct
    batch = {
        "image": of((BATCH, SIZE, SIZE, 3), "uint8"),
        "label": of((BATCH,), "int32"),
        "weight": of((BATCH,), "float32"),
        "index": of((BATCH,), "int32"),
    }
    rng = {"seed": of((), "uint32"), "view": of((), "int32"), "epoch": of((), "int32")}
    with ops.formulation("lax"):
        traced = jax.jit(program.train_step, donate_argnums=0).trace(state, batch, rng, of((), "float32"))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("name", "dtype"), [("resnet18", "bfloat16"), ("efficientnet_lite0", "float32")])
def test_a_step_for_a_gpu_transposes_no_activation_and_stays_on_the_device(name, dtype):
    text = lowered(name, dtype)
    assert text.count("stablehlo.convolution") > 40
    transposed = re.findall(r"stablehlo\.transpose .*tensor<([\dx]+)x[a-z]+\d+>\) ->", text)
    shapes = [tuple(map(int, each.split("x"))) for each in transposed]
    # Kernels of depthwise convolutions and of the head may be transposed: they are small.
    assert not [shape for shape in shapes if shape[0] == BATCH]
    assert "f64" not in text
    assert "custom_call" not in text  # no callback to the host


def test_an_activation_that_is_transposed_would_be_found():
    x = jax.ShapeDtypeStruct((BATCH, 8, 8, 4), "float32")
    text = (
        jax.jit(lambda x: x.transpose(0, 3, 1, 2) * 2).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert re.search(rf"stablehlo\.transpose .*tensor<{BATCH}x8x8x4xf32>\) ->", text)
