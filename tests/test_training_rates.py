"""Discriminative learning rates: a leaf with a factor moves that many times as far, and nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from dapt_jax.errors import UserError
from dapt_jax.settings import StudySettings
from dapt_jax.settings.training import SegmentationSettings, TransferSettings
from dapt_jax.study import segmentation
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Task
from dapt_jax.training import accounting
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.weights.paths import flatten
from tests import tiny

RATES = (("stage*", 0.5), ("stage3", 4.0), ("head/bias", 0.25))
ENCODER = tiny.encoder()
FACTORS = {"stage2/block1": 0.5, "stage3/block1": 4.0, "head/bias": 0.25}


def program_of(rates, **others):
    phase = Phase("last", 1, ("stage2", "stage3", "head"), 1e-2, lr_multipliers=rates)
    return tiny.make_run([phase], encoder=ENCODER, data=tiny.dataset(), **others).programs[0]


def factor_of(path):
    return next((factor for start, factor in FACTORS.items() if path.startswith(start)), 1.0)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_step_moves_a_leaf_its_factor_times_as_far(name):
    optimizer = Optimizer(name, weight_decay=0.1)
    data = tiny.dataset()
    batch = {
        "image": data.images.batch(np.arange(8)),
        "label": data.labels[:8].astype(np.int32),
        "weight": np.ones(8, np.float32),
        "index": np.arange(8, dtype=np.int32),
    }
    draw, moved = {"seed": np.uint32(0), "view": np.int32(0)}, {}
    for rates in ((), RATES):
        program = program_of(rates, optimizer=optimizer)
        state = program.init_state(*program.model.init(0))
        after = jax.jit(program.train_step)(state, batch, draw, np.float32(0.1))
        before = flatten(state["params"])
        moved[rates] = {path: leaf - before[path] for path, leaf in flatten(after["params"]).items()}
    for path, distance in moved[RATES].items():
        np.testing.assert_allclose(
            distance, factor_of(path) * moved[()][path], rtol=1e-4, atol=1e-7, err_msg=path
        )
        assert np.any(distance) == (path in program.mask.trainable), path


def test_the_later_of_two_patterns_holds_and_frozen_leaves_have_no_factor():
    mask = program_of(RATES).mask
    assert dict(mask.lr_multipliers) == {
        path: factor_of(path) for path in mask.trainable if factor_of(path) != 1
    }
    assert {factor for _, factor in mask.lr_multipliers} == set(FACTORS.values())


def test_factors_change_neither_the_layout_of_a_checkpoint_nor_the_cost_and_a_factor_of_one_nothing():
    plain, rated, idle = (
        program_of(rates, optimizer=Optimizer(ema=0.9)) for rates in ((), RATES, (("head", 1.0),))
    )
    assert idle.key == plain.key != rated.key
    params, batch_stats = plain.model.init(0)
    layouts = [jax.eval_shape(program.init_state, params, batch_stats) for program in (plain, rated)]
    assert layouts[0] == layouts[1]
    assert accounting.image_cost(plain, 16) == accounting.image_cost(rated, 16)


@pytest.mark.parametrize(
    ("pattern", "factor", "words"),
    [
        (
            "stage4",
            0.1,
            "phase 'last': lr_multipliers pattern 'stage4' matches no parameter that trains; did you mean 'stage",
        ),
        (
            "stage1",
            0.1,
            "lr_multipliers pattern 'stage1' matches no parameter that trains; did you mean 'stage",
        ),
        ("head", 0.0, "the lr multiplier of 'head' is 0.0; expected a positive number"),
        ("head", float("nan"), "the lr multiplier of 'head' is nan; expected a positive number"),
    ],
)
def test_a_rate_of_nothing_or_of_no_size_is_refused(pattern, factor, words):
    with pytest.raises(UserError, match=words):
        program_of(((pattern, factor),))


def test_batch_norm_of_a_frozen_encoder_may_run_on_batches_without_training():
    settings = SegmentationSettings(frozen_batch_norm="stats", decoder_epochs=0)
    masks = np.random.default_rng(0).integers(0, 2, (40, 16, 16)).astype(np.uint8)
    task = Task(
        "cells", dataclasses.replace(tiny.dataset(), masks=masks).segmented(("background", "cell")), {}
    )
    study = Study(StudySettings(transfer=TransferSettings(segmentation=settings)))
    arm = Arm(Strategy("full", ENCODER, (), "random"), 0)
    (program,) = segmentation.fold_run(study, arm, task, ENCODER, "frozen/fold0", np.arange(30)).programs
    assert program.mask.boundary == 0
    assert {program.mask.batch_norm_modes[group] for group in program.model.encoder.groups} == {"stats"}
    assert not any(path.startswith(tuple(ENCODER.groups)) for path in program.mask.trainable)


def test_a_new_decoder_keeps_its_rate_while_the_encoder_is_fine_tuned():
    settings = SegmentationSettings()
    masks = np.random.default_rng(0).integers(0, 2, (40, 16, 16)).astype(np.uint8)
    task = Task(
        "cells", dataclasses.replace(tiny.dataset(), masks=masks).segmented(("background", "cell")), {}
    )
    arm = Arm(Strategy("full", ENCODER, (), "random"), 0)

    def programs(lr):
        own = StudySettings(transfer=TransferSettings(segmentation=dataclasses.replace(settings, lr=lr)))
        return segmentation.fold_run(Study(own), arm, task, ENCODER, "finetune/fold0", np.arange(30)).programs

    alone, whole = programs(settings.lr)
    assert alone.mask.lr_multipliers == ()
    factors = dict(whole.mask.lr_multipliers)
    assert set(factors) == {
        path for path in whole.mask.trainable if not path.startswith(tuple(ENCODER.groups))
    }
    for program, step in ((alone, 0), (whole, whole.first_step)):
        rate = program.lr(step) * dict(program.mask.lr_multipliers).get(next(iter(factors)), 1.0)
        assert rate == pytest.approx(settings.decoder_lr)
    assert whole.lr(whole.first_step) == settings.lr
    assert programs(settings.decoder_lr)[1].mask.lr_multipliers == ()
