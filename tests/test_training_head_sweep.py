"""Heads trained side by side are those trained one by one; the best of a grid is chosen without the rows it is scored on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dapt_jax.data.pipeline import Order
from dapt_jax.errors import UserError
from dapt_jax.losses.cross_entropy import CrossEntropy
from dapt_jax.models.initial import init_params
from dapt_jax.training import head_sweep
from dapt_jax.training.head_sweep import HeadSettings, HyperParams, Split

RNG = np.random.default_rng(3)
LABELS = RNG.integers(3, size=120).astype(np.int32)
FEATURES = (RNG.normal(size=(120, 12)) + LABELS[:, None] * 0.5).astype(np.float32)
POINTS = [HyperParams(1e-2, 0.0), HyperParams(1e-2, 0.3), HyperParams(1e-3, 0.0)]
SPLITS = [Split(np.arange(0, 80), 0, 0), Split(np.arange(40, 120), 1, 7), Split(np.arange(0, 120, 3), 0, 2)]


def one_by_one(split, point, settings):
    """Plain loop with optax: the oracle."""
    rows = FEATURES[split.rows]
    x = (FEATURES - rows.mean(0)) / rows.std(0)
    shapes = head_sweep.parameter_shapes(12, settings.hidden, 3)
    kinds = {f"{layer}/{leaf}": kind for layer in shapes for leaf, kind in head_sweep._KINDS.items()}
    initial = init_params(shapes, kinds, split.seed)
    params = initial
    is_kernel = {name: {"kernel": True, "bias": False} for name in params}
    tx = optax.adamw(point.lr, weight_decay=point.weight_decay, mask=is_kernel)
    opt = tx.init(params)
    order = Order(tuple(int(row) for row in split.rows), settings.batch_size, split.order)

    def loss(params, x, y, weight):
        for number in range(len(params)):
            x = jnp.maximum(x, 0) if number else x
            x = x @ params[f"layer{number}"]["kernel"] + params[f"layer{number}"]["bias"]
        return (optax.softmax_cross_entropy_with_integer_labels(x, y) * weight).sum() / weight.sum()

    step = jax.jit(jax.grad(loss))
    for epoch in range(settings.epochs):
        for index, weight in zip(*order.epoch(epoch), strict=True):
            updates, opt = tx.update(step(params, x[index], LABELS[index], weight), opt, params)
            params = optax.apply_updates(params, updates)
    return params


def test_every_split_and_point_gives_the_head_of_a_plain_loop():
    settings = HeadSettings((5,), CrossEntropy(3), 4, 16, True)
    together = head_sweep.train(FEATURES, LABELS, SPLITS, settings, [POINTS] * 3)
    for place, split in enumerate(SPLITS):
        for number, point in enumerate(POINTS):
            alone = one_by_one(split, point, settings)
            for name, layer in alone.items():
                mine = together.params[name]
                np.testing.assert_allclose(
                    mine["kernel"][place, number].T, layer["kernel"], rtol=2e-4, atol=2e-6
                )
                np.testing.assert_allclose(mine["bias"][place, number], layer["bias"], rtol=2e-4, atol=2e-6)
    assert together.images == 4 * 3 * sum(len(split.rows) for split in SPLITS)


@pytest.mark.parametrize("folds", [1, 2])
def test_the_point_that_is_chosen_is_the_best_on_held_out_rows_and_is_trained_on_all(folds):
    settings = HeadSettings((5,), CrossEntropy(3), 20, 16, True)
    points = [
        HyperParams(1e-2, 0.0),
        HyperParams(1e-6, 0.0),
        HyperParams(1e-2, 50.0),
    ]  # one learns, one does not move, one is decayed away
    halves = [(split.rows[::2], split.rows[1::2]) for split in SPLITS]
    inner = [[(one, other), (other, one)][:folds] for one, other in halves]
    tuned = head_sweep.tune(FEATURES, LABELS, SPLITS, inner, settings, points)
    expected = head_sweep.train(FEATURES, LABELS, SPLITS, settings, [[points[0]]] * 3)
    np.testing.assert_array_equal(tuned.params["layer0"]["kernel"], expected.params["layer0"]["kernel"])
    trials = sum(len(rows) for parts in inner for rows, _ in parts) * 3 * 20
    assert tuned.images == expected.images + trials
    assert tuned.flops == tuned.images * head_sweep.flops_per_image(12, (5,), CrossEntropy(3))


def test_inner_folds_choose_by_their_mean_loss_and_not_by_that_of_the_last():
    """Two points of which each is better on one inner fold: the larger fold's choice holds."""
    settings = HeadSettings((5,), CrossEntropy(3), 12, 16, True)
    points = [HyperParams(1e-2, 0.0), HyperParams(1e-2, 30.0)]
    rows = SPLITS[0].rows
    folds = [(rows[10:], rows[:10]), (rows[:4], rows[4:8])]
    tuned = head_sweep.tune(FEATURES, LABELS, SPLITS[:1], [folds], settings, points)
    losses = np.zeros(2)
    for fit, held in folds:
        trial = [dataclasses.replace(SPLITS[0], rows=fit)]
        tried = head_sweep.train(FEATURES, LABELS, trial, settings, [points])
        losses += tried.losses(FEATURES, LABELS, [held])[0] * len(held)
    expected = head_sweep.train(FEATURES, LABELS, SPLITS[:1], settings, [[points[losses.argmin()]]])
    np.testing.assert_array_equal(tuned.params["layer0"]["kernel"], expected.params["layer0"]["kernel"])


