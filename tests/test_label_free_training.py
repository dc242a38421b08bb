"""Label-free objectives: cached or not, resumed or not, the same numbers; the ledger is the plan."""

import dataclasses
import errno
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapt_jax import ops
from dapt_jax.aot.compile import abstract_arguments
from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import DEFAULT, Options
from dapt_jax.models.encoders import vit
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.row_changes import RowSettings
from dapt_jax.models.trunk import Trunk
from dapt_jax.objectives import (
    Dino,
    DinoSettings,
    Distil,
    DistilSettings,
    MaeSettings,
    MaskedAutoencoder,
    Reconstruct,
    ReconstructSettings,
    TwoViews,
    TwoViewsSettings,
    two_views,
)
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime.sharding import make_mesh
from dapt_jax.study import plan
from dapt_jax.study.collapse import CollapseAlarm
from dapt_jax.training import accounting, image_batches, label_free, loop, patterns, targets
from dapt_jax.training.cache import disk
from dapt_jax.training.cache.policy import Caching
from dapt_jax.training.cache.store import ActivationCache
from dapt_jax.training.context import NonFinitePolicy
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import RunTag, TrainData, TrainingRun
from dapt_jax.weights.paths import flatten
from tests import tiny
from tests.test_training_loop import KilledError, KillingLedger, context, counts, curve, leaves
from tests.test_training_recovery import explode

DATA = tiny.dataset(24)
VIEWS = Augment("dihedral", 0.1, 0.2, 0.2)
CNN = tiny.encoder()
VIT = vit.network("vit_small", vit.Size(16, 2, 2), vit.MAE._replace(patch=4, image_size=16), DEFAULT)
ENCODERS = {"cnn": (CNN, ("stage3", "head")), "vit": (VIT, ("block2", "top", "head"))}
TEACHER = vit.network("vit_small", vit.Size(8, 1, 2), vit.MAE._replace(patch=4, image_size=16), DEFAULT)
OBJECTIVES = ("reconstruct", "distil", "two_views", "vicreg")


THREE = (Phase("partial", 3, ("stage3", "head"), 1e-3, views=2),)


def objective_of(name, encoder):
    if name == "reconstruct":
        return Reconstruct(Trunk(encoder))
    if name == "distil":
        return Distil(Trunk(TEACHER, reads="map", side=24), DistilSettings(local=0.5))
    if name == "mae":
        return MaskedAutoencoder(None, MaeSettings(decoder_embed_dim=32, decoder_depth=1))
    if name == "dino":
        return Dino(None, DinoSettings(24, 16, 8, warmup_teacher_temp=0.03, warmup_teacher_temp_epochs=3))
    is_vicreg = name == "vicreg"
    options = TwoViewsSettings("vicreg" if is_vicreg else "nt_xent", patient_positives=is_vicreg)
    return TwoViews(None, options)


def head_first(kind="cnn"):
    return (
        Phase("head_layers", 1, ("head/dense1", "head/dense2", "head/dense3"), 1e-2, views=2),
        Phase("head", 1, ("head",), 1e-2, views=2),
        Phase("partial", 1, ENCODERS[kind][1], 1e-2, views=2),
    )


@functools.cache
def teacher_weights():
    params, batch_stats = Classifier(TEACHER, 1).init(5)
    return {key: value for key, value in params.items() if key != "head"}, batch_stats


def run_of(
    name, kind="cnn", cache="on", phases=None, augment=VIEWS, data=DATA, val=4, batch_size=8, **others
):
    encoder, trainable = ENCODERS[kind]
    objective = objective_of(name, encoder) if isinstance(name, str) else name
    phases = phases or (Phase("partial", 2, trainable, 1e-3, views=2),)
    model = label_free.pretext(encoder, objective, phases)
    rows = np.arange(len(data))
    caching = Caching(cache, 1 << 28) if isinstance(cache, str) else cache
    data = TrainData(data, rows[: len(rows) - val], rows[len(rows) - val :])
    weights = teacher_weights if name == "distil" else None
    return TrainingRun(
        model,
        phases,
        data,
        objective,
        batch_size=batch_size,
        augment=augment,
        caching=caching,
        optimizer=Optimizer("sgd"),  # Adam divides gradients that are rounding alone, of attention's keys
        tag=RunTag("test"),
        teacher_weights=weights,
        **others,
    )


