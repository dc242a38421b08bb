"""The recipe of arXiv 2410.18677: loss, mixing, decay and borders, against its public code or by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.losses import make_segmentation
from dapt_jax.models import registry
from dapt_jax.models.encoder import Options
from dapt_jax.parameters import Kind
from dapt_jax.training import freezing, optim
from dapt_jax.training.optim import Optimizer
from dapt_jax.weights.paths import flatten
from tests.fixtures import parity

ROWS = np.arange(64, dtype=np.int32)


@pytest.mark.parametrize(("case", "classes"), [("binary", "01"), ("classes", "0123")])
def test_squared_dice_is_the_public_code_s(case: str, classes: str) -> None:
    stored = np.load(parity.FOLDER / "hidy2024_numbers.npz")
    settings = {"batchwise": True, "smoothing_constant": 1e-5}
    loss = make_segmentation("dice_squared", settings, classes=tuple(classes))
    logits, masks = jnp.asarray(stored[f"{case}_logits"]), jnp.asarray(stored[f"{case}_masks"])
    total = loss.total(logits, masks, jnp.ones(len(logits)))
    np.testing.assert_allclose(total / len(logits), stored[f"{case}_loss"], rtol=1e-5)
    # A padding image of weight 0 takes no part.
    padded = loss.total(
        jnp.concatenate([logits, logits[:1]]), jnp.concatenate([masks, masks[:1]]), jnp.array([1.0, 1, 1, 0])
    )
    np.testing.assert_allclose(padded, total, rtol=1e-5)


def test_mixing_per_image_draws_kind_and_share_for_each_image_and_leaves_a_fifth_of_mixup_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    mix = Mix(mixup=1.0, cutmix=1.0, mixup_probability=0.8, per_image=True)
    steps = jax.jit(jax.vmap(lambda step: mix(images, 0, step)))(np.arange(40))
    mixed, partners, shares = map(np.asarray, steps)
    assert shares.shape == (40, 64)
    moved = partners != ROWS
    whole = (mixed == np.rint(mixed)).all((2, 3, 4))  # CutMix, or not mixed
    alone = (mixed == images).all((2, 3, 4)) & moved
    assert whole[moved].mean() == pytest.approx(0.5 + 0.5 * 0.2, abs=0.03)
    assert 0.1 < alone.sum() / moved.sum() < 0.16  # of mixup, and of CutMix's smallest rectangles
    of_mixup = shares[~whole]
    assert of_mixup.mean() == pytest.approx(0.5, abs=0.03)
    assert of_mixup.std() == pytest.approx(12**-0.5, abs=0.02)
    for image, partner, share, blend in zip(images, images[partners[0]], shares[0], mixed[0], strict=True):
        if not (blend == np.rint(blend)).all():
            np.testing.assert_allclose(blend, share * image + (1 - share) * partner.astype(float), atol=1e-2)


def test_erasing_with_zeros_and_a_zero_border_leave_no_other_value_than_the_image_s() -> None:
    images = np.full((64, 16, 16, 3), 100, np.uint8)
    erased = np.asarray(Augment(erase=1.0, erase_with="zero")(images, 0, 0, ROWS))
    assert set(np.unique(erased)) == {0.0, 100.0}
    turned = Augment(rotate=45.0, border="zero")
    found = np.asarray(turned(images, 0, 0, ROWS))
    assert found.min() == 0
    np.testing.assert_allclose(found[:, 8, 8], 100, rtol=1e-5)
    np.testing.assert_allclose(Augment(rotate=45.0)(images, 0, 0, ROWS), 100, rtol=1e-5)
    masks = np.ones((64, 16, 16), np.uint8)
    assert set(np.unique(turned.masks(masks, 0, 0, ROWS))) == {0, 1}
    strong = Augment(randaugment=2, magnitude=30.0, border="zero")
    assert set(np.unique(strong.masks(masks, 0, 0, ROWS))) == {0, 1}


def test_decay_of_all_leaves_is_optax_s_own() -> None:
    params = {"a": {"kernel": np.full((2, 2), 3, np.float32), "bias": np.full(2, 5, np.float32)}}
    kinds = {"a/bias": Kind.BIAS, "a/kernel": Kind.DENSE_KERNEL}
    mask = freezing.TrainableSpec(frozenset(kinds), (), 0, ())
    optimizer = Optimizer("adamw", weight_decay=0.05, eps=1e-8, decay_all=True)
    (labels,) = optim.labels(tuple(kinds), kinds, ["a"], [mask], optimizer)
    ours = optim.transformation(optimizer, params, labels)
    theirs = optax.adamw(1.0, weight_decay=0.05)
    gradient = jax.tree.map(np.ones_like, params)
    direction, _ = ours.update(gradient, ours.init(params), params)
    update, _ = theirs.update(gradient, theirs.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, rtol=1e-6), direction, update)


def test_another_stochastic_depth_keeps_arrays_normalisation_and_truncation() -> None:
    encoder = registry.build("resnet50_hidy2024").truncate("stage2/block4")
    other = registry.for_masks(encoder, 0.1)
    assert other.groups == encoder.groups
    assert flatten(other.abstract()[0]) == flatten(encoder.abstract()[0])
    assert other.options == Options(drop_path=0.1)
    assert not any(spec.is_stochastic for spec in encoder.specs)
    assert sum(spec.is_stochastic for spec in other.specs) == 6  # all blocks but the first
