"""Tasks of masks: planned to the integer, the frozen encoder untouched, cached views as drawn, patches through windows."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import our_step
from dapt_jax.cost import hardware
from dapt_jax.data.augment import Augment
from dapt_jax.errors import UserError
from dapt_jax.losses import SEGMENTATION_LOSSES, make_segmentation
from dapt_jax.losses.overlap import Dice, DiceCrossEntropy, Tversky
from dapt_jax.models import registry
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.records import case_scores
from dapt_jax.runtime import sharding
from dapt_jax.settings import StudySettings, default, flags, resolve
from dapt_jax.study import adapt, plan, plan_tables, prepare, recomputation, segmentation
from dapt_jax.study.arms import Arm, Study
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import Task
from dapt_jax.training import windows
from dapt_jax.training.context import RunContext
from dapt_jax.training.phases import Phase
from dapt_jax.training.run import TrainData, TrainingRun
from dapt_jax.weights.paths import flatten
from tests import command, tiny

TINY = [
    "--config.strategies=whole,scratch",
    "--config.seeds=0",
    "--config.model.image_size=32",
    "--config.tasks.leukocytes.development.n=24",
    "--config.tasks.leukocytes.external.n=8",
    "--config.transfer.folds=3",
    "--config.transfer.segmentation.decoder_epochs=1",
    "--config.transfer.segmentation.epochs=2",
    "--config.transfer.segmentation.batch_size=8",
    "--config.transfer.segmentation.augment.flip=dihedral",
]


def config(folder, *more):
    """A config of phantoms whose masks are to be found, on the first two stages of the encoder."""
    path = folder / "masks.py"
    lines = [
        "    cells = {'kind': 'phantoms', 'segments': ('background', 'cytoplasm', 'nucleus')}",
        "    config.tasks.leukocytes = {",
        "        'development': {**cells, 'name': 'development', 'n': 24}, 'external': {**cells, 'name': 'external', 'n': 8}}",
        "    config.custom_strategies.scratch = {'weights': 'random', 'cut_after': 'stage2/block1', 'phases': ()}",
        "    config.custom_strategies.whole = {'cut_after': 'stage2/block1'}",
        *more,
        "    return config",
    ]
    path.write_text(
        "from dapt_jax.settings import default\n\n\ndef get_config():\n    config = default()\n"
        + "\n".join(lines)
    )
    return path


def test_a_task_that_holds_nothing_out_writes_the_scores_of_its_test_set_alone(tmp_path):
    task = SimpleNamespace(name="lesions", scored="development", held_out={"test": None}, aggregation=None)
    scores = segmentation._Scores(task)
    scores._cases["test"].append(
        case_scores.CaseScores(np.ones(1, np.float32), np.array(["P1"]), np.array(["1.png"]))
    )
    arm = SimpleNamespace(name="scratch", seed=0)
    scores.write_cases(tmp_path, arm, "frozen")
    assert case_scores.path_of(tmp_path, "scratch", 0, "lesions", "test", "frozen").exists()
    assert not case_scores.path_of(tmp_path, "scratch", 0, "lesions", "development", "frozen").exists()


@pytest.mark.long
def test_a_study_of_masks_from_plan_to_report(tmp_path, capsys):
    chosen = [f"--config={config(tmp_path)}", *TINY]
    assert command.run(*chosen, "--config.mode=plan") == 0
    assert "transfer TFLOP" in capsys.readouterr().out
    workdir = tmp_path / "run"
    assert command.run(*chosen, f"--workdir={workdir}") == 0
    rows = command.rows(workdir / "results.jsonl")
    dice = {(row["strategy"], row["protocol"], row["split"]): row for row in rows if row["metric"] == "dice"}
    protocols = {
        "whole": ("frozen", "finetune"),
        "scratch": ("frozen", "finetune"),
        "baseline": ("pixel_colour",),
    }
    assert set(dice) == {
        (strategy, protocol, split)
        for strategy, its_protocols in protocols.items()
        for protocol in its_protocols
        for split in ("development", "external")
    }
    assert all(0 <= row["value"] <= 1 and row["classes"] == ["cytoplasm", "nucleus"] for row in dice.values())
    assert {row["init"] for row in rows if row["strategy"] == "scratch"} == {"random"}
    ledger = command.rows(workdir / "ledger.jsonl")
    assert sum(row["model_flops"] for row in ledger) == planned(chosen)
    assert len(list((workdir / "overlays").glob("*.npz"))) == 8
    for (strategy, protocol, split), row in dice.items():
        if strategy != "baseline":
            path = case_scores.path_of(workdir, strategy, row["seed"], row["task"], split, protocol)
            cases = case_scores.read(path)
            assert cases.mean(np.arange(len(cases.groups))) == pytest.approx(row["value"], abs=1e-6)
    page = (workdir / "report.html").read_text()
    assert "Dice" in page
    assert "nucleus" in page
    before = (workdir / "results.jsonl").read_bytes()
    assert command.run(*chosen, f"--workdir={workdir}") == 0
    assert (workdir / "results.jsonl").read_bytes() == before


@pytest.mark.long
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_cached_views_and_their_masks_are_those_that_are_drawn(tmp_path, place):
    more = [
        "--config.strategies=whole",
        "--config.transfer.segmentation.protocols=frozen",
        "--config.transfer.baseline=",
    ]
    more += [
        "--config.transfer.segmentation.num_fixed_views=2",
        "--config.transfer.segmentation.optimizer.name=sgd",
    ]
    budget = {"memory": [], "disk": ["--config.cache.memory_mb=0", "--config.cache.flops_per_byte=0.001"]}[
        place
    ]
    flags = [each for each in TINY if "strategies" not in each]
    curves = {}
    for mode, extra in {"off": [], "on": budget}.items():
        workdir = tmp_path / mode
        chosen = [f"--config={config(tmp_path)}", *flags, *more, f"--config.cache.mode={mode}", *extra]
        assert command.run(*chosen, f"--workdir={workdir}") == 0
        (row,) = command.rows(workdir / "ledger.jsonl")
        assert row["cached"] == {"off": "off", "on": "filled"}[mode]
        curves[mode] = [epoch["loss"] for epoch in row["curve"]]
    np.testing.assert_allclose(curves["on"], curves["off"], rtol=1e-4)
    assert curves["off"][-1] < curves["off"][0]


def planned(arguments):
    """Model FLOPs that the plan of a study names, over its strategies."""
    settings, _ = flags.parse(arguments)
    ready = prepare.prepare(settings)
    return sum(
        sum(plan.transfer_flops(ready, arm, task).values()) for task in ready.tasks for arm in ready.arms
    )


def of_masks(tmp_path, *more):
    """A study of masks that is ready to be planned, of an encoder as it is."""
    path = config(tmp_path)
    kept = [line for line in path.read_text().splitlines() if "custom_strategies" not in line]
    path.write_text("\n".join(kept))
    settings, _ = flags.parse([f"--config={path}", *TINY[1:], "--config.strategies=none", *more])
    return prepare.prepare(settings)


def test_a_plan_says_whether_a_decoder_s_batch_fits_and_how_large_it_may_be(tmp_path, capsys, monkeypatch):
    ready = of_masks(tmp_path)
    frozen, whole = plan.target_memory(ready, ready.arms[0])
    assert (frozen.protocol, whole.protocol, whole.batch_size) == ("frozen", "finetune", 8)
    assert frozen.peak_bytes < whole.peak_bytes
    plan_tables.show(ready)
    said = capsys.readouterr().out
    mib = round(whole.peak_bytes / 2**20)
    assert (
        f"memory of leukocytes finetune: {mib} MiB, a batch of 8 fits, and one of {whole.largest_batch:,} at"
        in said
    )
    monkeypatch.setattr(hardware, "device_bytes", lambda: (frozen.peak_bytes + whole.peak_bytes) // 2)
    plan_tables.show(ready)
    said = capsys.readouterr().out
    assert f"memory of leukocytes frozen: {round(frozen.peak_bytes / 2**20)} MiB, a batch of 8 fits" in said
    assert (
        "a batch of 8 does NOT fit for none: lower transfer.segmentation.batch_size, split it "
        "(transfer.segmentation.grad_accum_steps), or compute activations again (model.remat=fit)"
    ) in said


def test_activations_are_computed_again_for_a_decoder_that_would_not_fit(tmp_path, monkeypatch):
    ready = of_masks(tmp_path)
    plain = plan.target_memory(ready, ready.arms[0])[-1].peak_bytes
    monkeypatch.setattr(hardware, "device_bytes", lambda: plain - 1)
    model = dataclasses.replace(ready.settings.model, remat=("fit",))
    ready = dataclasses.replace(ready, settings=dataclasses.replace(ready.settings, model=model))
    fitting, line = recomputation.with_fitting_activations(ready)
    assert "the activations of stem" in line
    assert plan.target_memory(fitting, fitting.arms[0])[-1].peak_bytes < plain


@pytest.mark.long
@pytest.mark.parametrize(("model", "side"), [("resnet18", 64), ("vit_small", 64)])
def test_a_decoder_s_step_needs_the_memory_that_the_plan_says(model, side, tmp_path):
    """By XLA's buffer assignment: the plan is within 15%."""
    of_model = f"--config.model.name={model}", "--config.weights=random"
    ready = of_masks(tmp_path, *of_model, f"--config.model.image_size={side}")
    runs = plan.transfer_runs(ready, ready.arms[0], ready.tasks[0])
    for planned, (run, *_) in zip(plan.target_memory(ready, ready.arms[0]), runs.values(), strict=True):
        peaks = []
        for program in run.programs:
            state = program.init_state(*program.model.init(0))
            batch = {
                "image": np.zeros((8, side, side, 3), np.uint8),
                "label": np.zeros((8, side, side), np.uint8),
                "weight": np.ones(8, np.float32),
                "index": np.arange(8, dtype=np.int32),
            }
            rng = {"seed": np.uint32(0), "view": np.int32(0), "epoch": np.int32(0)}
            step = jax.jit(program.train_step, donate_argnums=0).lower(state, batch, rng, np.float32(1e-3))
            peaks.append(our_step.memory_of(step.compile()))
        assert planned.peak_bytes == pytest.approx(max(peaks), rel=0.15)