def train(run, folder=None, **others):
    trained = loop.train(run, *run.model.init(1), context(folder, **others))
    return leaves(trained), trained.costs


def relative_difference(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in each]) for each in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def rows_of_agreeing_runs(runs):
    """Train a run with and without cached activations, by "on" and "off", and return the ledger's rows of both.

    They end in the same losses, weights and metrics, and the ledger is the plan to the integer.
    """
    (cached, rows), (plain, plain_rows) = (train(runs[cache]) for cache in ("on", "off"))
    np.testing.assert_allclose(curve(rows), curve(plain_rows), rtol=1e-6)
    assert relative_difference(plain, cached) < 1e-5
    for metric in ("val_loss", "rankme"):
        a, b = ([point[metric] for row in each for point in row.curve] for each in (rows, plain_rows))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    for run, found in zip((runs["on"], runs["off"]), (rows, plain_rows), strict=True):
        planned = plan.of_run(run)
        assert [row.model_flops for row in found] == [phase.flops for phase in planned]
        assert sum(row.model_flops for row in found) == run.flops()
        assert [row.head_flops for row in found] == [phase.head_flops for phase in planned]
        assert [row.target_flops for row in found] == [phase.target_flops for phase in planned]
    return rows, plain_rows


def check_kills(run, entries, folder, **others):
    """Kill a run at each of the first entries of its ledger: it resumes to the bits and counts of a quiet one."""
    quiet, rows = train(run, **others)
    for number in range(1, entries + 1):
        ledger = KillingLedger(folder / f"{number}.jsonl", number)
        checkpoints = folder / str(number)
        try:
            resumed, again = train(run, checkpoints, ledger=ledger, **others)
        except KilledError:
            resumed, again = train(run, checkpoints, ledger=Ledger(ledger.path), **others)
        assert all(np.array_equal(a, b) for a, b in zip(quiet, resumed, strict=True))
        assert counts(again) == counts(rows)
        assert [row.target_flops for row in again] == [row.target_flops for row in rows]


ALL = [(name, kind) for name in OBJECTIVES for kind in ENCODERS]
SHORT = [("reconstruct", "vit"), ("distil", "cnn"), ("two_views", "cnn")]
MATRIX = [pytest.param(*each, marks=[] if each in SHORT else [pytest.mark.long]) for each in ALL]


@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_cached_and_uncached_runs_with_the_same_views_give_equal_losses_and_weights(name, kind):
    (cached, rows), (plain, plain_rows) = (train(run_of(name, kind, cache)) for cache in ("on", "off"))
    assert [row.cached for row in (*rows, *plain_rows)] == ["filled", "off"]
    np.testing.assert_allclose(curve(rows), curve(plain_rows), rtol=1e-6)
    for metric in ("val_loss", "rankme", "feature_sd"):
        a, b = ([point[metric] for point in each[0].curve] for each in (rows, plain_rows))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert all(point["lidar"] > 1 for row in rows for point in row.curve)  # of the two cached views
    assert relative_difference(plain, cached) < 1e-5


LEDGERS = [("reconstruct", "on"), ("distil", "on"), ("distil", "off")]
LONG_LEDGERS = [("reconstruct", "off"), ("two_views", "on"), ("two_views", "off")]


@pytest.mark.parametrize(
    ("name", "cache"), [*LEDGERS, *(pytest.param(*each, marks=pytest.mark.long) for each in LONG_LEDGERS)]
)
def test_the_ledger_is_the_plan_to_the_integer_with_heads_and_targets_on_their_own(name, cache):
    phases = (
        Phase("head", 1, ("head",), 1e-3, views=2),
        Phase("partial", 1, ("stage3", "head"), 1e-3, views=2),
        Phase("full", 2, ("*",), 1e-3, views=2),
    )
    run = run_of(name, "cnn", cache, phases)
    planned, (_, rows) = plan.of_run(run), train(run)
    assert [row.model_flops for row in rows] == [phase.flops for phase in planned]
    assert sum(phase.flops for phase in planned) == run.flops()
    assert [row.head_flops for row in rows] == [phase.head_flops for phase in planned]
    assert [row.target_flops for row in rows] == [phase.target_flops for phase in planned]
    assert all(0 < row.head_flops < row.model_flops for row in rows)
    forward = run.loss.teacher and accounting.forward(
        run.loss.teacher, 16, len(run.loss.teacher.encoder.groups)
    )
    each = forward.model if forward else 0
    if cache == "off":  # for every image of every epoch
        assert [row.target_flops for row in rows] == [epochs * 20 * each for epochs in (1, 1, 2)]
    elif name == "reconstruct":  # the output of the cached pass of the head's phase is its target
        assert [row.target_flops for row in rows] == [0, 0, 0]
    else:  # once for every image and view
        assert [row.target_flops for row in rows] == [24 * 2 * each, 0, 0]


