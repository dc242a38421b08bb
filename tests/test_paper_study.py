"""What a study of a paper's own size needs: plans without data, budgets of the machine, short trials, fresh optimizers."""

import contextlib
import dataclasses
import json
import runpy

import jax
import numpy as np
import pytest

from dapt_jax import metrics
from dapt_jax.cost import energy, hardware, memory
from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings import default, from_json, resolve, to_dict
from dapt_jax.study import budgets, head_curves, plan, prepare, strategies
from dapt_jax.study.arms import Study
from dapt_jax.study.classification import HeadRun
from dapt_jax.study.predictions import classes_outside
from dapt_jax.study.strategies import scaled
from dapt_jax.study.tasks import ArmKey, Task
from dapt_jax.training.cache.policy import Caching, choose_cache
from dapt_jax.training.optim import Optimizer
from dapt_jax.training.phases import Phase
from dapt_jax.weights import locate
from tests import tiny
from tests.command import ROOT

MEHMOOD = runpy.run_path(str(ROOT / "configs" / "mehmood2022.py"))


def planned(**stated):
    config = MEHMOOD["get_config"]("l1sb")
    config.mode = "plan"
    config.data_dir = "/nowhere"
    config.plan.images = ",".join(f"{name.replace('__', '.')}={count}" for name, count in stated.items())
    return config


# --- plans of what is not here


def test_a_plan_needs_neither_data_nor_weights_and_counts_as_the_paper(capsys):
    config = planned(corpus=240, tumour__development=60, tumour__external=30)
    study = prepare.prepare(resolve(config))
    out = capsys.readouterr().out
    assert "weights: keras:resnet50, not here and not read: nothing is trained" in out
    assert "240 images by plan.images" in out
    head, partial = plan.of_run(study.run_of(study.arms[0]))
    assert (head.trainable, partial.trainable) == (2_049, 4_461_569)
    assert partial.total + partial.statistics == 23_589_761
    assert partial.images == 150 * 240
    config = planned(corpus="240/7", tumour__development=60, tumour__external=30)
    config.corpus.update({"kind": "folder", "path": "any"})
    config.adapt.single_logit = False
    assert prepare.prepare(resolve(config)).corpora[""].classes == tuple("0123456")
    config.corpus.classes = ("benign", "malignant")
    with pytest.raises(
        UserError, match=r"states 7 classes of corpus, which has 2; expected corpus=NUMBER alone"
    ):
        prepare.prepare(resolve(config))
    config.corpus.classes = ()
    sizes = {split: data.images.size for split, data in study.tasks[0].datasets.items()}
    assert sizes == {"development": 256, "external": 240}


def test_programs_are_compiled_ahead_of_time_for_sets_of_stated_size(capsys):
    config = planned(corpus=240, tumour__development=60, tumour__external=30)
    config.mode = "aot"
    study = prepare.prepare(resolve(config))
    out = capsys.readouterr().out
    assert "240 images by plan.images" in out
    assert "weights: keras:resnet50, not here and not read: nothing is trained" in out
    assert len(study.run_of(study.arms[0]).dataset) == 240


def test_a_set_of_unknown_size_is_an_error_that_says_how_to_state_it():
    with pytest.raises(UserError, match=r"no folder /nowhere.* state its size: plan.images='corpus=NUMBER'"):
        prepare.prepare(resolve(planned(tumour__development=60)))
    config = planned(corpus=240)
    config.mode = "run"
    config.weights = "random"
    with pytest.raises(UserError, match=r"no folder /nowhere") as caught:
        prepare.prepare(resolve(config))
    assert "plan.images" not in str(caught.value)


def test_a_size_that_a_set_which_is_here_does_not_have_is_refused():
    config = default()
    config.mode, config.weights, config.model.image_size = "plan", "random", 32
    config.strategies, config.transfer.protocols, config.transfer.folds = ("full",), ("linear",), 2
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 48})
    config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 40}}
    config.plan.images = "corpus=24422"
    with pytest.raises(
        UserError, match=r"states 24,422 images of corpus, and the set is here with 48; expected"
    ):
        prepare.prepare(resolve(config))
    config.plan.images = "corpus=48,cells.development=40"
    assert len(prepare.prepare(resolve(config)).corpora[""]) == 48