def test_what_a_decoder_or_the_devices_cannot_do_is_refused_before_training(tmp_path, capsys, monkeypatch):
    chosen = [f"--config={config(tmp_path)}", *TINY, "--config.mode=plan"]
    assert (
        command.run(*[each for each in chosen if "image_size" not in each], "--config.model.image_size=34")
        == 2
    )
    assert "tasks.leukocytes: images of 34 x 34 pixels" in capsys.readouterr().err
    rate = (
        "--config.model.name=densenet121",
        "--config.weights=random",
        "--config.transfer.segmentation.drop_path=0.1",
    )
    of_none = [each.replace("whole,scratch", "none") for each in chosen]
    assert command.run(*of_none, *rate) == 2
    said = "drop_path is 0.1, but neither model 'densenet121' nor decoder 'unet' has residual branches"
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sharding, "check_batch", only_for(48))
    assert command.run(*chosen, "--config.adapt.batch_size=48") == 2
    assert "transfer.segmentation.batch_size 8 does not divide among 48 devices" in capsys.readouterr().err


def test_devices_need_not_divide_a_batch_of_masks_where_no_task_has_masks(capsys, monkeypatch):
    monkeypatch.setattr(sharding, "check_batch", only_for(48))
    flags = command.small("--config.strategies=none", "--config.mode=plan", "--config.adapt.batch_size=48")
    assert command.run(*flags) == 0, capsys.readouterr().err