def test_another_arm_reuses_the_targets_of_a_teacher_and_says_so():
    cache = ActivationCache()
    run = run_of("distil", phases=(Phase("full", 1, ("*",), 1e-3, views=2),))
    (_, (first,)), (_, (second,)) = train(run, cache=cache), train(run, cache=cache)
    assert first.target_flops > 0 == first.reused_flops
    assert (second.target_flops, second.reused_flops) == (0, first.target_flops)
    assert second.model_flops + second.reused_flops == first.model_flops


@pytest.mark.parametrize("name", ["distil", pytest.param("two_views", marks=pytest.mark.long)])
def test_seeds_with_views_of_one_seed_share_what_is_cached_of_them(name):
    cache = ActivationCache()
    (_, (first,)), (cached, (second,)) = (
        train(run_of(name, seed=seed, view_seed=7), cache=cache) for seed in (0, 1)
    )
    assert first.reused_flops == 0 < second.reused_flops
    assert second.model_flops + second.reused_flops == first.model_flops
    plain, (uncached,) = train(run_of(name, cache="off", seed=1, view_seed=7))
    np.testing.assert_allclose(curve([second]), curve([uncached]), rtol=1e-6)
    assert relative_difference(plain, cached) < 1e-5
    own, _ = train(run_of(name, cache="off", seed=1))
    assert relative_difference(own, plain) > 1e-4  # the views are others
    new_views = (Phase("partial", 2, ("stage3", "head"), 1e-3),)
    apart, same = (
        train(run_of(name, cache="off", phases=new_views, seed=1, view_seed=each))[0] for each in (7, -1)
    )
    assert relative_difference(apart, same) == 0  # of fixed views alone


@pytest.mark.long
@pytest.mark.parametrize("name", ["reconstruct", "distil", "two_views", "mae"])
def test_a_run_killed_at_any_entry_of_the_ledger_resumes_to_the_bit(name, tmp_path):
    kind = "vit" if name == "mae" else "cnn"
    phases = tuple(
        Phase(phase, 1, trainable, 1e-3, views=2)
        for phase, trainable in (("partial", ENCODERS[kind][1]), ("full", ("*",)))
    )
    check_kills(run_of(name, kind, phases=phases), 4, tmp_path)


@pytest.mark.parametrize("kind", ["cnn", pytest.param("vit", marks=pytest.mark.long)])
def test_low_rank_updates_train_without_labels_and_merge_exactly(kind):
    encoder, trainable = ENCODERS[kind]
    phases = (Phase("lora", 2, (f"{trainable[0]}:lora", "head"), 1e-2, views=2),)
    tuned = patterns.with_lora(encoder, phases, LoraSettings(rank=2))
    objective = Reconstruct(Trunk(encoder), ReconstructSettings(noise=1.0))
    model = label_free.pretext(tuned, objective, phases)
    run = dataclasses.replace(run_of("reconstruct", kind), model=model, phases=phases, loss=objective)
    start, batch_stats = model.init(1)
    trained = loop.train(run, start, batch_stats, context(None))
    assert trained.costs[0].cached == "filled"
    assert sum(row.model_flops for row in trained.costs) == run.flops()
    before, after = flatten(start), flatten(trained.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path for path in moved if not path.startswith("head/")}
    assert all("/lora/" in path or path.startswith("head/") for path in moved)
    images = jnp.asarray(DATA.images.batch(range(4))).astype(jnp.float32)

    def features_of(network, params):
        weights = jax.tree.map(jnp.asarray, (params, trained.batch_stats))
        return np.asarray(network.apply(*weights, images)[0])

    merged, unmerged, source = (
        {key: value for key, value in params.items() if key != "head"}
        for params in (tuned.merged(trained.params), trained.params, tuned.merged(start))
    )
    found = features_of(encoder, merged)
    assert relative_difference([found], [features_of(tuned, unmerged)]) < 1e-5
    assert relative_difference([found], [features_of(encoder, source)]) > 1e-4


