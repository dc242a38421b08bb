import jax
import jax.numpy as jnp

from dapt_jax.cost.memory import (
    device_peak_bytes,
    residual_bytes,
    saves_recomputed,
    train_peak_bytes,
    tree_bytes,
)


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_tree_bytes():
    assert tree_bytes({"a": spec(2, 3), "b": [jnp.zeros(5, jnp.bfloat16)], "c": None}) == 24 + 10
    assert tree_bytes(()) == 0


def loss(params, x):
    hidden = jnp.tanh(x @ params["first"])
    return (hidden @ params["last"]).sum()


PARAMS = {"first": spec(5, 7), "last": spec(7, 3)}


def test_residuals_of_two_layers():
    # Kept: the images, tanh's output for the last weight, and what tanh's derivative is made from. Not the
    # weights.
    kept = residual_bytes(loss, PARAMS, spec(4, 5))
    images, hidden = 4 * 4 * 5, 4 * 4 * 7
    assert images + hidden <= kept <= images + 3 * hidden
    assert kept < residual_bytes(loss, PARAMS, spec(8, 5)) == 2 * kept


def test_frozen_prefix_keeps_less():
    def suffix(trained, frozen, x):
        return loss({**frozen, **trained}, x)

    last = residual_bytes(suffix, {"last": PARAMS["last"]}, {"first": PARAMS["first"]}, spec(4, 5))
    assert last == 4 * 4 * 7


def test_each_residual_counts_once():
    assert residual_bytes(lambda w, x: ((x * w) + (x * w * 2)).sum(), spec(6), spec(6)) <= 3 * 24
    assert residual_bytes(lambda w, x: (x @ w).sum() + (x @ w).sum(), spec(5, 2), spec(3, 5)) == 4 * 15


def test_checkpoint_keeps_inputs_only():
    plain = residual_bytes(lambda w, x: jnp.sin(jnp.sin(jnp.sin(x @ w))).sum(), spec(5, 7), spec(4, 5))
    saved = residual_bytes(
        jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(jnp.sin(x @ w))).sum()), spec(5, 7), spec(4, 5)
    )
    assert saved == 4 * 4 * 5 < plain


def test_the_largest_recomputed_part_is_live_while_its_gradients_are_computed():
    kernels, x = [spec(7, 7)] * 3 + [spec(7, 70)], spec(4, 7)

    def part(kernel, x):
        return jnp.sin(jnp.sin(x @ kernel))

    def peak(layer, number):
        def loss(kernels, x):
            for place, kernel in enumerate(kernels):
                x = (layer if place < number else part)(kernel, x)
            return x.sum()

        return train_peak_bytes(loss, kernels, x)

    narrow, wide = (residual_bytes(part, kernel, x) - tree_bytes(x) for kernel in kernels[2:])
    assert wide == 10 * narrow
    plain = peak(part, 0)
    again = [peak(jax.checkpoint(part), number) for number in range(5)]
    # The input of a part is kept either way; what it computes is there again while its own gradients are computed.
    assert again[0] == plain
    assert again[1:4] == [plain - narrow * count + narrow for count in (1, 2, 3)]
    assert again[4] == plain - 3 * narrow


def test_train_peak_counts_inputs_once():
    x = spec(4, 5)
    params = tree_bytes(PARAMS)
    kept = residual_bytes(loss, PARAMS, x) - tree_bytes(x)
    assert (
        train_peak_bytes(loss, PARAMS, x, optimizer_state=(PARAMS, PARAMS))
        == 4 * params + tree_bytes(x) + kept
    )


def test_device_peak_names_its_source():
    peak, source = device_peak_bytes()
    assert peak > 50_000_000
    assert source in ("device memory_stats", "process peak resident size")


def test_whether_recomputed_activations_save_memory_is_found_by_a_small_program():
    """On a CPU it depends on jaxlib: what a small program says holds for one of 16 MiB of activations."""

    def peak(layer):
        def loss(kernels, x):
            for kernel in kernels:
                x = layer(kernel, x)
            return x.sum()

        shapes = (
            [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 8,
            jax.ShapeDtypeStruct((4096, 64), jnp.float32),
        )
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def layer(kernel, x):
        return jnp.tanh(jnp.sin(x @ kernel))

    assert saves_recomputed() == (peak(jax.checkpoint(layer)) < 0.9 * peak(layer))