def only_for(size):
    """In place of `check_batch`: devices that no batch of another size divides among."""

    def check_batch(batch_size, parts):
        if batch_size != size:
            raise UserError(f"batch_size {batch_size} does not divide among {size} devices")

    return check_batch


OBJECTIVES = {
    "softmax": DiceCrossEntropy(3),
    "one sigmoid": DiceCrossEntropy(1),
    "overlapping": DiceCrossEntropy(3, multi_label=True),
}


def loss_of(name, batchwise, outputs, multi_label=False):
    params = {} if name == "ce" else {"batchwise": batchwise}
    return SEGMENTATION_LOSSES[name](outputs, multi_label, **params)


def masks_for(objective, seed, size=8):
    values = 1 << objective.outputs if objective.sigmoid else objective.outputs
    return jnp.asarray(np.random.default_rng(seed).integers(0, values, (4, size, size)), jnp.uint8)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_losses_of_sure_and_of_wrong_masks(objective):
    masks = masks_for(objective, 0)
    targets = np.asarray(objective.targets(masks))
    np.testing.assert_array_equal(objective.decide(jnp.asarray(targets)), masks)
    for loss in ("dice", "ce", "dice_ce", "tversky"):
        for batchwise in (False, True):
            chosen = loss_of(loss, batchwise, objective.outputs, objective.multi_label)
            sure, wrong = (
                chosen.total(jnp.asarray(40 * targets - 20) * sign, masks, jnp.ones(4)) for sign in (1, -1)
            )
            assert float(sure) < 1e-3 < 1 < float(wrong)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(deadline=None, max_examples=15)