@pytest.mark.long
def test_rows_train_without_labels_above_a_cached_prefix_and_no_others_move():
    phases = (Phase("apla", 1, ("block2/attention/project:rows", "head"), 1e-2, views=2),)
    tuned = patterns.with_rows(VIT, phases, RowSettings(3))
    objective = Reconstruct(Trunk(VIT), ReconstructSettings(noise=1.0))
    model = label_free.pretext(tuned, objective, phases)
    run = dataclasses.replace(run_of("reconstruct", "vit"), model=model, phases=phases, loss=objective)
    start, batch_stats = model.init(1)
    trained = loop.train(run, start, batch_stats, context(None))
    assert trained.costs[0].cached == "filled"
    assert sum(row.model_flops for row in trained.costs) == run.flops()
    before, after = (flatten(tuned.merged(params)) for params in (start, trained.params))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path for path in moved if not path.startswith("head/")} == {
        f"block2/attention/project/{leaf}" for leaf in ("kernel", "bias")
    }


@pytest.mark.long
def test_training_brings_the_held_out_loss_down():
    phases = (Phase("full", 3, ("*",), 3e-3, views=2),)
    for name in ("reconstruct", "distil"):
        run = dataclasses.replace(run_of(name, phases=phases), optimizer=Optimizer("adam"))
        losses = [point["val_loss"] for point in train(run)[1][0].curve]
        assert min(losses) < 0.95 * losses[0]


def test_published_token_reconstruction_replaces_tokens_before_the_positions_and_leaves_one_image_clean():
    """arXiv 2405.00117: noise on pixels, patch tokens replaced by one vector, class token whole, last image clean."""
    objective = Reconstruct(Trunk(VIT), ReconstructSettings(noise=0.0, replaced=0.9))
    model = label_free.pretext(VIT, objective, (Phase("full", 1, ("*",), 1e-3),))
    assert model.boundaries == (0,)
    params, batch_stats = model.init(3)
    params["stem"]["position"] = np.random.default_rng(0).normal(size=params["stem"]["position"].shape)
    params["stem"]["position"] = params["stem"]["position"].astype(np.float32)
    params["head"]["position"]["0"] = np.full(16, 7, np.float32)
    params, images = jax.tree.map(jnp.asarray, params), jnp.asarray(DATA.images.batch(range(6)))
    x = model.prefix(params, batch_stats, images, 0)
    tokens, boundary = model.corrupted(params, batch_stats, x, 0, jax.random.key(1))
    clean = model.prefix(params, batch_stats, images, 1)
    bias = params["stem"]["conv"]["bias"]
    hit = np.any(np.asarray(tokens != clean), -1)
    assert boundary == 1
    assert not hit[:, 0].any()
    assert not hit[-1].any()
    assert hit[:-1, 1:].any()
    expected = np.broadcast_to(params["stem"]["position"] + bias + 7, tokens.shape)
    np.testing.assert_allclose(np.asarray(tokens)[hit], expected[hit], rtol=1e-5)


def test_reconstruction_of_the_clean_image_starts_at_zero_and_noise_is_relative_to_each_channel():
    objective = Reconstruct(Trunk(CNN))
    model = label_free.pretext(CNN, objective, (Phase("full", 1, ("*",), 1e-3),))
    weights, images = jax.tree.map(jnp.asarray, model.init(1)), jnp.asarray(DATA.images.batch(range(4)))
    target = model.prefix(*weights, images, len(CNN.groups))
    outputs, _ = model.suffix(*weights, model.prefix(*weights, images, 0), 0)
    assert float(objective.total(outputs, target, jnp.ones(4))) < 1e-6
    x = np.random.default_rng(0).normal(size=(5, 64, 64, 2)).astype(np.float32) * [1, 30]
    draws = jax.random.uniform(jax.random.key(0), x.shape)
    noise = np.asarray(objective.noisy(jnp.asarray(x, jnp.float32), draws) - x)
    np.testing.assert_allclose(noise[:-1].std((0, 1, 2)) / x.std((0, 1, 2)), [0.2, 0.2], rtol=0.05)
    assert not noise[-1].any()


