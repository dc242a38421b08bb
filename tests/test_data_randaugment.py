"""RandAugment: each operation is torchvision's, masks follow what moves, and draws are of (seed, view, row)."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax import ops
from dapt_jax.data import randaugment
from dapt_jax.data.augment import Augment
from dapt_jax.data.randaugment import MOVING, OPERATIONS
from dapt_jax.errors import UserError
from tests.fixtures import make_randaugment

THEIRS = np.load(Path(__file__).with_name("fixtures") / "randaugment.npz")
ROWS = np.arange(64, dtype=np.int32)
RATHER = {"saturation": 2, "contrast": 2, "sharpness": 2}
"""By how many values a pixel may differ: torchvision cuts off where we round, in these twice."""
EXACT = ("identity", "translate_x", "translate_y", "posterise", "solarise", "equalise")


@pytest.fixture(scope="module")
def one():
    """An operation by name, direction and magnitude."""
    made = jax.jit(randaugment.images, static_argnums=2)

    def apply(image, name, other_way, magnitude):
        operation = jnp.array([OPERATIONS.index(name)]), jnp.array([other_way])
        return np.asarray(made(jnp.asarray(image, jnp.float32), operation, float(magnitude)))

    return apply


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvision_s(one, name):
    image = make_randaugment.image()
    found = [key for key in THEIRS.files if key.startswith(f"{name}/")]
    assert len(found) in (2, 4)
    for key in found:
        _, magnitude, other_way = key.split("/")
        ours, theirs = one(image, name, int(other_way), magnitude), THEIRS[key].astype(float)
        inside = np.ones(image.shape[:2], bool)
        if name in MOVING:
            inside = np.unpackbits(THEIRS[f"inside/{key}"])[: inside.size].reshape(inside.shape).astype(bool)
            assert inside.mean() > 0.4
        most = 0 if name in EXACT else RATHER.get(name, 1)
        np.testing.assert_allclose(ours[inside], theirs[inside], atol=most, err_msg=key)
        if name != "identity":
            assert np.abs(theirs - image)[inside].mean() > 0.4, "the fixture shows nothing"


def test_every_operation_of_no_magnitude_but_those_without_one_leaves_an_image_alone(one):
    image = make_randaugment.image()
    for name in OPERATIONS:
        is_same = np.array_equal(one(image, name, 0, 0), image)
        assert is_same == (name not in ("autocontrast", "equalise")), name


def test_flat_images_and_images_of_two_values_stay_within_range(one):
    for image in (np.zeros((8, 8, 3)), np.full((8, 8, 3), 255.0), np.indices((8, 8, 3)).sum(0) % 2 * 255.0):
        for name, other_way in itertools.product(OPERATIONS, (0, 1)):
            made = one(image, name, other_way, 30)
            assert np.isfinite(made).all()
            assert (made == np.clip(np.round(made), 0, 255)).all(), name


def test_operations_are_drawn_alike_often_and_both_ways():
    keys = jax.random.split(jax.random.key(0), 7000)
    operations, ways = (np.asarray(each) for each in jax.vmap(lambda key: randaugment.drawn(key, 2))(keys))
    counts = np.bincount(operations.reshape(-1), minlength=len(OPERATIONS))
    assert abs(counts - 1000).max() < 4.5 * 1000**0.5
    assert abs(ways.mean() - 0.5) < 0.02
    assert np.corrcoef(operations.T)[0, 1] == pytest.approx(0, abs=0.04)


def test_a_mask_follows_what_moves_and_nothing_else():
    augment = Augment(randaugment=2, magnitude=15.0)
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 4, (64, 4, 4)), np.ones((6, 6))).astype(np.uint8)
    images = np.repeat(60 * classes[..., None], 3, -1).astype(np.uint8)
    made, moved = np.asarray(augment(images, 3, 1, ROWS)), np.asarray(augment.masks(classes, 3, 1, ROWS))
    assert moved.dtype == np.uint8
    drawn = [[OPERATIONS[each] for each in row] for row in operations_of(3, 1, 2)]
    seen = dict.fromkeys(("still", "moving"), 0)
    for row, names in enumerate(drawn):
        does_move = [name in MOVING for name in names]
        if not any(does_move):
            np.testing.assert_array_equal(moved[row], classes[row])
            seen["still"] += 1
        elif all(does_move or name == "identity" for name, does_move in zip(names, does_move, strict=True)):
            values = made[row, ..., 0] / 60
            # Between classes along edges alone: elsewhere a pixel is of its class, and so must its mask be.
            inside = np.abs(values - np.rint(values)) < 1e-3
            assert inside.mean() > 0.4
            assert (np.rint(values)[inside] == moved[row][inside]).mean() > 0.98, names
            assert (moved[row] != classes[row]).any(), names
            seen["moving"] += 1
    assert min(seen.values()) >= 5


def test_images_one_by_one_and_all_at_once_come_out_alike(monkeypatch):
    """The first is what a CPU does, the second what an accelerator does."""
    augment = Augment("horizontal", randaugment=2, magnitude=12.0)
    images = np.broadcast_to(make_randaugment.image(), (24, 24, 32, 3))
    masks, rows = images[..., 0] // 64, ROWS[:24]
    found = [augment(images, 0, 0, rows), augment.masks(masks, 0, 0, rows)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at_once = [augment(images, 0, 0, rows), augment.masks(masks, 0, 0, rows)]
    np.testing.assert_array_equal(found[1], at_once[1])
    differ = np.asarray(found[0]) != np.asarray(at_once[0])  # a half may be rounded either way
    assert differ.mean() < 0.02


def operations_of(seed, view, number):
    """What is drawn for the first rows, found by the keys that every augmentation draws from."""
    from dapt_jax.data import augment

    keys = augment.example_keys(seed, view, ROWS)
    folded = jax.vmap(lambda key: jax.random.fold_in(key, augment._FOR_RANDAUGMENT))(keys)
    return np.asarray(jax.vmap(lambda key: randaugment.drawn(key, number)[0])(folded))


def test_draws_depend_on_seed_view_and_row_alone():
    augment = Augment(randaugment=1, magnitude=20.0)
    images = np.broadcast_to(make_randaugment.image(), (64, 24, 32, 3))
    first = np.asarray(augment(images, 0, 0, ROWS))
    np.testing.assert_array_equal(first[::-1][:8], augment(images[:8], 0, 0, ROWS[::-1][:8]))
    assert len({each.tobytes() for each in first}) > 12
    for seed, view in ((1, 0), (0, 1)):
        assert (first != np.asarray(augment(images, seed, view, ROWS))).any()


def test_what_is_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"magnitude is 31\.0; expected 0 to 30"):
        Augment(randaugment=2, magnitude=31.0)
    with pytest.raises(UserError, match=r"randaugment is -1; expected 0 or more"):
        Augment(randaugment=-1)


def test_what_is_compiled_for_another_device_takes_all_images_at_once():
    """As `ops.formulation` says, whatever machine traces it: a CPU takes them one by one, so that a branch alone runs."""
    images, rows = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4, dtype=np.int32)
    seen = {}
    for name in ("cpu", "lax"):
        with ops.formulation(name):
            seen[name] = str(jax.make_jaxpr(lambda *args: Augment(randaugment=2)(*args))(images, 0, 0, rows))
    assert "cond[" in seen["cpu"]
    assert "cond[" not in seen["lax"]
