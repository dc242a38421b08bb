"""FLOP counts against closed formulas, against XLA where it is right, and against each other."""

import dataclasses
import functools
import itertools
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from dapt_jax.cost import flops as flops_module
from dapt_jax.cost.flops import Flops, count, register
from dapt_jax.errors import UserError

F32 = jnp.float32


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def mlp(params, x):
    for weights in params[:-1]:
        x = jax.nn.relu(x @ weights)
    return x @ params[-1]


WIDTHS = (5, 7, 11, 3)
LAYERS = [spec(a, b) for a, b in itertools.pairwise(WIDTHS)]
BATCH = spec(4, 5)
PRODUCTS = [2 * 4 * a * b for a, b in itertools.pairwise(WIDTHS)]


def test_dense_forward_and_training_step():
    assert count(mlp, LAYERS, BATCH).model == sum(PRODUCTS)
    step = count(jax.value_and_grad(lambda params, x: mlp(params, x).sum()), LAYERS, BATCH)
    # Every layer has a weight gradient; all but the first pass a gradient on.
    assert step.model == step.hardware == 2 * sum(PRODUCTS) + sum(PRODUCTS[1:])
    assert step.by_op == {"dot_general": step.model}
    assert step.unknown == ()


def test_frozen_gradients_cost_nothing():
    def loss(last, frozen, x):
        return mlp([*frozen, last], x).sum()

    step = count(jax.value_and_grad(loss), LAYERS[-1], LAYERS[:-1], BATCH)
    assert step.model == sum(PRODUCTS) + PRODUCTS[-1]

    def everything_then_drop(params, x):
        value, grads = jax.value_and_grad(lambda params: mlp(params, x).sum())(params)
        return value, grads[-1]

    assert count(everything_then_drop, LAYERS, BATCH).model == step.model
    assert count(jax.jit(everything_then_drop), LAYERS, BATCH).model == step.model

    def reads_frozen(params, x):
        value, grads = jax.value_and_grad(lambda params: mlp(params, x).sum())(params)
        return value, grads[-1], jnp.sqrt(sum(jnp.sum(g**2) for g in grads))

    assert count(reads_frozen, LAYERS, BATCH).model == 2 * sum(PRODUCTS) + sum(PRODUCTS[1:])


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("ij,jk->ik", ((3, 4), (4, 5)), 2 * 3 * 4 * 5),
        ("bij,bjk->bik", ((6, 3, 4), (6, 4, 5)), 2 * 6 * 3 * 4 * 5),
        ("bhqd,bhkd->bhqk", ((2, 3, 5, 7), (2, 3, 6, 7)), 2 * 2 * 3 * 5 * 6 * 7),
        ("ijk,jkl->il", ((2, 3, 4), (3, 4, 5)), 2 * 2 * 12 * 5),
        ("i,i->", ((9,), (9,)), 18),
    ],
)
def test_dot_general(equation, shapes, expected):
    assert (
        count(functools.partial(jnp.einsum, equation), *(spec(*shape) for shape in shapes)).model == expected
    )


def test_agrees_with_xla_on_matrix_products():
    def fn(a, b, c):
        return (a @ b) @ c

    args = [spec(32, 48), spec(48, 64), spec(64, 16)]
    compiled = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert count(fn, *args).model == int(compiled["flops"])