@dataclasses.dataclass(frozen=True)
class Clean(Reconstruct):
    """Counts the images that nothing has corrupted."""

    def losses(self, outputs, targets, weights):
        return (super().losses(outputs, targets, weights) < 1e-5).astype(jnp.float32)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_one_image_of_a_batch_stays_clean_in_however_many_parts_it_is_computed(parts):
    objective = Clean(Trunk(CNN), ReconstructSettings(noise=1.0, replaced=0.5))
    phases = (Phase("full", 1, ("*",), 1e-9, views=1),)
    _, rows = train(run_of(objective, phases=phases, batch_size=4, grad_accum_steps=parts))
    assert curve(rows) == [0.25]


def reference_nt_xent(a, b, groups, weights, t):
    """Equation 1 of arXiv 2002.05709 by loops, without negatives of the own group and of padding."""
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n, g, w = len(a), np.tile(groups, 2), np.tile(weights, 2)
    found = np.zeros(2 * n)
    for i in range(2 * n):
        positive = z[i] @ z[(i + n) % (2 * n)] / t
        others = [z[i] @ z[k] / t for k in range(2 * n) if g[k] != g[i] and w[k] > 0]
        found[i] = np.log(np.exp([positive, *others]).sum()) - positive
    return (found[:n] + found[n:]) / 2


def test_nt_xent_is_the_published_one_without_negatives_of_the_same_patient_and_of_padding():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 5)).astype(np.float32)
    groups, weights = np.array([0, 1, 1, 2, 3, 4]), np.array([1, 1, 1, 2, 1, 0], np.float32)
    found = two_views.nt_xent(a, b, groups, weights, 0.3)
    np.testing.assert_allclose(found, reference_nt_xent(a, b, groups, weights, 0.3), rtol=1e-4)
    alone = two_views.nt_xent(a, b, np.zeros(6, int), weights, 0.3)
    np.testing.assert_array_equal(alone, np.zeros(6))
    gradient = jax.grad(lambda a: two_views.nt_xent(a, b, np.zeros(6, int), weights, 0.3).sum())(a)
    assert np.isfinite(gradient).all()


def test_vicreg_is_the_published_one_and_does_not_see_padding():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 7, 4)).astype(np.float32)
    weights = np.array([1, 1, 1, 1, 1, 0, 0], np.float32)
    expected = 25 * ((a - b) ** 2).mean(1)
    for z in (a[:5], b[:5]):
        matrix = np.cov(z.T)
        expected += 25 * np.maximum(0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean() / 2
        expected += (matrix**2).sum() / 4 - (np.diag(matrix) ** 2).sum() / 4
    np.testing.assert_allclose(two_views.vicreg(a, b, weights), expected, rtol=1e-4)


def test_every_pair_of_views_is_compared_and_partners_are_other_images_of_the_patient():
    run = run_of("vicreg", phases=(Phase("full", 12, ("*",), 1e-3, views=4),))
    pairs = {run.programs[0].view_pair(epoch) for epoch in range(12)}
    assert pairs == {(a, b) for a in range(4) for b in range(4) if a != b}
    groups, rows = DATA.groups, run.train_rows
    for epoch in range(3):
        partner = run.partners(epoch)
        assert (groups[partner] == groups).all()
        assert (partner[rows] != rows).all()  # each patient of the data has two images
        assert set(partner[rows]) == set(rows)
    assert (run_of("two_views").partners(0) == np.arange(len(DATA))).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda: run_of("two_views", augment=Augment()),
            "the two views of an image are equal, since adapt.aug",
        ),
        (
            lambda: run_of("two_views", augment=Augment(magnitude=15.0, border="zero", erase_with="zero")),
            "the two views of an image are equal, since adapt.aug",
        ),
        (
            lambda: run_of("two_views", phases=(Phase("full", 1, ("*",), 1e-3, views=1),)),
            "since it has one fixed view",
        ),
        (lambda: run_of("two_views", grad_accum_steps=2), "grad_accum_steps=2 computes it in parts"),
        (
            lambda: run_of("two_views", data=dataclasses.replace(DATA, groups=np.full(24, "P1"))),
            "all 20 images are of one patient or look alike",
        ),
        (lambda: run_of("reconstruct", data=DATA.take([0, 1]), val=1), "1 image to train on"),
        (
            lambda: run_of("distil", cache=Caching("on", 19_000, 30_000)).check_cache(),
            "views=1 would fit",
        ),
        (
            lambda: run_of("distil", cache=Caching("on", 20, 30)).check_cache(),
            "not even one view fits",
        ),
    ],
)
def test_runs_that_could_only_fail_are_refused_in_one_line(change, said):
    with pytest.raises(UserError, match=said):
        change()


