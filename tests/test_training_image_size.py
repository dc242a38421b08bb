"""Phases that train on images of their own size: decoded at it, priced at it, cached at it, evaluated at the data set's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dapt_jax.data.concatenate import concatenate
from dapt_jax.data.decode import ImageStore, decode
from dapt_jax.data.framing import Framing
from dapt_jax.errors import UserError
from dapt_jax.settings import StudySettings, from_json, to_dict
from dapt_jax.settings.defaults import differences
from dapt_jax.settings.sources import StrategySpec
from dapt_jax.study import plan
from dapt_jax.study.cut_short import cut
from dapt_jax.training import accounting, loop
from dapt_jax.training.phases import Phase
from tests import tiny
from tests.test_label_free_training import VIT
from tests.test_label_free_training import run_of as label_free_run
from tests.test_training_loop import KilledError, Killer, counts, curve, train

ENCODER, DATA = tiny.encoder(), tiny.dataset()
SAVE_ALWAYS = {"every_s": 0.0, "sync_every_s": 0.0}
HEAD = dataclasses.replace(tiny.HEAD, image_size=8)
PARTIAL = dataclasses.replace(tiny.PARTIAL, augment=False, image_size=12)
PHASES = (HEAD, PARTIAL, tiny.FULL)


def run_of(*phases, cache="auto", val=8, data=DATA, encoder=ENCODER):
    return tiny.make_run(phases, encoder=encoder, data=data, cache=cache, val=val)


def at_size(size, data=DATA):
    return dataclasses.replace(data, images=data.images.at_size(size))


def relative_difference(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in each]) for each in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


@pytest.fixture(scope="module")
def trained():
    return train(run_of(*PHASES))


def test_plan_and_ledger_price_each_phase_at_its_size_to_the_integer(trained):
    run = run_of(*PHASES)
    planned, rows = plan.of_run(run), trained[1]
    assert [row.model_flops for row in rows] == [phase.flops for phase in planned]
    assert sum(row.model_flops for row in rows) == run.flops()
    assert [row.cached for row in rows] == ["filled", "filled", "off"]
    said = [f"images of {size} px instead of 16" for size in (8, 12)]
    assert [row.approximations for row in rows] == [each.approximations for each in planned] == [*said, ""]
    for number, size in enumerate((8, 12, 16)):
        phase = dataclasses.replace(PHASES[number], image_size=0)
        (alone,) = plan.of_run(run_of(phase, data=at_size(size)))
        own = dataclasses.replace(planned[number], approximations="", peak_bytes=alone.peak_bytes)
        assert own == alone
        assert planned[number].peak_bytes == pytest.approx(alone.peak_bytes, rel=0.01)  # Adam's counts
        cost = accounting.image_cost(run.programs[number], 16)
        assert cost == accounting.image_cost(run_of(phase, data=at_size(size)).programs[0], size)


def test_a_phase_gives_the_bits_of_a_run_on_images_of_its_size():
    phase = dataclasses.replace(tiny.FULL, image_size=8)
    own, _ = train(run_of(phase, val=0))
    reduced, _ = train(run_of(tiny.FULL, val=0, data=at_size(8)))
    assert all(np.array_equal(a, b) for a, b in zip(own, reduced, strict=True))


def test_cached_and_uncached_agree_and_validation_images_keep_the_size_of_the_data_set(trained):
    plain = run_of(*PHASES, cache="off")
    found, rows = train(plain)
    assert relative_difference(found, trained[0]) < 1e-5
    np.testing.assert_allclose(curve(rows), curve(trained[1]), rtol=1e-4)
    run = run_of(HEAD)
    result = loop.train(run, *run.model.init(1))
    logits = run.model(result.params, result.batch_stats, jnp.asarray(DATA.images.batch(run.val_rows)))
    expected = run.loss(logits, jnp.asarray(DATA.targets[run.val_rows]))
    assert result.curve[-1]["val_loss"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_files_are_decoded_at_the_size_and_nothing_is_enlarged_from_smaller_images(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, top in zip(paths, (300, 4095, 900), strict=True):
        Image.fromarray(rng.integers(0, top, (40, 50)).astype(np.uint16)).save(path)
    store = ImageStore.from_files(paths, 16).take([2, 0])
    for size in (8, 32):
        sized = store.at_size(size)
        ranges = ImageStore.from_files(paths, 16)._pixels.ranges()  # of the set, as at any size
        expected = [decode(paths[row], size, ranges=ranges) for row in (2, 0)]
        np.testing.assert_array_equal(sized.batch([0, 1]), expected)
        assert (sized.size, sized.names) == (size, store.names)
        assert store.at_size(size)._pixels is sized._pixels  # decoded once for all runs
        assert sized.digest() != store.digest()
    whole = ImageStore.from_files(paths, 16, cache_bytes=0)
    assert whole.at_size(8)._pixels.cache is None  # within the same budget


def test_images_of_an_array_are_reduced_and_never_enlarged():
    expected = Framing(8).images(DATA.images.batch(range(40)))
    np.testing.assert_array_equal(DATA.images.at_size(8).batch(range(40)), expected)
    both = concatenate([DATA, dataclasses.replace(tiny.dataset(seed=1), name="other")])
    joined = both.images.at_size(8)
    np.testing.assert_array_equal(joined.batch(range(40)), expected)
    assert (len(joined), joined.size) == (80, 8)


@pytest.mark.long
def test_a_run_killed_about_the_switch_of_sizes_ends_with_the_same_bits_and_counts(tmp_path, trained):
    folder, run = tmp_path / "killed", run_of(*PHASES)
    with pytest.raises(KilledError):
        train(run, folder, **SAVE_ALWAYS, heartbeat=Killer(17))
    resumed, rows = train(run, folder, **SAVE_ALWAYS)
    assert all(np.array_equal(a, b) for a, b in zip(trained[0], resumed, strict=True))
    assert counts(rows) == counts(trained[1])


def test_a_transformer_resamples_its_positions():
    phases = (Phase("small", 1, ("*",), 1e-3, image_size=8), Phase("large", 1, ("*",), 1e-3))
    run = run_of(*phases, encoder=VIT)
    assert accounting.boundary_shape(run.model, 1, 8).shape == (1 + 4, 16)
    small, large = (accounting.image_cost(program, 16) for program in run.programs)
    assert small == accounting.image_cost(run.programs[1], 8)
    assert small.suffix.model < large.suffix.model / 2
    params, batch_stats = run.model.init(0)
    features = run.model.features(params, batch_stats, jnp.asarray(run.images_of(run.programs[0]).batch([0])))
    assert np.isfinite(features).all()


@pytest.mark.long
def test_an_objective_without_labels_follows_the_size():
    views = Phase("views", 1, ("block2", "top", "head"), 1e-3, views=2, image_size=8)
    masked = label_free_run("mae", "vit", phases=(views,))
    found = loop.train(masked, *masked.model.init(1))
    assert [row.model_flops for row in found.costs] == [phase.flops for phase in plan.of_run(masked)]
    assert masked.prefixes_to_compute(0)[0][0].shapes(16)["tokens"].shape == (1 + 1, 16)


def test_a_budget_of_flops_counts_each_phase_at_its_size():
    long = [dataclasses.replace(phase, epochs=6) for phase in PHASES]
    run = run_of(*long)
    short = cut(run, run.flops() // 2)
    assert run.flops() // 4 < short.flops() <= run.flops() // 2
    assert [phase.image_size for phase in short.phases] == [8, 12, 0]


def test_a_size_named_twice_is_the_size_of_the_data_set():
    named = run_of(dataclasses.replace(tiny.FULL, image_size=16))
    assert named.phases == run_of(tiny.FULL).phases


MASKED = dataclasses.replace(DATA, masks=np.zeros((40, 16, 16), np.uint8), segments=("none", "some"))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: Phase("a", 1, ("*",), 1e-3, image_size=7),
            "phase 'a': image_size is 7; expected 8 or more, or 0 for the size of the data set",
        ),
        (
            lambda: run_of(Phase("a", 1, ("*",), 1e-3, image_size=10), encoder=VIT),
            "phase 'a': image_size is 10: images of 10 x 10 pixels: vision transformers take squares whose "
            "side is a multiple of their patch's 4, such as 8 x 8",
        ),
        (
            lambda: run_of(Phase("a", 1, ("*",), 1e-3, image_size=24)),
            "phase 'a': image_size is 24: images in one array of 16 px are not enlarged; expected at most 16",
        ),
        (
            lambda: run_of(Phase("a", 1, ("*",), 1e-3, image_size=8), data=MASKED),
            "phase 'a': image_size is 8: tiny has masks, whose size is that of the data set; expected 0",
        ),
    ],
)
def test_a_size_that_cannot_be_is_refused_in_one_line(make, line):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == line


def test_a_workdir_of_before_the_setting_still_holds_the_same_study():
    phases = {"phases": ({"name": "a", "epochs": 1, "trainable": ("*",), "lr": 1e-3},)}
    spec = StrategySpec.from_config(phases, "custom_strategies.own")
    settings = StudySettings(custom_strategies={"own": spec}, strategies=("own",))
    values = to_dict(settings)
    assert "image_size" not in values["custom_strategies"]["own"]["phases"][0]  # as it was written before
    assert not list(differences(settings, from_json(values)))
    with_size = {"phases": ({**phases["phases"][0], "image_size": 64},)}
    other = StrategySpec.from_config(with_size, "custom_strategies.own")
    changed = dataclasses.replace(settings, custom_strategies={"own": other})
    assert [name for name, *_ in differences(settings, changed)] == ["custom_strategies.own.phases"]
    assert from_json(to_dict(changed)).custom_strategies["own"].phases[0].image_size == 64