def conv(x, w, *, strides=(1, 1), padding="SAME", dilation=(1, 1), groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_convolution_by_hand():
    flops = count(conv, spec(2, 8, 8, 3), spec(3, 3, 3, 5))
    assert flops.padded == 2 * 2 * 8 * 8 * 9 * 3 * 5
    # Of 8 x 3 pairs along an axis, the two outer taps of the two outer positions fall on padding.
    assert flops.model == 2 * 2 * 22 * 22 * 3 * 5
    valid = count(functools.partial(conv, padding="VALID"), spec(2, 8, 8, 3), spec(3, 3, 3, 5))
    assert valid.model == valid.padded == 2 * 2 * 6 * 6 * 9 * 3 * 5
    depthwise = count(functools.partial(conv, padding="VALID", groups=6), spec(1, 5, 5, 6), spec(3, 3, 1, 6))
    assert depthwise.model == 2 * 3 * 3 * 9 * 6


def test_convolution_with_other_layouts():
    def nchw(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    def nhwc(x, w):
        return conv(x, w, strides=(2, 1))

    assert count(nchw, spec(2, 3, 9, 7), spec(5, 3, 3, 3)) == count(nhwc, spec(2, 9, 7, 3), spec(3, 3, 3, 5))


def test_resnet50_stem_is_the_textbook_figure():
    stem = functools.partial(conv, strides=(2, 2), padding=[(3, 3), (3, 3)])
    assert count(stem, spec(1, 224, 224, 3), spec(7, 7, 3, 64)).padded == 2 * 118_013_952


sizes = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(
    image=st.tuples(sizes, sizes),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(1, 3),
)
def test_forward_input_gradient_and_weight_gradient_have_one_count(
    image, kernel, strides, dilation, pads, groups, channels, batch
):
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(size + sum(pad) < need for size, pad, need in zip(image, pads, reach, strict=True)):
        return
    fn = functools.partial(conv, strides=strides, padding=pads, dilation=dilation, groups=groups)
    x, w = spec(batch, *image, groups * channels[0]), spec(*kernel, channels[0], groups * channels[1])
    y = jax.eval_shape(fn, x, w)
    forward = count(fn, x, w)
    into_input = count(lambda x, w, g: jax.vjp(fn, x, w)[1](g)[0], x, w, y)
    into_weight = count(lambda x, w, g: jax.vjp(fn, x, w)[1](g)[1], x, w, y)
    assert forward.model == into_input.model == into_weight.model
    assert forward.padded == 2 * prod(y.shape) * prod(kernel) * channels[0]
    assert forward.model <= forward.padded

    # The definition, spelled out: triples that meet a real element.
    pairs = 1
    for size, taps, positions, stride, rate, (low, _) in zip(
        image, kernel, y.shape[1:3], strides, dilation, pads, strict=True
    ):
        pairs *= sum(0 <= o * stride + k * rate - low < size for o in range(positions) for k in range(taps))
    assert forward.model == 2 * batch * pairs * channels[0] * groups * channels[1]


def test_transposed_convolution_skips_holes():
    def up(x, w):
        return jax.lax.conv_transpose(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    flops = count(up, spec(1, 4, 4, 3), spec(2, 2, 3, 5))
    assert flops.model == 2 * 16 * 4 * 3 * 5


def test_scan_is_multiplied_by_its_length():
    def fn(w, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0]

    assert count(fn, spec(6, 3, 3), spec(2, 3)).model == 6 * 2 * 2 * 3 * 3


def test_fori_loop_with_bounds_known_while_tracing():
    x = spec(3, 3)
    one = 2 * 27
    assert count(lambda x: jax.lax.fori_loop(0, 5, lambda _, h: h @ h, x), x).model == 5 * one

    def hand_written(x):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 2, c[1] @ c[1]), (0, x))[1]

    assert count(hand_written, x).model == count(jax.jit(hand_written), x).model == 5 * one

    def array_bounds(x):
        bounds = np.int32(2), np.int32(7)
        return jax.lax.while_loop(
            lambda c: c[0] <= c[2], lambda c: (c[0] + 1, c[1] @ c[1], c[2]), (bounds[0], x, bounds[1])
        )[1]

    assert count(array_bounds, x) == Flops(6 * one, 6 * one, 6 * one, {"dot_general": 6 * one})


def test_while_of_unknown_length_is_counted_once_and_named():
    def fn(n, x):
        return jax.lax.fori_loop(0, n, lambda _, h: h @ h, x)

    flops = count(fn, jax.ShapeDtypeStruct((), jnp.int32), spec(3, 3))
    assert flops.model == 2 * 27
    assert flops.unknown == ("while",)
    # A loop without matrix work is no cause for alarm.
    idle = count(
        lambda n: jax.lax.fori_loop(0, n, lambda i, h: h + i, 0), jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert idle == Flops()


def test_cond_takes_its_dearest_branch():
    def fn(flag, x):
        return jax.lax.cond(flag, lambda: x @ x @ x, lambda: x @ x)

    assert count(fn, jax.ShapeDtypeStruct((), jnp.bool_), spec(3, 3)).model == 2 * 2 * 27


def test_recomputation_is_hardware_work_only():
    def block(h, w):
        return jnp.sin(jnp.sin(h @ w[0]) @ w[1])

    def loss(w, x, block):
        for one in w:
            x = block(x, one)
        return x.sum()

    def counted(block, loss=loss):
        return count(jax.value_and_grad(functools.partial(loss, block=block)), spec(3, 2, 4, 4), spec(2, 4))

    plain, saved = counted(block), counted(jax.checkpoint(block))
    dot = 2 * 2 * 4 * 4
    assert plain.model == plain.hardware == 6 * 3 * dot - dot
    assert saved.model == plain.model
    assert saved.hardware == plain.model + 6 * dot
    assert counted(jax.checkpoint(jax.jit(block))) == saved

    def scanned(w, x, block):
        return jax.lax.scan(lambda h, one: (block(h, one), None), x, w)[0].sum()

    # Inside a scan the gradient of the first input is computed with all the others.
    assert counted(block, scanned).model == 6 * 3 * dot
    assert counted(jax.checkpoint(block), scanned).model == 6 * 3 * dot
    assert counted(jax.checkpoint(block), scanned).hardware == 6 * 4 * dot

    dots_saved = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
    assert counted(dots_saved).hardware == plain.hardware


def test_custom_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T @ jnp.eye(3), kept[0].T @ g))

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), tangents[0] @ primals[0]))
    x = spec(3, 3)
    dot = 2 * 27
    assert count(product, x, x).model == dot
    assert count(jax.value_and_grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), x, x).model == 4 * dot
    assert count(square, x).model == dot
    assert count(jax.value_and_grad(lambda x: square(x).sum()), x).model == 2 * dot