@pytest.mark.parametrize("name", ["reconstruct", "two_views"])
def test_what_diverges_in_the_last_step_of_an_epoch_is_no_collapse_but_goes_back(name, tmp_path, monkeypatch):
    run = run_of(name, phases=(Phase("full", 2, ("*",), 1e-3),))
    alarm = CollapseAlarm("test", [2.0], "halt", print)
    assert run.steps_per_epoch == 3
    explode(monkeypatch, 2, times=1)
    policy = NonFinitePolicy("rollback", folder=tmp_path / "nan")
    _, (row,) = train(run, tmp_path, callbacks=(alarm,), non_finite=policy)
    assert row.curve[0]["rolled_back_from"] > 2
    assert all(np.isfinite([point["loss"], point["rankme"]]).all() for point in row.curve)


def test_pairs_are_cached_where_an_epoch_sees_a_view_twice_or_a_later_one_does():
    def paired(epochs, cache="auto"):
        phases = (Phase("partial", epochs, ENCODERS["cnn"][1], 1e-3, views=4),)
        return run_of("two_views", cache=cache, phases=phases, val=0)

    kept, plain = paired(4), paired(4, "off")
    decision = kept.cache_decision(kept.programs[0])
    assert decision.tier == "memory"
    assert f"instead of 8 passes: saves {(plain.flops() - kept.flops()) / 1e12:.3g} TFLOP" in decision.reason
    few = paired(2)
    assert few.cache_decision(few.programs[0]).reason == "2 epochs see no view twice"


@pytest.mark.parametrize("first", ["stem", "block2"])
def test_the_held_out_loss_is_that_of_the_network_at_test_time_whatever_training_drops(first, monkeypatch):
    def held_out(drop):
        options = Options(drop_path=drop, dropout=drop)
        encoder = vit.network(
            "vit_small", vit.Size(16, 2, 2), vit.MAE._replace(patch=4, image_size=16), options
        )
        monkeypatch.setitem(ENCODERS, "vit", (encoder, ()))
        groups = encoder.groups[encoder.groups.index(first) :]
        _, (row,) = train(
            run_of("reconstruct", "vit", phases=(Phase("still", 1, (*groups, "head"), 1e-30, views=2),))
        )
        return row.curve[0]["val_loss"]

    assert held_out(0.5) == pytest.approx(held_out(0.0), rel=1e-6)


def test_groups_of_batch_norm_see_both_views_of_their_own_images():
    model, rng = run_of("two_views").model, np.random.default_rng(0)
    params, batch_stats = model.init(1)
    views = [rng.normal(size=(8, 16, 16, 3)).astype(np.float32) for _ in range(2)]

    def embedded(rows, groups):
        with ops.batch_norm_groups(groups):
            return model.suffix(params, batch_stats, tuple(view[rows] for view in views), 0, "train")[0]

    for whole, *parts in zip(
        embedded(slice(8), 2), embedded(slice(4), 1), embedded(slice(4, 8), 1), strict=True
    ):
        np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-4, atol=1e-6)


