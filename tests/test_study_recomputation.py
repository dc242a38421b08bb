"""`model.remat=fit`: as many of the lowest layer groups are recomputed as a batch needs to fit in memory."""

import dataclasses
import json

import pytest

from dapt_jax.cost import hardware
from dapt_jax.errors import UserError
from dapt_jax.settings import resolve
from dapt_jax.study import budgets, plan, prepare
from dapt_jax.study.recomputation import _recomputing, with_fitting_activations
from tests.configs import tiny_study


@pytest.fixture(scope="module")
def study():
    config = tiny_study.get_config()
    config.strategies = ("full", "truncated", "switching")
    config.adapt.batch_size = 64  # so that activations outweigh the state
    ready = prepare.prepare(resolve(config))
    return with_remat(ready, "fit")


def with_remat(ready, *groups):
    model = dataclasses.replace(ready.settings.model, remat=groups)
    return dataclasses.replace(ready, settings=dataclasses.replace(ready.settings, model=model))


def peak(ready):
    runs = [run for arm in ready.arms_of(0) for run in ready.runs_of(arm)]
    return max(phase.peak_bytes for run in runs for phase in plan.of_run(run))


def chosen(study, monkeypatch, room):
    monkeypatch.setattr(hardware, "device_bytes", lambda: room)
    return with_fitting_activations(study)


def test_nothing_is_recomputed_where_a_batch_fits(study, monkeypatch):
    fitting, line = chosen(study, monkeypatch, peak(study))
    assert fitting.settings.model.remat == ()
    assert line.endswith("no activations are computed again")


def test_the_fewest_of_the_lowest_groups_that_make_a_batch_fit_are_recomputed(study, monkeypatch):
    plain = peak(study)
    everything, line = chosen(study, monkeypatch, 1)
    groups = everything.arms[0].strategy.encoder.groups
    assert everything.settings.model.remat == groups
    assert "which is NOT enough: mode=plan says which batch_size to lower" in line
    room = (plain + peak(everything)) // 2
    fitting, line = chosen(study, monkeypatch, room)
    found = fitting.settings.model.remat
    assert 0 < len(found) < len(groups)
    assert found == groups[: len(found)]
    assert f"the activations of {found[0]} to {found[-1]} are computed again" in line
    assert peak(fitting) <= room
    assert peak(_recomputing(study, found[:-1])) > room
    one_less, _ = chosen(study, monkeypatch, peak(fitting) + 1)
    assert len(one_less.settings.model.remat) == len(found)
    cut = fitting.arms[1].strategy.encoder
    assert cut.remat == set(found) & set(cut.groups)
    assert fitting.arms[1].strategy.encoder is not fitting.arms[0].strategy.encoder


def test_strategies_of_one_encoder_still_share_it_and_flops_of_training_stay(study, monkeypatch):
    everything, _ = chosen(study, monkeypatch, 1)
    shared = [arm.strategy.encoder for arm in study.arms_of(0)]
    again = [arm.strategy.encoder for arm in everything.arms_of(0)]
    assert [a is b for a in shared for b in shared] == [a is b for a in again for b in again]
    for arm, other in zip(study.arms_of(0), everything.arms_of(0), strict=True):
        assert plan.arm_flops(study, arm) == plan.arm_flops(everything, other)


def test_a_resumed_study_recomputes_what_it_did_before(study, monkeypatch, tmp_path):
    settings = study.settings
    assert budgets.resolved(settings, tmp_path).model.remat == ("fit",)
    (tmp_path / "results.jsonl").touch()
    for recorded in ("stem", "stage1/block1"), ():
        (tmp_path / "config.json").write_text(json.dumps({"model": {"remat": recorded}}))
        assert budgets.resolved(settings, tmp_path).model.remat == recorded


@pytest.mark.parametrize(("remat", "mode"), [(("fit", "stem"), "run"), (("fit",), "aot")])
def test_fit_stands_alone_and_for_devices_that_are_there(remat, mode, study):
    ready = with_remat(study, *remat)
    ready = dataclasses.replace(ready, settings=dataclasses.replace(ready.settings, mode=mode))
    with pytest.raises(UserError, match=r"^model\.remat is fit.*; expected fit alone"):
        with_fitting_activations(ready)