def test_a_mistyped_kind_is_refused_instead_of_the_size_of_all_kinds():
    config = planned(corpus=240, corpus__brats2=24422, tumour__development=60, tumour__external=30)
    with pytest.raises(
        UserError, match=r"plan.images names corpus.brats2; no kind 'brats2'; did you mean 'brats'"
    ):
        prepare.prepare(resolve(config))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("corpse", "names corpse, which is no set; did you mean 'corpus'"),
        ("cells.devlopment", "names cells.devlopment, which is no set; did you mean 'cells.development'"),
        ("corpus.phantom", "names corpus.phantom; no kind 'phantom'; did you mean 'phantoms'"),
        ("cell.development", "and this study has no such set; did you mean 'cells.development'"),
    ],
)
def test_a_stated_size_of_no_set_is_refused_or_told_of_though_every_set_is_here(name, line, capsys):
    """That of a set of another study is told of: a grid has one statement for all of its studies."""
    config = default()
    config.mode, config.weights, config.model.image_size = "plan", "random", 32
    config.strategies, config.transfer.protocols, config.transfer.folds = ("full",), ("linear",), 2
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 48})
    config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 40}}
    config.plan.images = f"{name}=30,corpus.phantoms=48,cells.development=40"
    with contextlib.nullcontext() if "no such set" in line else pytest.raises(UserError, match=line):
        prepare.prepare(resolve(config))
        assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["corpus", "corpus=many", "corpus=1", "corpus=5;x=6", "corpus=5/1", "corpus=5/"]
)
def test_stated_sizes_that_cannot_be_read_are_one_line(wrong):
    config = default()
    config.plan.images = wrong
    with pytest.raises(UserError, match=r"plan.images holds '.*'; expected SET=NUMBER, such as corpus=24422"):
        resolve(config)


def test_the_ten_rows_and_both_sources_and_targets_resolve():
    assert len(MEHMOOD["ARMS"]) == 10
    encoder = registry.build("resnet50_keras")
    settings = resolve(MEHMOOD["get_config"]("full,native,tumour+disease"))
    found = {name: strategies.resolve(name, encoder, settings) for name in MEHMOOD["ARMS"]}
    assert [name for name, one in found.items() if not one.phases] == [
        "imagenet",
        "imagenet_f1b",
        "imagenet_f2b",
    ]
    assert found["imagenet_f1b"].encoder.groups == found["f1b"].encoder.groups
    assert [settings.corpus.source["kind"], *sorted(settings.tasks)] == ["brats", "disease", "tumour"]
    assert resolve(MEHMOOD["get_config"]("f1b,manifest")).corpus.source["kind"] == "manifest"
    for wrong in ("full,nativ", "full,native,tumor", "full,native,tumour,x"):
        with pytest.raises(UserError, match=r"configs/mehmood2022.py"):
            MEHMOOD["get_config"](wrong)


def test_the_error_of_weights_without_a_package_names_what_works():
    with pytest.raises(
        UserError, match=r"--config.weights=keras:resnet50 .*PATH, a Keras \.h5 file of that model"
    ):
        locate.load("imagenet", Classifier(registry.build("resnet50_keras"), 1), seed=0)
    assert not locate.is_here("imagenet", "resnet50_keras")
    assert locate.is_here("random", "resnet50_keras")
    assert not locate.is_here("keras:resnet50", "resnet50_keras")
    assert locate.is_here("/nowhere/weights.h5", "resnet50_keras")  # a path is meant to be there


# --- budgets


def test_budgets_follow_the_machine_once_and_hold_for_a_resumed_study(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: 16 << 30)
    monkeypatch.setattr(budgets, "_free_disk", lambda _: 100 << 30)
    settings = resolve(default())
    assert settings.cache.memory_mb == settings.cache.disk_mb == settings.data.cache_mb == -1
    first = budgets.resolved(settings, tmp_path)
    devices = len(jax.local_devices())
    assert (first.cache.memory_mb * devices, first.cache.disk_mb, first.data.cache_mb) == (4096, 51_200, 4096)
    assert budgets.resolved(first, tmp_path) is first
    (tmp_path / "config.json").write_text(json.dumps(to_dict(first)))
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: 2 << 30)
    monkeypatch.setattr(budgets, "_free_disk", lambda _: 1 << 30)
    assert budgets.resolved(settings, tmp_path) == first
    assert from_json(to_dict(first)).cache == first.cache
    own = dataclasses.replace(settings, cache=dataclasses.replace(settings.cache, memory_mb=7))
    assert budgets.resolved(own).cache.memory_mb == 7