def test_soft_dice_and_tversky_by_hand(seed, share):
    rng = np.random.default_rng(seed)
    logits, masks = (
        jnp.asarray(rng.normal(size=(2, 5, 5, 1))),
        jnp.asarray(rng.integers(0, 2, (2, 5, 5)), jnp.uint8),
    )
    said, truth = 1 / (1 + np.exp(-np.asarray(logits, float)[..., 0])), np.asarray(masks, float)
    both, over, under = (
        (a * b).sum((1, 2)) for a, b in ((said, truth), (said, 1 - truth), (1 - said, truth))
    )
    dice = 1 - (2 * both + 1) / (said.sum((1, 2)) + truth.sum((1, 2)) + 1)
    np.testing.assert_allclose(Dice(1)(logits, masks), dice, atol=1e-5)
    tversky = 1 - (both + 0.5) / (both + share * over + (1 - share) * under + 0.5)
    found = Tversky(1, false_positives=share)(logits, masks)
    np.testing.assert_allclose(found, tversky, atol=1e-5)
    pooled = 1 - (2 * both.sum() + 1) / (said.sum() + truth.sum() + 1)
    batch = Dice(1, batchwise=True)
    np.testing.assert_allclose(batch.total(logits, masks, jnp.ones(2)), 2 * pooled, rtol=1e-5)


@pytest.mark.parametrize("batchwise", [False, True])
def test_the_background_counts_in_cross_entropy_and_not_in_dice(batchwise):
    rng = np.random.default_rng(3)
    logits, masks = rng.normal(size=(2, 6, 6, 3)), rng.integers(0, 3, (2, 6, 6))
    said = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = np.eye(3)[masks]
    axes = (0, 1, 2) if batchwise else (1, 2)
    dice = (2 * (said * truth).sum(axes) + 1) / (said.sum(axes) + truth.sum(axes) + 1)
    overlap = 2 * (1 - dice[1:].mean()) if batchwise else (1 - dice[:, 1:].mean(1)).sum()
    entropy = -np.log((said * truth).sum(-1)).mean((1, 2)).sum()
    arguments = jnp.asarray(logits, jnp.float32), jnp.asarray(masks, jnp.uint8), jnp.ones(2)
    for loss, expected in {"dice": overlap, "ce": entropy, "dice_ce": overlap + entropy}.items():
        assert float(loss_of(loss, batchwise, 3).total(*arguments)) == pytest.approx(expected, rel=1e-5)


def test_a_step_sees_the_masks_of_the_images_that_it_sees():
    """The loss of a step is that of the augmented images against masks that went the same way, worked out apart."""
    model, objective = Segmenter(tiny.encoder(), 3), DiceCrossEntropy(3)
    augment = Augment("dihedral", rotate=30.0)
    data = dataclasses.replace(tiny.dataset(), masks=np.zeros((40, 16, 16), np.uint8))
    run = TrainingRun(
        model, (Phase("all", 1, ("*",), 1e-3),), TrainData(data, [0]), objective, augment=augment, seed=5
    )
    (program,) = run.programs
    params, batch_stats = model.init(0)
    rng, rows = np.random.default_rng(0), jnp.arange(4)
    images, masks = jnp.asarray(rng.integers(0, 256, (4, 16, 16, 3)), jnp.uint8), masks_for(objective, 0, 16)
    batch = {"image": images, "label": masks, "weight": jnp.ones(4), "index": rows}
    draw = {"seed": np.uint32(5), "view": np.int32(2), "epoch": np.int32(2)}
    after = jax.jit(program.train_step)(program.init_state(params, batch_stats), batch, draw, jnp.float32(0))
    logits = jax.jit(model.__call__)(params, batch_stats, augment(images, 5, 2, rows))
    moved = objective.total(logits, augment.masks(masks, 5, 2, rows), jnp.ones(4))
    assert float(after["loss"]) == pytest.approx(float(moved), rel=1e-5)
    assert float(moved) != pytest.approx(float(objective.total(logits, masks, jnp.ones(4))), rel=1e-3)