def test_many_wide_heads_at_once_are_the_same_as_few():
    features = RNG.normal(size=(96, 1280)).astype(np.float32)
    settings = HeadSettings((8,), CrossEntropy(4), 1, 64, True)
    points = [HyperParams(1e-3 * (1 + number), 1e-4 * number) for number in range(9)]
    splits = [Split(np.arange(96), number % 2, number % 5) for number in range(10)]
    many = head_sweep.train(features, LABELS[:96], splits, settings, [points] * 10)
    few = head_sweep.train(features, LABELS[:96], splits[7:8], settings, [points[4:5]])
    np.testing.assert_allclose(
        many.params["layer0"]["kernel"][7, 4], few.params["layer0"]["kernel"][0, 0], rtol=1e-4, atol=1e-7
    )
    assert np.abs(many.params["layer0"]["kernel"]).max((2, 3)).min() > 0


def test_the_epoch_that_is_chosen_is_the_best_on_held_out_rows():
    """Each count of epochs trained by itself is the oracle; noise in the labels makes the last one not the best."""
    noisy = np.where(RNG.random(120) < 0.4, RNG.integers(3, size=120), LABELS).astype(np.int32)
    most, sizes = 7, (12, (16,), CrossEntropy(3))
    settings = HeadSettings((16,), CrossEntropy(3), most, 16, True, early_stopping=True)
    points = [HyperParams(2e-2, 0.0), HyperParams(2e-2, 0.3)]
    inner = [[(each.rows[::2], each.rows[1::2]), (each.rows[1::2], each.rows[::2])] for each in SPLITS]
    tuned = head_sweep.tune(FEATURES, noisy, SPLITS, inner, settings, points)
    parts = [part for folds in inner for part in folds]
    trials = [dataclasses.replace(SPLITS[n // 2], rows=fit) for n, (fit, _) in enumerate(parts)]
    held = [rows for _, rows in parts]
    losses = np.zeros((3, 2, most))
    for epochs in range(1, most + 1):
        own = dataclasses.replace(settings, epochs=epochs)
        tried = head_sweep.train(FEATURES, noisy, trials, own, [points] * len(trials))
        sums = tried.losses(FEATURES, noisy, held) * np.array([[len(rows)] for rows in held])
        losses[:, :, epochs - 1] = sums.reshape(3, 2, 2).sum(1)
    best = [np.unravel_index(each.argmin(), each.shape) for each in losses]
    assert tuned.epochs == tuple(int(epoch) + 1 for _, epoch in best)
    assert min(tuned.epochs) < most
    place = int(np.argmin(tuned.epochs))
    point, epoch = best[place]
    own = dataclasses.replace(settings, epochs=int(epoch) + 1)
    alone = head_sweep.train(FEATURES, noisy, SPLITS[place : place + 1], own, [[points[point]]])
    np.testing.assert_allclose(
        tuned.params["layer0"]["kernel"][place, 0],
        alone.params["layer0"]["kernel"][0, 0],
        rtol=1e-4,
        atol=1e-6,
    )
    evaluated = len(points) * most * sum(map(len, held))
    assert tuned.flops == (
        tuned.images * head_sweep.flops_per_image(*sizes) + evaluated * head_sweep.forward_flops(*sizes)
    )


def test_a_point_that_diverges_is_not_chosen():
    settings = HeadSettings((5,), CrossEntropy(3), 3, 16, True)
    points = [HyperParams(np.inf, 0.0), HyperParams(1e-2, 0.0)]
    inner = [[(SPLITS[0].rows[::2], SPLITS[0].rows[1::2])]]
    tuned = head_sweep.tune(FEATURES, LABELS, SPLITS[:1], inner, settings, points)
    assert np.isfinite(tuned.params["layer0"]["kernel"]).all()


@pytest.mark.parametrize(
    "points", [[HyperParams(1e30, 0.0)], [HyperParams(1e30, 0.0), HyperParams(1e33, 0.0)]]
)
def test_heads_that_diverge_at_every_point_are_one_line(points):
    settings = HeadSettings((5,), CrossEntropy(3), 3, 16, True)
    inner = [[(split.rows[::2], split.rows[1::2])] for split in SPLITS]
    with pytest.raises(
        UserError, match=r"perceptron of fold 1 has diverged: .* at lr=1e\+30 .* transfer.head.lr"
    ):
        head_sweep.tune(FEATURES, LABELS, SPLITS, inner, settings, points)


def test_rows_are_counted_exactly_beyond_what_float32_holds(monkeypatch):
    monkeypatch.setattr(
        head_sweep, "_train", lambda settings, features, labels, split, *more: (split[0], {}, None)
    )
    rows, settings = np.zeros(100_001, int), HeadSettings((2,), CrossEntropy(3), 169, 50_000, False)
    found = head_sweep.train(FEATURES, LABELS, [Split(rows, 0, 0)], settings, [POINTS[:1]])
    assert found.images == 169 * 100_001 > 2**24
    assert found.flops == found.images * head_sweep.flops_per_image(12, (2,), CrossEntropy(3))