def test_targets_that_fit_nowhere_are_computed_with_every_batch_and_give_the_same_weights():
    (kept, rows), (fresh, fresh_rows) = (
        train(run_of("distil", phases=THREE, cache=Caching("auto", memory, 0)))
        for memory in (1 << 28, 30_000)
    )
    assert [row.cached for row in (*rows, *fresh_rows)] == ["filled", "filled"]
    assert fresh_rows[0].target_flops > rows[0].target_flops
    assert relative_difference(kept, fresh) < 1e-5


def test_targets_that_cannot_be_written_are_charged_with_every_batch_even_after_a_kill(tmp_path, monkeypatch):
    phases, said = (Phase("full", 2, ("*",), 1e-3, views=2),), []
    run = run_of("distil", phases=phases, cache=Caching("on", 0, 1 << 28))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "_create", full)
    cache = ActivationCache.open(0, 1 << 28, tmp_path / "cache", "", said.append)
    (fallen_back, (row,)), (plain, (plain_row,)) = (
        train(run, cache=cache),
        train(run_of("distil", phases=phases, cache="off")),
    )
    assert said == [
        f"activations behind {TEACHER.groups[-1]} cannot be cached, and are computed anew whenever they are needed "
        "([Errno 28] No space left on device)"
    ]
    assert relative_difference(plain, fallen_back) < 1e-5
    assert row.target_flops == plain_row.target_flops > 0
    assert row.model_flops == plain_row.model_flops
    check_kills(run, 3, tmp_path, cache=cache)


@pytest.mark.parametrize("views", [0, 2])
def test_student_and_teacher_see_the_same_views_in_every_epoch(views):
    """What is neither corrupted nor trained reconstructs the teacher's output, of the same view alone."""
    objective = Reconstruct(Trunk(CNN), ReconstructSettings(noise=0.0, replaced=0.0))
    phases = (Phase("full", 3, ("*",), 1e-9, views=views),)
    _, (row,) = train(run_of(objective, cache="off", phases=phases))
    assert max(curve([row])) < 1e-6
    assert max(point["val_loss"] for point in row.curve) < 1e-6
    run = run_of("distil", cache="off", phases=phases)
    program, rows = run.programs[0], np.arange(8, dtype=np.int32)
    prefix = targets.target_prefix(program, run.loss.teacher)
    weights = jax.tree.map(jnp.asarray, teacher_weights())
    read = image_batches.reader(
        run, program, None, targets.OnlineTargets.of(prefix, teacher_weights(), DATA.images)
    )
    for epoch in range(3):
        batch, rng = read(epoch, rows), image_batches.rng_context(program, epoch)
        seen = program.augment(batch["image"], rng["seed"], rng["view"], rows)
        found = run.loss.teacher.prefix(*weights, seen, prefix.boundary)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), batch["label"], found
        )


def test_caching_costs_the_published_share_of_the_same_objective_at_full_depth():
    """The ratios of docs/label_free.md, of EfficientNet-Lite0 at 96 pixels with every pass and head included."""
    lite, small = registry.build("efficientnet_lite0"), registry.build("vit_small_dinov2")
    data = dataclasses.replace(tiny.dataset(40, 96), groups=np.arange(40).astype(str))

    def flops(objective, trainable, epochs, views):
        phases = (Phase("partial", epochs, trainable, 1e-4, views=views),)
        model, rows = label_free.pretext(lite, objective, phases), TrainData(data, range(40))
        caching = Caching("auto", 1 << 33, 0)
        run = TrainingRun(model, phases, rows, objective, batch_size=32, augment=VIEWS, caching=caching)
        return run.flops()

    stage6 = ("stage6", "stage7", "top", "head")
    teacher = Trunk(small, reads="pooled", side=112)
    for objective, trainable, epochs, views, most in (
        (Reconstruct(Trunk(lite)), stage6, 20, 4, 0.35),
        (Distil(teacher), ("*",), 100, 4, 0.2),
        (TwoViews(), stage6, 20, 8, 0.45),
    ):
        share = flops(objective, trainable, epochs, views) / flops(objective, ("*",), epochs, 0)
        assert most - 0.05 < share <= most


def test_compilation_ahead_of_time_refuses_objectives_without_labels():
    with pytest.raises(UserError, match="mode=aot compiles supervised adaptation only"):
        abstract_arguments(run_of("reconstruct", "cnn"), 0, make_mesh())