@pytest.mark.parametrize(
    ("protocol", "encoder"),
    [("frozen", "tiny"), ("finetune", "tiny"), ("frozen", "vit_small"), ("finetune", "vit_small")],
)
def test_training_starts_from_the_adapted_encoder_and_a_decoder_of_the_seed(
    tmp_path, monkeypatch, protocol, encoder
):
    class BegunError(Exception):
        pass

    def begin(run, params, batch_stats, *_):
        raise BegunError(run, params, batch_stats)

    monkeypatch.setattr(adapt, "train_with_early_stopping", begin)
    config, encoder = default(), tiny.encoder() if encoder == "tiny" else registry.build(encoder)
    config.transfer.segmentation.protocols = (protocol,)
    study, arm = Study(resolve(config)), Arm(Strategy("full", encoder, (), "random"), 3)
    masks = np.random.default_rng(0).integers(0, 2, (40, 32, 32)).astype(np.uint8)
    task = Task(
        "cells", dataclasses.replace(tiny.dataset(size=32), masks=masks).segmented(("background", "cell")), {}
    )
    params, batch_stats = Segmenter(encoder, 1).init(7)
    adapted = adapt.Adapted(encoder, params, batch_stats, "adapted")
    with pytest.raises(BegunError) as begun:
        segmentation.transfer(study, arm, task, adapted, RunContext(workdir=tmp_path))
    run, *started = begun.value.args
    model = run.programs[0].model
    fresh, drawn = model.init(3), flatten(model.init(7)[0])
    for found, of_arm, own in zip(started, (params, batch_stats), fresh, strict=True):
        for path, leaf in flatten(found).items():
            is_of_encoder = path.startswith(tuple(encoder.groups))
            np.testing.assert_array_equal(leaf, flatten(of_arm if is_of_encoder else own)[path], err_msg=path)
    decoder = [path for path in flatten(started[0]) if not path.startswith(tuple(encoder.groups))]
    assert any((flatten(started[0])[path] != drawn[path]).any() for path in decoder)


@pytest.mark.parametrize(
    ("known", "unit"), [((True, True), "mm"), ((True, False), "px"), ((False, False), "px")]
)
def test_distances_carry_their_unit_which_is_one_for_all_sets_of_a_task(known, unit):
    masks = np.zeros((40, 16, 16), np.uint8)
    masks[:, 4:9, 5:11] = 1
    plain = dataclasses.replace(tiny.dataset(), masks=masks).segmented(("background", "cell"))
    spaced = dataclasses.replace(plain, spacing=np.full((40, 2), 3.0))
    development, external = (spaced if each else plain for each in known)
    task = Task("cells", development, {"external": external})
    rows = segmentation.baseline(StudySettings(), task, 0)
    assert {row["unit"] for row in rows if row["metric"].startswith(("hd95", "assd"))} == {unit}
    assert not [row for row in rows if "unit" in row and not row["metric"].startswith(("hd95", "assd"))]
    in_pixels = {
        (row["split"], row["metric"]): row["value"]
        for row in segmentation.baseline(StudySettings(), Task("cells", plain, {"external": plain}), 0)
    }
    for row in rows:
        if row["metric"] == "assd" and row["value"]:
            factor = 3 if unit == "mm" else 1
            assert row["value"] == pytest.approx(factor * in_pixels[row["split"], "assd"])


@pytest.mark.parametrize("loss", ["dice", "ce", "dice_ce", "tversky"])
@pytest.mark.parametrize("batchwise", [False, True])
def test_examples_of_no_weight_change_nothing(loss, batchwise):
    objective = loss_of(loss, batchwise, 3)
    logits = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    masks, weights = masks_for(objective, 1), jnp.asarray([1.0, 1.0, 0.0, 0.0])
    other = np.concatenate([logits[:2], -3 * logits[2:]])
    first, second = (
        jax.value_and_grad(objective.total)(jnp.asarray(each), masks, weights) for each in (logits, other)
    )
    assert float(first[0]) == pytest.approx(float(second[0]), rel=1e-6)
    np.testing.assert_array_equal(np.asarray(first[1])[2:], 0)


