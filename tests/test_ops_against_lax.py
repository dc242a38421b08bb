"""Every formulation against lax's, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dapt_jax import ops
from dapt_jax.models import registry
from dapt_jax.models.layers import Conv, Dense
from dapt_jax.models.lora import LoraSettings, with_updates
from dapt_jax.models.row_changes import RowChanges
from dapt_jax.ops import choice, depthwise
from dapt_jax.ops.shapes import pairs
from dapt_jax.ops.winograd import winograd

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True)
# Relative to the largest value: bfloat16 keeps 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
BORDERS = st.tuples(st.integers(0, 2), st.integers(0, 2))
PADDINGS = st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(BORDERS, BORDERS))


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(actual, expected, dtype: str) -> None:
    assert actual.dtype == expected.dtype
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def both(function, *args):
    """Value and gradients of a function under both formulations, the gradient a random pull-back."""
    results = []
    for name in ("lax", "cpu"):
        with ops.formulation(name):

            @jax.jit
            def value_and_gradients(*args):
                value, pull = jax.vjp(function, *args)
                return value, *pull(draw(9, value.shape, value.dtype.name))

            results.append(value_and_gradients(*args))
    return zip(*results, strict=True)


def primitives(function, *args) -> str:
    return str(jax.make_jaxpr(function)(*args))


@st.composite
def convolutions(draw_from):
    kind = draw_from(st.sampled_from(["depthwise", "depthwise", "pointwise", "dense", "grouped"]))
    size = 1 if kind == "pointwise" else draw_from(st.sampled_from([1, 2, 3, 5]))
    channels = draw_from(st.sampled_from([2, 4, 6]))
    outputs = channels if kind == "depthwise" else draw_from(st.sampled_from([2, 4, 8]))
    groups = {"depthwise": channels, "grouped": 2}.get(kind, 1)
    sides = draw_from(st.tuples(st.integers(size, 9), st.integers(size, 9)))
    return {
        "image": (draw_from(st.integers(1, 3)), *sides, channels),
        "kernel": (size, size, channels // groups, outputs),
        "stride": draw_from(st.integers(1, 3)),
        "padding": draw_from(PADDINGS),
        "groups": groups,
        "dtype": draw_from(st.sampled_from(["float32", "float32", "bfloat16"])),
    }


@SETTINGS
@given(convolutions())
def test_convolution_equals_lax(case) -> None:
    x, kernel = draw(1, case["image"], case["dtype"]), draw(2, case["kernel"], case["dtype"])
    options = {key: case[key] for key in ("stride", "padding", "groups")}
    for expected, actual in both(lambda x, k: ops.conv(x, k, **options), x, kernel):
        assert_close(actual, expected, case["dtype"])


@pytest.mark.parametrize(
    ("size", "stride", "channels"), [(3, 1, 8), (3, 2, 8), (7, 2, 3), (1, 1, 8), (1, 2, 8), (3, 1, 32)]
)
def test_gradients_of_convolutions_have_the_dimensions_that_are_fast_inside_a_loop(
    size: int, stride: int, channels: int
) -> None:
    """XLA:CPU reorders a convolution's dimensions only outside of loops; inside, a kernel's gradient took 20 times as long."""
    x, kernel = draw(1, (2, 40, 40, channels), "float32"), draw(2, (size, size, channels, 64), "float32")
    padding = ((size // 2, size // 2),) * 2

    def gradients(x, kernel):
        value, pull = jax.vjp(lambda x, k: ops.conv(x, k, stride=stride, padding=padding), x, kernel)
        return pull(value)

    orders = {"lax": [], "cpu": []}
    for name, found in orders.items():
        with ops.formulation(name):
            equations = jax.make_jaxpr(lambda *given: gradients(*given))(x, kernel).jaxpr.eqns
        inner = [each for eqn in equations for each in (eqn, *_inside(eqn))]
        found += [each.params["dimension_numbers"] for each in inner if "dimension_numbers" in each.params]
    images = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    assert any(order != images for order in orders["lax"])
    convolutions = [order for order in orders["cpu"] if isinstance(order, type(images))]
    assert all(order == images for order in convolutions)
    assert len(convolutions) == (0 if size == 1 else 1 if channels == 32 else 3)


def _inside(eqn):
    for name in ("jaxpr", "call_jaxpr"):
        if (inner := eqn.params.get(name)) is not None:
            for each in getattr(inner, "jaxpr", inner).eqns:
                yield each
                yield from _inside(each)


@pytest.mark.parametrize(
    ("size", "stride", "side"), [(3, 1, 12), (3, 2, 12), (5, 2, 7), (5, 1, 3), (3, 2, 3)]
)
def test_depthwise_equals_lax_at_the_shapes_of_lite0(size: int, stride: int, side: int) -> None:
    x, kernel = draw(1, (2, side, side, 32), "float32"), draw(2, (size, size, 1, 32), "float32")
    for expected, actual in both(lambda x, k: ops.conv(x, k, stride=stride, groups=32), x, kernel):
        assert_close(actual, expected, "float32")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_depthwise_gradient_is_summed_over_blocks_of_rows(stride: int, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(depthwise, "WHOLE_BYTES", 0 if rows < 12 else 1 << 20)
    monkeypatch.setattr(depthwise, "BLOCK_BYTES", 4 * 2 * 12 * 8 * rows)
    x, kernel = draw(1, (2, 12 * stride, 12 * stride, 8), "float32"), draw(2, (3, 3, 1, 8), "float32")

    def conv(x, kernel):
        return ops.conv(x, kernel, stride=stride, groups=8)

    for expected, actual in both(conv, x, kernel):
        assert_close(actual, expected, "float32")
    gradient = primitives(jax.grad(lambda kernel: conv(x, kernel).sum()), kernel)
    assert ("length=3" in gradient, "length=12" in gradient) == (rows == 4, rows == 1)


@SETTINGS
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_product_equals_lax(lead, sides, dtype) -> None:
    x, kernel = draw(1, (*lead, sides[0]), dtype), draw(2, sides, dtype)
    for expected, actual in both(ops.product, x, kernel):
        assert_close(actual, expected, dtype)


def test_what_multiplies_activations_gives_its_gradient_to_the_product_computed_once() -> None:
    """Without the barrier, XLA:CPU computes it anew in the copy that transposes it, and LoRA takes three times as long."""
    x, kernel = jnp.ones((2, 4)), jnp.ones((4, 3))
    dense = with_updates(lambda: Dense(4, 3), ["kernel"], LoraSettings(2))
    conv = with_updates(lambda: Conv(4, 3, 1), ["kernel"], LoraSettings(2))
    rows = RowChanges(4, (1,), bias=False)
    counts = {
        "product": (lambda x: ops.product(x, kernel), x, 1),
        "dense and its update": (dense, x, 3),
        "1x1 convolution and its update": (conv, x[:, None, None], 3),
        "rows": (lambda x: rows.product(x, kernel), x, 1),
    }
    for name, (function, given_x, expected) in counts.items():
        for chosen, barriers in (("cpu", expected), ("lax", 0)):
            with ops.formulation(chosen):

                def gradient(x, function=function):
                    return jax.vjp(function, x)[1](jnp.ones_like(function(x)))

                assert primitives(gradient, given_x).count("optimization_barrier") == barriers, (name, chosen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead", [(6,), (2, 5)])
def test_a_joined_sum_of_products_equals_two_products(lead, dtype) -> None:
    x, kernel = draw(1, (*lead, 7), dtype), draw(2, (7, 9), dtype)
    low, up = draw(3, (*lead, 2), dtype), draw(4, (2, 9), dtype)
    for expected, actual in both(ops.sum_of_products, x, kernel, low, up):
        assert_close(actual, expected, dtype)
    with ops.formulation("cpu"):
        assert primitives(ops.sum_of_products, x, kernel, low, up).count("dot_general") == 1


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 40), (130, 128), (256, 258)])
@settings(max_examples=3, deadline=None, derandomize=True)
@given(sides=st.tuples(st.integers(3, 7), st.integers(3, 7)), padding=PADDINGS)
def test_winograd_equals_lax(inputs: int, outputs: int, sides, padding) -> None:
    """Each number of channels has its own way to the gradients."""
    x, kernel = draw(1, (2, *sides, inputs), "float32"), draw(2, (3, 3, inputs, outputs), "float32")
    pads = pairs(padding, (3, 3), sides, 1)

    def conv(x, kernel):
        return (
            winograd(pads, x, kernel) if choice.current() == "cpu" else ops.conv(x, kernel, padding=padding)
        )

    for expected, actual in both(conv, x, kernel):
        assert_close(actual, expected, "float32")


@pytest.mark.parametrize(
    ("side", "channels", "dtype", "is_taken"),
    [
        (32, 64, "float32", True),
        (6, 256, "float32", True),
        (5, 512, "float32", False),
        (32, 64, "bfloat16", False),
        (4, 64, "float32", False),
        (96, 16, "float32", False),
    ],
)
def test_winograd_is_taken_where_it_pays_whatever_the_batch(side, channels, dtype, is_taken) -> None:
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), dtype)
    for batch in (1, 64):
        x = jax.ShapeDtypeStruct((batch, side, side, channels), dtype)
        with ops.formulation("cpu"):
            text = primitives(lambda x, kernel: ops.conv(x, kernel), x, kernel)
        assert ("conv_general_dilated" not in text) is is_taken


@SETTINGS
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9), st.integers(1, 3)),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.one_of(
        st.sampled_from(["SAME", "VALID"]), st.just(((1, 1), (1, 1))), st.just(((0, 1), (1, 0)))
    ),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    has_ties=st.booleans(),
)
def test_max_pool_equals_lax(shape, size, stride, padding, dtype, has_ties) -> None:
    if size == 1:
        padding = "VALID"  # a window of border alone has no maximum
    x = draw(3, shape, dtype)
    x = jnp.maximum(x, 0) if has_ties else x
    for expected, actual in both(lambda x: ops.max_pool(x, size, stride, padding), x):
        assert_close(actual, expected, dtype)


def plain_batch_norm(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    var = wide.var((0, 1, 2))
    unbiased = wide.var((0, 1, 2), ddof=1)
    return ((wide - mean) / jnp.sqrt(var + eps) * scale + bias).astype(x.dtype), mean, unbiased


@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (2, 1, 2, 1)])
@pytest.mark.parametrize(("dtype", "offset"), [("float32", 0.0), ("float32", 30.0), ("bfloat16", 1.0)])
def test_batch_norm_equals_its_definition(shape, dtype, offset) -> None:
    x = draw(4, shape, dtype) + jnp.asarray(offset, dtype)
    scale, bias = draw(5, shape[-1:], "float32"), draw(6, shape[-1:], "float32")
    results = []
    for function in (plain_batch_norm, ops.batch_norm):

        @jax.jit
        def value_and_gradients(*args, function=function):
            (y, mean, var), pull = jax.vjp(lambda *a: function(*a, 1e-2), *args)
            return y, mean, var, *pull((draw(7, y.shape, dtype), jnp.zeros_like(mean), jnp.zeros_like(var)))

        results.append(value_and_gradients(x, scale, bias))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32),
            np.asarray(expected, np.float32),
            rtol=0,
            atol=(2e-3 if dtype == "float32" else 0.1)
            * max(1.0, float(np.abs(np.asarray(expected, np.float32)).max())),
        )


def test_batch_norm_agrees_with_numerical_differences() -> None:
    x, scale, bias = draw(1, (2, 3, 3, 2), "float32"), draw(2, (2,), "float32"), draw(3, (2,), "float32")
    weight = draw(4, x.shape, "float32")
    function = lambda x, scale, bias: (jnp.sin(ops.batch_norm(x, scale, bias, 1e-3)[0]) * weight).sum()  # noqa: E731
    check_grads(function, (x, scale, bias), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def autodiff(function, *args):
    """Value and gradients by automatic differentiation, computed from float32, in the dtypes of the arguments."""
    value, pull = jax.vjp(function, *(arg.astype(jnp.float32) for arg in args))
    value = value.astype(args[0].dtype)
    gradients = pull(draw(9, value.shape, value.dtype.name).astype(jnp.float32))
    return value, *(grad.astype(arg.dtype) for grad, arg in zip(gradients, args, strict=True))


@SETTINGS
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(2, 9),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([0.0, 30.0]),
)
def test_layer_norm_equals_its_definition(lead, channels, dtype, offset) -> None:
    x = draw(1, (*lead, channels), dtype) + jnp.asarray(offset, dtype)
    scale, bias = draw(2, (channels,), "float32"), draw(3, (channels,), "float32")

    def definition(x, scale, bias):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias

    value, pull = jax.vjp(lambda *args: ops.layer_norm(*args, 1e-3), x, scale, bias)
    actual = value, *pull(draw(9, value.shape, dtype))
    for got, expected in zip(actual, autodiff(definition, x, scale, bias), strict=True):
        assert_close(got, expected, dtype if offset == 0 else "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_equals_that_of_jax(dtype) -> None:
    x = jnp.concatenate([draw(1, (400,), dtype), jnp.asarray([-1e4, -12, -6, -0.0, 0, 6, 12, 1e4], dtype)])
    value, pull = jax.vjp(ops.gelu, x)
    expected = autodiff(lambda x: jax.nn.gelu(x, approximate=False), x)
    for got, wanted in zip((value, *pull(draw(9, value.shape, dtype))), expected, strict=True):
        assert_close(got[:-8], wanted[:-8], dtype)
        np.testing.assert_allclose(got[-8:], wanted[-8:], atol=1e-6, rtol=1e-2)
        assert np.isfinite(np.asarray(got, np.float32)).all()


def test_few_loops_for_the_gradient_of_a_transformer_block() -> None:
    """Slices of queries, keys and values would give three padded copies, and the error function of erfc two branches."""
    encoder = registry.build("vit_small")
    params, stats = encoder.init(0)
    x = jnp.zeros((1, 5, encoder.features))
    made = primitives(jax.grad(lambda p: encoder.apply(p, stats, x, start=1, stop=2)[0].sum()), params)
    assert "pad[" not in made
    assert "erfc" not in made


def test_input_and_output_of_gelu_are_all_that_is_kept_of_it() -> None:
    """XLA would merge equal expressions of erf in the forward and the backward pass, and keep a third array."""

    def loss(kernels, x):
        for kernel in kernels:
            x = ops.gelu(x @ kernel)
        return x.sum()

    layers, rows, width = 12, 1024, 16
    shapes = [jax.ShapeDtypeStruct((width, width), np.float32)] * layers
    x = jax.ShapeDtypeStruct((rows, width), np.float32)
    kept = jax.jit(jax.grad(loss)).lower(shapes, x).compile().memory_analysis().temp_size_in_bytes
    assert kept < 2.5 * layers * rows * width * 4


@SETTINGS
@given(
    sides=st.tuples(
        st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4)
    ),
    of_images=st.sampled_from(["none", "one", "all"]),
    is_of_heads=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    offset=st.sampled_from([0.0, 300.0]),
)
def test_attention_equals_that_of_jax(sides, of_images, is_of_heads, dtype, offset) -> None:
    batch, queries, keys, heads, width = sides
    q, k, v = (
        draw(seed, (batch, count, heads, width), dtype)
        for seed, count in ((1, queries), (2, keys), (3, keys))
    )
    shape = (batch if of_images == "all" else 1, heads if is_of_heads else 1, queries, keys)
    bias = () if of_images == "none" else (draw(4, shape, dtype) + jnp.asarray(offset, dtype),)

    def theirs(q, k, v, *bias):
        return jax.nn.dot_product_attention(q, k, v, bias=bias[0] if bias else None)

    value, pull = jax.vjp(ops.attention, q, k, v, *bias)
    actual = value, *pull(draw(9, value.shape, dtype))
    for got, expected in zip(actual, autodiff(theirs, q, k, v, *bias), strict=True):
        assert_close(got, expected, dtype if offset == 0 else "bfloat16")


def test_exponentials_are_all_that_is_kept_of_the_scores_of_attention() -> None:
    layers, tokens, width = 8, 256, 8
    q = jax.ShapeDtypeStruct((1, tokens, 1, width), np.float32)

    def loss(x, kernels):
        for kernel in kernels:
            x = ops.attention(x @ kernel, x, x)
        return x.sum()

    kernels = [jax.ShapeDtypeStruct((width, width), np.float32)] * layers
    compiled = jax.jit(jax.grad(loss, 1)).lower(q, kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.75 * layers * tokens**2 * 4  # autodiff: 2.3


def test_formulation_is_chosen_while_tracing() -> None:
    x, kernel = draw(1, (1, 5, 5, 4), "float32"), draw(2, (3, 3, 1, 4), "float32")

    def traced() -> str:
        return primitives(jax.jit(lambda x, k: ops.max_pool(ops.conv(x, k, groups=4), 2, 2)), x, kernel)

    with ops.formulation("lax"):
        assert "conv_general_dilated" in traced()
        with ops.formulation("cpu"):
            assert "conv_general_dilated" not in traced()
        assert "reduce_window" in traced()
    with ops.formulation("cpu"):
        assert "reduce_window" not in traced()


def test_formulation_holds_for_the_gradient() -> None:
    x, kernel = draw(1, (1, 5, 5, 4), "float32"), draw(2, (3, 3, 1, 4), "float32")
    for name, has_conv in (("lax", True), ("cpu", False)):
        with ops.formulation(name):
            text = primitives(jax.grad(lambda x, k: ops.conv(x, k, groups=4).sum(), (0, 1)), x, kernel)
        assert ("conv_general_dilated" in text) is has_conv


def test_unknown_formulation_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of"), ops.formulation("fast"):
        pass


def test_gradient_of_an_unused_side_is_not_computed() -> None:
    """A frozen kernel costs nothing: the compiled gradient of the images alone has no loop over rows."""
    x, kernel = draw(1, (2, 8, 8, 4), "float32"), draw(2, (3, 3, 1, 4), "float32")
    with ops.formulation("cpu"):
        loss = lambda x, k: jnp.square(ops.conv(x, k, groups=4)).sum()  # noqa: E731
        images_only = jax.jit(jax.grad(loss, 0)).lower(x, kernel).compile().as_text()
        kernel_too = jax.jit(jax.grad(loss, 1)).lower(x, kernel).compile().as_text()
    assert " while(" not in images_only
    assert " while(" in kernel_too