def program_and_size(epochs=10):
    phases = [Phase("head", 2, ("head",), 1e-3), Phase("partial", epochs, ("stage3", "head"), 1e-3)]
    run = tiny.make_run(phases, encoder=tiny.encoder(), data=tiny.dataset())
    program = run.programs[1]
    exact = choose_cache(program, 40, 16, Caching("on"))
    return program, exact.bytes


def test_what_does_not_fit_says_what_it_takes_and_saves():
    program, size = program_and_size()
    decision = choose_cache(program, 40, 16, Caching("auto", size - 1, size - 1))
    assert not decision.cached
    assert "exceed the budgets of" in decision.reason
    assert "cache.disk_mb=1, or half of it with cache.dtype=bfloat16, saves" in decision.reason
    assert decision.reason.endswith("% of the phase")
    assert "bfloat16," not in choose_cache(program, 40, 16, Caching("auto", 8, 8, "bfloat16")).reason


def test_bfloat16_is_taken_where_only_that_fits_and_stated(monkeypatch):
    _, size = program_and_size()
    run = tiny.make_run(
        [Phase("partial", 10, ("stage3", "head"), 1e-3)], encoder=tiny.encoder(), data=tiny.dataset()
    )
    settings = resolve(default())

    def study(budget):
        caching = Caching("auto", budget, 0)
        monkeypatch.setattr(type(settings.cache), "policy", lambda self: caching)
        cache = dataclasses.replace(settings.cache, dtype="fit")
        made = Study(dataclasses.replace(settings, cache=cache, seeds=(0,)), (strategy,))
        monkeypatch.setattr(Study, "runs_of", lambda self, arm: (run,))
        return made

    strategy = strategies.Strategy("one", tiny.encoder(), run.phases, "random")
    fitting, line = budgets.with_fitting_dtype(study(size))
    assert (fitting.settings.cache.dtype, line) == ("", "")
    half, line = budgets.with_fitting_dtype(study(size // 2))
    assert half.settings.cache.dtype == "bfloat16"
    assert line.startswith(
        "cached activations are bfloat16, off by at most 0.39% each, since only so do they fit"
    )
    assert budgets.with_fitting_dtype(study(size // 4))[0].settings.cache.dtype == ""
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert np.abs(np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32) / x - 1).max() <= 2**-8


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("model name\t: some Xeon\nflags\t\t: fpu avx2 avx512f\n", "float32"),
        ("model name\t: some Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "bfloat16"),
        ("flags\t\t: fpu amx_tile amx_bf16\n", "bfloat16"),
        ("Features\t: fp asimd bf16\n", "bfloat16"),
        ("Features\t: fp asimd\n", "float32"),
        ("processor\t: 0\n", "bfloat16"),  # nothing is known
    ],
)
def test_a_cpu_without_bfloat16_arithmetic_computes_in_float32_and_says_so(
    cpuinfo, dtype, tmp_path, monkeypatch, capsys
):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "cpuinfo")
    single = resolve(default())
    half = dataclasses.replace(single, model=dataclasses.replace(single.model, dtype="bfloat16"))
    assert budgets.for_this_device(half) == (single if dtype == "float32" else half)
    assert capsys.readouterr().out.count("float32 in the place of bfloat16") == (dtype == "float32")
    assert budgets.for_this_device(single) is single
    again = dataclasses.replace(single, model=dataclasses.replace(single.model, remat=("*",)))
    for saves in (True, False):
        monkeypatch.setattr(memory, "saves_recomputed", lambda saves=saves: saves)
        assert budgets.for_this_device(again) == (again if saves else single)
        assert ("saves no memory on a CPU" in capsys.readouterr().out) is not saves
    unknown = dataclasses.replace(single, model=dataclasses.replace(single.model, remat=("stage1/blok1",)))
    with pytest.raises(UserError, match="stage1/block1"):
        budgets.for_this_device(unknown)
    of_tpu = dataclasses.replace(again, mode="aot")
    assert budgets.for_this_device(of_tpu) is of_tpu


# --- phases and optimizers


def test_phases_are_shortened_alike_and_never_to_nothing():
    phases = (Phase("head", 1000, ("head",), 1e-4), Phase("all", 20, ("*",), 1e-5, warmup=5.0))
    assert scaled(phases, 1.0) is phases
    short = scaled(phases, 0.02)
    assert [(each.epochs, each.warmup) for each in short] == [(20, 0.0), (1, 0.1)]
    assert [dataclasses.replace(a, epochs=1, warmup=0.0) for a in short] == [
        dataclasses.replace(a, epochs=1, warmup=0.0) for a in phases
    ]
    config = default()
    config.phases_scale = 0.5
    settings = resolve(config)
    whole = strategies.resolve("hybrid", registry.build("resnet18"), resolve(default()))
    half = strategies.resolve("hybrid", registry.build("resnet18"), settings)
    assert [each.epochs for each in half.phases] == [each.epochs // 2 for each in whole.phases]


@pytest.mark.parametrize("carry_state", [True, False])
def test_an_optimizer_goes_on_or_starts_afresh_at_a_switch(carry_state):
    run = tiny.make_run(
        [tiny.HEAD, tiny.FULL],
        encoder=tiny.encoder(),
        data=tiny.dataset(),
        optimizer=Optimizer(carry_state=carry_state),
    )
    head, full = run.programs
    state = head.init_state(*head.model.init(0))
    state["opt_state"] = jax.tree.map(lambda leaf: np.full_like(leaf, 7), state["opt_state"])
    after = [float(np.max(leaf)) for leaf in jax.tree.leaves(full.transition_from(state)["opt_state"])]
    assert (7.0 in after) == carry_state


def test_a_machine_of_250_watts_and_35_gb_can_be_charged():
    charged = hardware.describe(watts=250.0 / len(jax.devices()), memory_gb=35.0)
    hour = energy.EnergyMeter(charged, counter=None)(3600)
    assert hour == pytest.approx(0.4393, rel=1e-3)
    assert hardware.describe().memory_gb != 35.0


# --- the paper's mean over the epochs of a head


def test_the_auc_after_every_epoch_is_that_of_a_head_trained_so_long(tmp_path):
    rng = np.random.default_rng(0)
    development, external = tiny.dataset(40), tiny.dataset(30, seed=1)
    task = Task("t", development, {"external": external})
    features = {
        split: np.eye(3, dtype=np.float32)[data.labels] + rng.normal(size=(len(data), 3)).astype(np.float32)
        for split, data in task.datasets.items()
    }
    config = default()
    config.transfer.folds = 2
    config.transfer.head.update({"epochs": 3, "batch_size": 8, "lr": 0.01, "score_every_epoch": True})
    key = ArmKey("full", 0, "random", "tiny")
    run = HeadRun(resolve(config), task, key, "mlp_small")
    found = {(row["split"], row["metric"]): row["value"] for row in run.measure(features, None)}
    by_length = {"development": [], "external": []}
    for epochs in (1, 2, 3):
        config.transfer.head.update({"epochs": epochs, "score_every_epoch": False})
        alone = HeadRun(resolve(config), task, key, "mlp_small").measure(features, None)
        assert not [row for row in alone if row["metric"].startswith("auc_epochs")]
        for row in alone:
            if row["metric"] == "auc":
                by_length[row["split"]].append(row["value"])
    for split, values in by_length.items():
        assert found[split, "auc"] == pytest.approx(values[-1], abs=0.02)
        assert found[split, "auc_epochs"] == pytest.approx(np.mean(values), abs=0.02)
        assert found[split, "auc_epochs_sd"] == pytest.approx(np.std(values), abs=0.02)
    head_curves.write(tmp_path, key, task, "mlp_small", {"development": np.array([0.5, 0.75])})
    text = (tmp_path / "head_curves" / "full-seed0" / "t-mlp_small.csv").read_text()
    assert text == "epoch,development\n1,0.500000\n2,0.750000\n"


def test_a_class_that_a_head_never_saw_does_not_count_in_its_curve():
    data = tiny.dataset(12)
    data = dataclasses.replace(data, labels=np.array([0, 1] * 4 + [2] * 4))
    task = Task("t", data, {})
    folds = [(np.arange(8), np.arange(4, 12)), (np.arange(4, 12), np.arange(4))]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 1, 12))
    found = head_curves.curves(task, folds, {"development": probabilities})[task.scored]
    expected = []
    for (_, rows), (of_fold,) in zip(folds, probabilities, strict=True):
        seen = classes_outside(data, rows)
        scores = metrics.classification(data.labels[rows], of_fold[rows], data.classes, seen=seen)
        expected.append(next(score.value for score in scores if score.metric == "auc"))
    assert found == pytest.approx([np.mean(expected)])
