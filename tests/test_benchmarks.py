"""Every benchmark runs at its smallest size and says what it should; times are not judged here, FLOPs are."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy

from benchmarks import (
    accelerator,
    allocator,
    common,
    feature_cache,
    few_parameters,
    heads,
    input_pipeline,
    label_free,
    label_free_study,
    our_step,
    paper_protocol,
    papers_size,
    scaling,
    startup,
    train_step,
)
from benchmarks import ops as ops_benchmark
from dapt_jax.ops import choice as ops_choice
from dapt_jax.records.predictions import Predictions
from dapt_jax.runtime import allocator as settings
from dapt_jax.settings import flags
from dapt_jax.statistics.comparisons import holm

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
HAS_TORCH = common.has_torch()
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="no torch, torchvision and timm here")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a benchmark with flags, from the checkout, and gives its JSON; its CSV has to agree."""
    monkeypatch.chdir(ROOT)

    def call(benchmark, *flags):
        files = [f"--json={tmp_path / 'out.json'}", f"--csv={tmp_path / 'out.csv'}", "--rounds=1"]
        benchmark.main([*files, "--data=absent", *flags])
        found = json.loads((tmp_path / "out.json").read_text())
        with (tmp_path / "out.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(found["rows"]) > 0
        for line, row in zip(lines, found["rows"], strict=True):
            assert line["jax"] == found["about"]["jax"] != ""
            assert set(line) == set(row) | set(found["about"]) | set(lines[0])
        return found["rows"]

    return call


def test_train_step_counts_the_work_of_each_strategy(run):
    rows = run(train_step, "--models=resnet18", "--bfloat16=", "--size=32", "--batch=2", "--steps=1")
    full, last, forward = (row["gflop"] for row in rows)
    assert [row["strategy"] for row in rows] == list(our_step.STRATEGIES)
    # A backward pass is twice the forward one, but for the gradient of the images, which nothing asks for.
    assert 2.8 * forward < full < 3 * forward
    assert forward < last < 2 * forward
    sides = ("dapt_jax", "torch") if HAS_TORCH else ("dapt_jax",)
    for row in rows:
        assert all(row[f"{side} {key}"] > 0 for side in sides for key in ("images/s", "GFLOP/s", "peak MiB"))
        assert ("ratio" in row) == HAS_TORCH


def test_paper_protocol_gives_one_score_on_all_sides_and_the_cache_saves_flops(run):
    flags = ["--model=resnet18", "--size=32", "--images=24", "--batch=6", "--divide=500", "--arms=l1sb"]
    rows = {row["side"]: row for row in run(paper_protocol, *flags)}
    assert set(rows) == {"cached", "uncached", *(["torch"] if HAS_TORCH else [])}
    for row in rows.values():
        assert row["logits differ by"] < 1e-2
        assert row["AUC"] == pytest.approx(rows["uncached"]["AUC"], abs=0.05)
        assert row["wall s"] >= row["compile s"] >= 0
        assert row["Wh"] > 0
    assert rows["cached"]["TFLOP"] < rows["uncached"]["TFLOP"]
    assert rows["uncached"]["FLOP ratio"] == 1


def test_the_arms_are_those_of_the_paper(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = flags.read("configs/mehmood2022.py:full")
    for arm in paper_protocol.ARMS:
        made, written = paper_protocol.strategy("resnet50", arm, 1), config.custom_strategies[arm]
        assert made.encoder.groups[-1] == written.get("cut_after", "stage4/block3")
        for phase, other in zip(made.phases, written["phases"], strict=True):
            assert (phase.epochs, phase.lr, set(phase.trainable)) == (
                other["epochs"],
                other["lr"],
                set(other["trainable"]),
            )


@needs_torch
@pytest.mark.parametrize(
    ("model", "strategy"),
    [("resnet18", "last block"), ("efficientnet_lite0", "forward"), ("vit_small", "last block")],
)
def test_both_sides_do_the_same_work(model, strategy):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import torch_side
    from dapt_jax.training import accounting

    made = our_step.program(model, our_step.trained_by(model, strategy))
    names = our_step.torch_names(made)
    network = torch_side.network(model, our_step.CLASSES, size=64)
    assert set(names.values()) == {name for name in network.state_dict() if "num_batches" not in name}
    trainer = torch_side.Trainer(network)
    trainer.train_only([names[path] for path in made.mask.trainable], 1e-4)
    images = np.zeros((1, 64, 64, 3), np.uint8)
    with FlopCounterMode(display=False) as counter:
        if strategy == our_step.FORWARD:
            trainer.logits(images)
            head = 2 * network.num_features * our_step.CLASSES
            expected = accounting.forward(made.model, 64, len(made.model.encoder.groups)).padded + head
        else:
            trainer.step(images, np.zeros(1, np.int64), np.ones(1, np.float32))
            cost = accounting.image_cost(made, 64)
            expected = cost.prefix.padded + cost.suffix.padded
    # Torch counts the taps that fall on padding; the grids of the two backward passes differ a little.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    assert torch.get_num_threads() == os.cpu_count()


def test_ops_compares_formulations_of_every_pass(run):
    rows = run(ops_benchmark, "--kinds=depthwise", "--batch=1")
    assert [row["pass"] for row in rows] == 2 * ["forward", "images", "kernel"]
    for row in rows:
        gflop = row["cpu GFLOP/s"] * row["cpu ms"] / 1000
        # Along an axis, 3 taps meet 3n - 2 of n pixels, 5 taps 5n - 6.
        pairs = {32: 3 * 32 - 2, 8: 5 * 8 - 6}[row["side"]]
        assert gflop == pytest.approx(2 * row["in"] * pairs**2 / 1e9)
        assert row["lax / cpu"] == pytest.approx(row["lax ms"] / row["cpu ms"])


def test_feature_cache_says_what_each_boundary_saves(run):
    flags = ["--models=resnet18", "--places=half,pooled", "--images=8", "--size=32", "--batch=4", "--steps=1"]
    half, pooled = run(feature_cache, *flags)
    assert (half["boundary below"], pooled["boundary below"]) == ("stage2/block2", "head")
    assert pooled["MiB"] == pytest.approx(8 * 512 * 4 / 2**20)
    assert 1 < half["FLOP ratio"] < pooled["FLOP ratio"]


def test_steps_of_few_parameters_are_told_beside_a_full_one(run, monkeypatch):
    monkeypatch.setitem(few_parameters.ENCODERS, "resnet18", few_parameters.Encoder(32, 2, 2))
    rows = run(few_parameters, "--models=resnet18")
    by_name = {(row["strategy"], row["groups"]): row for row in rows}
    assert set(by_name) == {
        ("full", "all"),
        ("lora", "all"),
        *((name, 2) for name in ("partial", "bitfit", "norm_tuning", "lora")),
    }
    whole, last = by_name["full", "all"], by_name["lora", 2]
    assert whole["of full FLOPs"] == whole["of full seconds"] == 1
    assert (
        last["of full FLOPs"]
        < by_name["partial", 2]["of full FLOPs"]
        < by_name["lora", "all"]["of full FLOPs"]
        < 1
    )
    assert last["trainable"] < by_name["partial", 2]["trainable"] < whole["trainable"]


def test_a_share_of_a_job_runs_as_planned_and_the_whole_is_priced(run, monkeypatch):
    phases = (
        {"name": "head", "epochs": 40, "trainable": ("head",), "lr": 1e-3, "augment": False},
        {"name": "full", "epochs": 20, "trainable": ("*",), "lr": 1e-4, "augment": False},
    )
    settings = {"model.name": "resnet18", "model.image_size": 32, "adapt.batch_size": 2}
    job = papers_size.Job(80, (40, 48), ".png", settings, phases, 0.05)
    monkeypatch.setitem(papers_size.JOBS, "mehmood2022", job)
    head, full = run(papers_size, "--jobs=mehmood2022", "--share=0.25")
    assert (head["images"], head["epochs"], full["epochs"]) == (20, 2, 1)
    # Of a phase without a cache the whole is the run, times images and epochs; the head's features are computed once.
    assert full["PFLOP in all"] == pytest.approx(full["TFLOP"] / 1e3 * 4 * 20, rel=1e-9)
    assert head["TFLOP"] / 1e3 * 4 < head["PFLOP in all"] < head["TFLOP"] / 1e3 * 4 * 20
    assert head["cache"] == "memory"


def test_scaling_finds_the_exponents_of_flops(run):
    flags = [
        "--model=resnet18",
        "--batches=2,4",
        "--sizes=32,64",
        "--boundaries=7,8",
        "--batch=2",
        "--size=32",
        "--steps=1",
    ]
    rows = run(scaling, *flags)
    exponents = {row["axis"]: row["of FLOPs"] for row in rows}
    assert exponents["batch"] == pytest.approx(1)
    assert exponents["boundary"] == pytest.approx(1)
    assert 2 < exponents["size"] < 2.6  # fewer taps of a larger image fall on padding
    assert np.isfinite([row["exponent"] for row in rows]).all()
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_startup_tells_a_cold_cache_from_a_warm_one(run):
    rows = run(startup, "--model=resnet18", "--weights=random", "--size=32", "--images=64")
    assert [row["compilation cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert row["total s"] == pytest.approx(
            sum(row[f"{part} s"] for part in ("imports", "reading", "step"))
        )


def test_input_pipeline_reads_the_same_files_on_both_sides(run):
    flags = [
        "--images=8",
        "--file-sizes=64",
        "--size=16",
        "--batch=4",
        "--kinds=colour",
        "--formats=jpeg,png",
    ]
    rows = run(input_pipeline, *flags)
    assert [row["files"] for row in rows] == ["colour jpeg", "colour png"]
    for row in rows:
        assert row["images"] == "SYNTHETIC phantoms"
        assert row["dapt_jax images/s"] > 0
        assert ("ratio" in row) == HAS_TORCH


def test_heads_of_all_folds_and_strengths_are_timed_against_one(run):
    one, many = run(heads, "--rows=60", "--features=8", "--seeds=2", "--folds=3", "--no-nested")
    assert (one["heads"], many["heads"]) == (1, 54)
    assert many["GFLOP"] > 0


def test_the_allocator_benchmark_measures_both_sides(run):
    rows = run(allocator, "--model=resnet18", "--size=32", "--batch=2", "--steps=1")
    assert [row["memory settings"] for row in rows] == ["as the command sets", "glibc's own"]
    assert all(row["images/s"] > 0 for row in rows)


def test_settings_are_added_once_and_never_against_the_user():
    added = settings.settings({})
    if added:  # on glibc
        assert set(settings.SETTINGS) < set(added)
        assert settings.settings(added) == {}
    assert settings.settings({"DAPT_JAX_ALLOCATOR": "off"}) == {}
    assert settings.settings({"MALLOC_TRIM_THRESHOLD_": "1"}) == {}


def test_a_corpus_has_as_many_images_of_each_class_as_there_are(tmp_path):
    dataset, what = common.images_of(str(tmp_path), 30, 16)
    counts = dataset.class_counts().values()
    assert (len(dataset), what) == (30, "SYNTHETIC phantoms")
    assert max(counts) - min(counts) <= 1


def test_a_benchmark_is_a_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.input_pipeline", "--help"]
    printed = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    ).stdout
    assert "--json" in printed


def test_accelerator_measures_steps_and_reading_on_the_device_that_is_there(run):
    rows = run(accelerator, "--smallest", "--parts=steps,input")
    full, last, cached, reading = rows
    assert full["peak MiB"] > last["peak MiB"] > 0
    assert cached["images/s"] > 0
    assert all(row["state donated"] for row in (full, last, cached))
    assert reading["images/s"] > 0


def test_the_stored_losses_hold_for_the_formulation_of_an_accelerator():
    stored = json.loads(accelerator.STORED.read_text())
    with ops_choice.formulation("lax"):
        found = accelerator.losses("last block", "highest")
    differences = [abs(a - b) / abs(b) for a, b in zip(found, stored["last block"], strict=True)]
    assert len(set(stored["last block"])) == accelerator.LOSS_STEPS
    assert max(differences) < accelerator.TOLERANCE["highest"]


def test_the_table_of_the_label_free_study_corrects_over_its_arms_and_tests_equivalence():
    labels, patients = np.arange(600) % 2, np.repeat(np.arange(200), 3)
    luck = np.random.default_rng(0).normal(size=600)

    def arm(name, shift, seeds=5):
        cases = {}
        for seed in range(seeds):
            noise = luck + np.random.default_rng(seed).normal(size=600) / 10
            positive = scipy.stats.norm.cdf(noise + shift * labels)
            cases[seed] = Predictions(np.eye(2)[labels], patients, np.stack([1 - positive, positive], 1))
        external = {seed: each.auc(np.arange(600)) for seed, each in cases.items()}
        return label_free_study.Arm(name, 5, external, external, 2e12, 60.0, [(40.0, 30.0)] * seeds, cases)

    arms = [
        arm("none", 0.0),
        arm("distil_partial", 0.3),
        arm("two_views_partial", 0.01),
        arm("supervised_partial", 0.3),
        arm(label_free_study.TEACHER, 1.0),
        arm("distil_full", 0.31, seeds=3),
    ]
    lines = label_free_study.table("blood", arms)
    cells = {line.split(" | ")[0].strip("| `"): line.split(" | ") for line in lines if " | " in line}
    assert cells["distil_partial"][1] == "5 of 5"
    assert cells["distil_full"][1] == "3 of 5"
    gain = arms[1].minus(arms[0])
    differences = [arms[1].external[seed] - arms[0].external[seed] for seed in range(5)]
    assert gain.mean == pytest.approx(np.mean(differences))
    assert gain.error > np.std(differences, ddof=1) / 5**0.5  # patients add to it
    assert cells["distil_partial"][4].startswith(f"{gain.mean:+.3f} [{gain.interval().low:+.3f}")
    tested = [each for each in arms if each.name in ("distil_partial", "two_views_partial", "distil_full")]
    expected = holm([each.minus(arms[0]).p(0, "greater") for each in tested])
    for each, p in zip(tested, expected, strict=True):
        assert cells[each.name][5] == f"{p:.3f}"
    assert cells["supervised_partial"][5] == cells[label_free_study.TEACHER][5] == ""
    (equal,) = [line for line in lines if line.startswith("`distil_partial` minus `distil_full`, 3 seeds")]
    assert "p of a difference of 0.02 or more (TOST) 0.000" in equal
    teacher = arms[1].minus(arms[4])
    (control,) = [line for line in lines if line.endswith("not adjusted.")]  # of the controls, one has run
    assert control.startswith(f"`distil_partial` minus teacher, frozen, 5 seeds: {teacher.mean:+.3f} [")
    assert f"p of no difference {teacher.p(0):.3f}" in control


def test_the_step_of_updates_above_a_cache_needs_the_memory_that_the_plan_says():
    """Of ViT-S at 112 pixels, by XLA's buffer assignment: the plan is within 15%."""
    full, cached = label_free.memory_rows(32)
    assert cached["peak MiB"] < 0.5 * full["peak MiB"]
    for row in (full, cached):
        assert row["plan / peak"] == pytest.approx(1, abs=0.15)