def test_two_segments_make_one_output_and_bits_one_each():
    assert make_segmentation("dice", classes=("no", "yes")).outputs == 1
    assert make_segmentation("dice", classes=("no", "a", "b")).outputs == 3
    assert make_segmentation("dice", classes=("no", "a", "b"), multi_label=True) == Dice(2, multi_label=True)


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
@settings(deadline=None, max_examples=30)
def test_windows_cover_every_pixel_and_average_to_what_each_says(height, width, overlap):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    found = windows.sliding(lambda part: part.astype(np.float32) / 255, images, 8, overlap, batch_size=5)
    np.testing.assert_allclose(found, images / 255, atol=1e-5)
    for side in (height, width):
        starts = windows.corners(side, 8, overlap)
        assert starts[0] == 0
        assert starts[-1] == side - 8
        assert all(
            after - before <= max(1, 8 * (1 - overlap)) + 1 for before, after in itertools.pairwise(starts)
        )


def test_windows_weigh_their_centre_most():
    """Windows that contradict each other: each pixel is told by the one whose centre is nearer."""
    images = np.zeros((1, 8, 12, 3), np.uint8)
    images[:, :, 5:] = 1  # windows start at columns -4, 0, 4 and 8; the last of them on a one
    said = windows.sliding(
        lambda part: np.broadcast_to(part[:, :1, :1, :1], (*part.shape[:3], 1)), images, 8, 0.5
    )
    line = said[0, 4, :, 0]
    assert (np.diff(line) >= 0).all()
    assert line[9] < 0.5 < line[10]


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_edges_of_sliding_windows_are_as_good_as_the_middle(overlap):
    """Bars that run to both edges look the same along their whole length, whatever a network pads with.

    The stand-in for a network marks what differs from its surroundings, and pads right and bottom with zeros,
    as layers of stride 2 do: at the right border of a window, darkness beside that padding looks marked.
    """
    reach, window, side = 5, 24, 61
    row = np.where(np.arange(side) % 12 < 2, 90, 20).astype(np.uint8)
    images = np.broadcast_to(row[None, :, None, None], (1, side, side, 3))

    def network(part: np.ndarray) -> np.ndarray:
        x = part[..., :1] / 127.5 - 1
        padded = np.pad(x, ((0, 0), (0, reach), (0, reach), (0, 0)))
        around = np.lib.stride_tricks.sliding_window_view(padded, (reach + 1, reach + 1), (1, 2)).mean(
            (-2, -1)
        )
        return np.abs(x - around)

    truth = network(images)[0, :-reach, :1, 0]
    found = windows.sliding(network, images, window, overlap)[0, :-reach, :, 0]
    error = np.abs(found - truth).max(0)
    assert error[[0, 1, -reach, -2, -1]].max() <= error[window : side - window].max() + 1e-3
    at_a_border = np.abs(network(images[:, :window, :window])[0, :-reach, -1, 0] - truth[: window - reach, 0])
    assert at_a_border.max() > 0.3  # what the last column got before images were mirrored


@pytest.mark.parametrize(
    ("patch", "side", "overhang"), [(128, 256, 64), (224, 256, 32), (256, 256, 0), (0, 256, 0)]
)
def test_patches_reach_as_far_beyond_an_image_as_windows_or_as_they_are_smaller(patch, side, overhang):
    assert segmentation._reaching(Augment(patch=patch), side, 0.5) == Augment(patch=patch, overhang=overhang)


def test_windows_are_refused_that_do_not_fit():
    images = np.zeros((1, 8, 12, 3), np.uint8)
    with pytest.raises(UserError, match="images of 8 x 12 pixels; expected at least the window of 9"):
        windows.sliding(lambda part: part, images, 9)


def test_patches_train_and_cost_as_their_size():
    """A network trained on patches costs what it costs on images of that size, cached views of patches included."""
    from dapt_jax.training import accounting

    run = tiny.make_run(
        [Phase("last", 2, ("stage3", "head"), 1e-2, views=2)],
        encoder=tiny.encoder(), data=tiny.dataset(size=24), augment=Augment(patch=16), cache="on",
    )  # fmt: skip
    small = tiny.make_run(
        [Phase("last", 2, ("stage3", "head"), 1e-2)], encoder=tiny.encoder(), data=tiny.dataset()
    )
    assert accounting.image_cost(run.programs[0], 24) == accounting.image_cost(small.programs[0], 16)
    per_image = accounting.forward(run.programs[0].model, 16, run.programs[0].mask.boundary).model
    assert run.fill_flops(0) == per_image * 2 * len(run.dataset)