def test_nested_jit_and_shard_map():
    inner = jax.jit(lambda x: x @ x)
    assert count(jax.jit(lambda x: inner(inner(x))), spec(3, 3)).model == 2 * 2 * 27
    auto = (jax.sharding.AxisType.Auto,)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=auto)
    part = PartitionSpec("data")
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(part, PartitionSpec()), out_specs=part)
    assert count(mapped, spec(4, 3), spec(3, 5)).model == 2 * 4 * 3 * 5
    virtual = jax.sharding.AbstractMesh((4,), ("data",), axis_types=auto)
    mapped = jax.shard_map(lambda x, w: x @ w, mesh=virtual, in_specs=(part, PartitionSpec()), out_specs=part)
    assert count(mapped, spec(4, 3), spec(3, 5)).model == 2 * 4 * 3 * 5


def test_what_cannot_be_counted_is_named():
    def fn(x):
        return jnp.linalg.cholesky(x) @ x + jnp.linalg.eigh(x)[1] + jnp.fft.fft(x).real

    flops = count(fn, spec(3, 3))
    assert flops.model == 2 * 27
    assert flops.unknown == ("cholesky", "eigh", "fft")
    assert count(lambda x: jnp.sort(x).sum() + jnp.max(x), spec(3, 3)) == Flops()


def test_registered_formula_stands_for_a_jit(monkeypatch):
    monkeypatch.setattr(flops_module, "_formulas", {})

    def shifted_products(x, w):
        return sum(x[i : x.shape[0] - 2 + i] * w[i] for i in range(3))

    def formula(avals):
        x, w = avals
        return 2 * (x.shape[0] - 2) * prod(w.shape)

    jitted = jax.jit(shifted_products)
    assert count(jitted, spec(10, 4), spec(3, 4)) == Flops()
    register("shifted_products", formula)
    register("shifted_products", formula)
    flops = count(lambda x, w: jnp.exp(jitted(x, w)), spec(10, 4), spec(3, 4))
    assert flops.by_op == {"jit:shifted_products": 2 * 8 * 3 * 4}
    with pytest.raises(UserError, match="already registered"):
        register("shifted_products", lambda avals: 0)


def test_arithmetic_of_counts():
    a = Flops(10, 12, 11, {"dot_general": 10}, ("fft",))
    b = Flops(1, 1, 1, {"conv_general_dilated": 1})
    assert a + b == Flops(11, 13, 12, {"dot_general": 10, "conv_general_dilated": 1}, ("fft",))
    assert 3 * a == a * 3 == Flops(30, 36, 33, {"dot_general": 30}, ("fft",))
    assert Flops(**dataclasses.asdict(a)) == a


def test_wrong_argument_is_one_clear_line():
    with pytest.raises(UserError, match="is a str; expected arrays"):
        count(lambda x: x, "relu")
