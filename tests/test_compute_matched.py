"""An arm with a compute budget: the longest run of its kind within a share of full DAPT's FLOPs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_jax.errors import UserError
from dapt_jax.settings import resolve
from dapt_jax.study import prepare
from dapt_jax.study.cut_short import cut
from dapt_jax.training.phases import Phase
from tests import tiny
from tests.configs import tiny_study

HEAD = Phase("head", 4, ("head",), 1e-2, augment=False)
TOP = Phase("top", 6, ("stage3", "head"), 1e-2, views=2)
ALL = Phase("all", 8, ("*",), 1e-2, warmup=2.0)
DATA = tiny.dataset()
ENCODER = tiny.encoder()


def a_run(*phases):
    return tiny.make_run(phases, encoder=ENCODER, data=DATA, cache="auto")


@settings(max_examples=12, deadline=None)
@given(
    share=st.floats(0.1, 1.2),
    phases=st.sampled_from([(ALL,), (HEAD, ALL), (HEAD, TOP), (HEAD, TOP, ALL)]),
)
def test_a_cut_run_is_the_longest_that_fits(share, phases):
    run = a_run(*phases)
    budget = int(share * run.flops())
    short = cut(run, budget)
    assert short.flops() <= budget
    assert [each.name for each in short.phases] == [each.name for each in phases]
    if share >= 1:
        assert short is run
    elif len(short.train_rows) == len(run.train_rows):
        longer = [round(each.epochs * (short.timeline.epochs + 2) / run.timeline.epochs) for each in phases]
        one_more = [dataclasses.replace(p, epochs=e) for p, e in zip(phases, longer, strict=True)]
        assert a_run(*one_more).flops() > budget
    else:
        assert {each.epochs for each in short.phases} == {1}
        rows = len(short.train_rows) + 1
        assert short.flops() * rows / len(short.train_rows) > budget


def test_images_that_do_not_fit_are_left_out_at_random_by_the_seed():
    run = a_run(ALL)
    budget = int(run.flops() / 20)
    cuts = [cut(dataclasses.replace(run, seed=seed), budget).dataset for seed in (0, 0, 1)]
    chosen = [np.stack([each.images[row] for row in range(2)]) for each in cuts]
    assert (chosen[0] == chosen[1]).all()
    assert not (chosen[0] == chosen[2]).all()
    patients = set(cut(run, budget).dataset.groups)
    assert patients <= set(DATA.groups[run.train_rows])


def test_a_budget_without_two_images_is_refused_with_the_least():
    with pytest.raises(UserError, match=r"^there: .* do not suffice for an epoch of 2 images; expected"):
        cut(a_run(ALL), 10, "there")


def test_a_run_without_images_to_validate_on_is_refused_where_their_loss_is_watched():
    run = a_run(dataclasses.replace(ALL, schedule="plateau"))
    with pytest.raises(
        UserError, match=r"of 32 images and none to validate on, whose loss phase 'all' watches.*expected"
    ):
        cut(run, int(run.flops() / 20))
    assert len(cut(run, int(run.flops() / 2)).val_rows)
    config = configured(tiny={"like": "full", "compute_budget": 0.1})
    config.adapt.early_stopping_patience = 2
    with pytest.raises(
        UserError, match=r"tiny seed 0: early_stopping_patience=2 watches the validation loss, but"
    ):
        prepare.prepare(resolve(config))
    config.custom_strategies.tiny = {"like": "full", "compute_budget": 0.6}
    prepare.prepare(resolve(config))


def configured(**specs):
    config = tiny_study.get_config()
    config.strategies = ("full", *specs)
    config.custom_strategies.update(specs)
    config.adapt.update({"head_epochs": 2, "epochs": 4})
    return config


def test_an_arm_takes_the_share_of_full_that_its_budget_names():
    config = configured(
        tenth={"like": "full", "compute_budget": 0.1}, half={"like": "partial", "compute_budget": 0.5}
    )
    study = prepare.prepare(resolve(config))
    full, *others = (study.run_of(arm).flops() for arm in study.arms)
    shares = [flops / full for flops in others]
    assert 0.05 < shares[0] <= 0.1
    assert 0.25 < shares[1] <= 0.5


def test_a_budget_holds_where_the_shorter_run_caches_less_than_the_whole():
    top = {"name": "reconstruct", "epochs": 12, "trainable": ("stage3",), "lr": 1e-3, "views": 4}
    arm = {"objective": "reconstruct", "phases": (top,)}
    shares = {"fifth": 0.2, "third": 0.3}
    study = prepare.prepare(
        resolve(configured(**{name: {**arm, "compute_budget": share} for name, share in shares.items()}))
    )
    full, *others = (study.run_of(arm).flops() for arm in study.arms)
    for flops, share in zip(others, shares.values(), strict=True):
        assert 0.5 * share < flops / full <= share


@pytest.mark.parametrize("value", ["much", -0.1, True, float("nan")])
def test_a_budget_that_is_no_share_is_refused(value):
    with pytest.raises(UserError, match=r"custom_strategies\.tenth\.compute_budget is .*; expected a share"):
        resolve(configured(tenth={"like": "full", "compute_budget": value}))
