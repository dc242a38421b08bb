"""Corpora without labels, the settings and studies that take them, and the lines that refuse the rest."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from dapt_jax import settings
from dapt_jax.data import sources
from dapt_jax.errors import UserError
from dapt_jax.records.ledger import Row
from dapt_jax.report import curves
from dapt_jax.settings import flags
from dapt_jax.study import collapse, plan_tables, prepare
from dapt_jax.training.label_free_evaluator import LabelFreeEvaluator
from dapt_jax.transferability.alpha_req import alpha_req
from dapt_jax.transferability.lidar import lidar
from dapt_jax.transferability.rankme import rankme
from tests import command
from tests.command import ROOT

nibabel = pytest.importorskip("nibabel")


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Pictures at three depths, a volume of four slices, and a file that is no image."""
    root = tmp_path / "images"
    for number, name in enumerate(["P1_a.png", "x/P1_b.png", "x/y/P2_c.png", "x/y/P3_d.png"]):
        picture(root / name, number)
    volume = np.random.default_rng(9).random((8, 8, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), root / "x" / "P4_v.nii.gz")
    (root / "readme.txt").write_text("no image")
    return root


def load(kind, path, labels=True, **more):
    return sources.load(
        {"kind": kind, "path": str(path), **more}, data_dir=None, image_size=16, labels=labels
    )


def test_every_picture_and_slice_below_a_folder_is_read_without_labels(folder):
    found = load("images", folder)
    assert not found.is_labelled
    assert found.class_counts() == {}
    assert len(found) == 4 + 4
    assert len(set(found.groups)) == 5  # the slices of a volume stay together
    assert found.notes == (f"{folder}: left out files that are not images: .txt 1",)
    patients = load("images", folder, group=r"(P\d+)_").groups
    assert sorted(set(patients)) == ["P1", "P2", "P3", "P4"]
    assert (found.images[0] == load("folder", folder, labels=False).images[0]).all()


@pytest.mark.parametrize("kind", ["images", "folder"])
def test_masks_among_the_pictures_of_a_folder_are_no_images(tmp_path, kind):
    images = [
        "benign/benign (1).png",
        "benign/benign (2).png",
        "covid/images/1.png",
        "P1_image.png",
        "x/img_1.png",
    ]
    masks = [
        "benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png", "benign/benign (2)_mask.png",
        "covid/lung masks/1.png", "P1_lung_mask.png", "P1_mask.png", "x/mask_1.png",
    ]  # fmt: skip
    names = ["Mask_Anna_1.png", "masked.png", "Infection Segmentation Data/images/2.png"]
    for number, name in enumerate([*images, *masks, *names, "Infection Segmentation Data/lung masks/2.png"]):
        picture(tmp_path / name, number)
    found = load(kind, tmp_path, labels=False)
    assert sorted(found.images.names) == sorted(str(tmp_path / name) for name in (*images, *names))
    assert found.notes == (
        f"{tmp_path}/Infection Segmentation Data/lung masks: left out, a folder of 1 image named as masks, and 1 more "
        "such folder of 1 image",
        f"{tmp_path}: left out 6 masks beside their images, first: P1_lung_mask.png; kind 'manifest' reads masks",
    )


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("P1_t1.nii.gz", "P1_seg.nii.gz"),
        ("P1/t1.nii", "P1/seg.nii"),
        ("imagesTr/P1_0000.nii", "labelsTr/P1.nii"),
    ],
)
def test_label_maps_beside_their_volumes_are_no_images(tmp_path, image, mask):
    for name in (image, mask):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        volume = np.random.default_rng(9).random((8, 8, 4)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name)
    found = load("images", tmp_path)
    assert set(found.groups) == {str(tmp_path / image)}
    assert "left out" in found.notes[0]


def test_a_folder_of_nothing_but_masks_is_refused_unless_it_is_the_path_itself(tmp_path):
    picture(tmp_path / "with mask" / "1.png", 1)
    with pytest.raises(
        UserError, match=r"holds 1 image, all in folders named as masks, first: .*with mask/1.png"
    ):
        load("images", tmp_path)
    assert len(load("images", tmp_path / "with mask")) == 1


def test_labels_of_a_manifest_are_not_read_and_need_not_be_there(folder):
    rows = "image,patient\nP1_a.png,1\nx/P1_b.png,1\nx/y/P2_c.png,2\n"
    (folder / "bare.csv").write_text(rows)
    bare = load("manifest", folder / "bare.csv", labels=False)
    assert list(bare.groups) == ["1", "1", "2"]
    assert not bare.is_labelled
    with pytest.raises(UserError, match=r"bare.csv: no column 'label'; valid: 'image', 'patient'"):
        load("manifest", folder / "bare.csv")
    (folder / "named.csv").write_text("image,label\nP1_a.png,a\nx/P1_b.png,\n")  # a label is missing
    assert len(load("manifest", folder / "named.csv", labels=False)) == 2


def test_hidden_labels_leave_nothing_that_could_depend_on_them():
    shown, hidden = (
        sources.load(
            {"kind": "phantoms", "name": "development", "n": 12}, data_dir=None, image_size=16, labels=each
        )
        for each in (True, False)
    )
    assert not hidden.is_labelled
    assert hidden.masks is None
    assert not hidden.labels.any()
    assert (hidden.images[3] == shown.images[3]).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: root.mkdir() or root, "it is empty; expected .png"),
        (
            lambda root: (root.mkdir(), (root / "a.txt").write_text("a")) and root,
            r"it holds files of other kinds \(.txt 1\)",
        ),
        (lambda root: root, "no such folder"),
    ],
)
def test_a_folder_without_images_is_one_line(make, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load("images", make(tmp_path / "there"))


def study_of(folder, strategies=("partial",), objective="reconstruct", **corpus):
    config = settings.default()
    config.seeds = (0,)
    config.strategies = strategies
    config.weights = "random"
    config.model.name = "resnet18"
    config.model.image_size = 32
    config.corpus.update({"kind": "images", "path": str(folder), "val_fraction": 0.0, **corpus})
    config.adapt.objective = objective
    config.adapt.augment.flip = "dihedral"
    config.adapt.num_fixed_views = 2
    return config


def prepared(config):
    return prepare.prepare(settings.resolve(config))


def test_a_supervised_strategy_on_a_corpus_without_labels_is_refused_with_the_objectives_that_need_none(
    folder,
):
    said = (
        "strategy 'partial' is supervised: expected labels, or adapt.objective='reconstruct' or 'distil' or"
    )
    with pytest.raises(UserError, match=f"corpus: kind 'images' reads no labels; {said}"):
        prepared(study_of(folder, objective="supervised"))
    (folder / "bare.csv").write_text("image\nP1_a.png\nx/P1_b.png\n")
    with pytest.raises(UserError, match=f"bare.csv: no column 'label'; .*{said}"):
        prepared(study_of(folder / "bare.csv", objective="supervised", kind="manifest"))
    config = study_of(folder)
    config.strategies = ("partial", "labelled")
    config.custom_strategies.labelled = {"like": "full", "objective": "supervised"}
    with pytest.raises(UserError, match="strategy 'labelled' is supervised"):
        prepared(config)


def test_a_share_of_a_full_dapt_that_would_need_labels_is_said_to_be_none(folder, capsys):
    config = study_of(folder, strategies=("ours",), objective="supervised")
    config.custom_strategies.ours = {"like": "partial", "objective": "reconstruct"}
    plan_tables.show(prepared(config), None)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ours")]
    assert row.split("│")[7].strip() == "-"
    config.custom_strategies.ours.compute_budget = 0.1
    with pytest.raises(
        UserError, match=r"ours\.compute_budget 0\.1 is a share .* expected adapt\.objective of recons"
    ):
        prepared(config)
    config.adapt.objective = "reconstruct"
    study = prepared(config)
    assert study.run_of(study.arms[0]).flops() <= 0.1 * study.full_flops(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"adapt.objective": "distil"}, "adapt.distil.teacher names no weights"),
        (
            {"adapt.objective": "distil", "adapt.distil.teacher": "/nowhere.safetensors"},
            r"adapt.distil.teacher \(resnet18\): .*nowhere",
        ),
        (
            {"adapt.objective": "two_views", "adapt.augment.flip": "none"},
            "the two views of an image are equal",
        ),
        ({"adapt.mix.mixup": 0.2}, "compares unmixed images"),
        (
            {"adapt.objective": "mae"},
            "model 'resnet18' cannot: expected a vision transformer with learnt positions",
        ),
        (
            {"adapt.objective": "mae", "model.name": "vit_small", "model.image_size": 8},
            "multiple of their patch's 16",
        ),
        (
            {"cache.mode": "on", "cache.memory_mb": 0, "cache.disk_mb": 0},
            "activations exceed the budgets .* not even one view fits",
        ),
        ({"adapt.objective": "dino", "adapt.head_epochs": 0}, "expected adapt.head_epochs of 1 or more"),
        (
            {"adapt.objective": "dino", "adapt.early_stopping_patience": 2, "corpus.val_fraction": 0.3},
            "targets that move, and is lowest when it collapses; expected adapt.early_stopping_patience=0",
        ),
        ({"adapt.balance_clusters": 99}, "adapt.balance_clusters is 99, but it has 8 different images"),
        ({"model.name": "vit_small_dinov2", "model.image_size": 13}, "multiple of their patch's 14"),
    ],
)
def test_objectives_that_cannot_work_are_one_line(change, said, folder):
    config = study_of(folder)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=said):
        prepared(config)


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 image; expected"), (3, "3 images, pixel for pixel the same")]
)
def test_a_corpus_of_one_picture_is_one_line(count, said, tmp_path):
    for number in range(count):
        picture(tmp_path / "same" / f"{number}.png", 0)
    for share in (0.0, 0.2):
        with pytest.raises(UserError, match=said):
            prepared(study_of(tmp_path / "same", val_fraction=share))


def test_pictures_with_equal_pixels_count_once_and_no_label_decides_the_split(folder):
    picture(folder / "copy.png", 0)
    study = prepared(study_of(folder))
    run = study.run_of(study.arms[0])
    assert len(run.dataset) == 9
    assert len(run.train_rows) == 8


def test_heads_see_the_views_of_later_phases_and_reconstruction_needs_none(folder):
    phases = {}
    for objective in ("supervised", "reconstruct", "two_views", "dino"):
        config = study_of(folder, objective=objective)
        phases[objective] = prepare.strategies.resolve(
            "partial", config_encoder(config), settings.resolve(config)
        ).phases
    assert [(phase.name, phase.augment, phase.views) for phase in phases["two_views"]] == [
        ("head", True, 2),
        ("partial", True, 2),
    ]
    assert [phase.name for phase in phases["reconstruct"]] == ["partial"]
    head = ("head/dense1", "head/dense2", "head/dense3")
    dino = [(phase.name, phase.epochs, phase.trainable) for phase in phases["dino"][:2]]
    assert dino == [("head_layers", 1, head), ("head", 9, ("head",))]  # its prototypes wait for an epoch
    assert phases["supervised"][0].augment is False


def config_encoder(config):
    return settings.resolve(config).model.encoder()


def test_the_alarm_warns_once_or_halts_when_the_rank_halves():
    said = []
    alarm = collapse.CollapseAlarm("partial seed 0", [40.0], "warn", said.append)
    for epoch, rank in enumerate((41.0, 20.0, 19.9, 5.0)):
        assert not alarm.after_epoch(0, epoch, {}, {}, {"rankme": rank})
    (line,) = said
    assert "fell from 40 to 19.9 in epoch 3 of the run, below half of its start" in line
    halting = collapse.CollapseAlarm("partial seed 0", [40.0], "halt", said.append)
    with pytest.raises(UserError, match=r"collapse: RankMe .* expected a lower adapt.lr"):
        halting.after_epoch(0, 0, {}, {}, {"rankme": 3.0})


def test_rankme_and_alpha_req_are_the_published_ones():
    rng = np.random.default_rng(0)
    assert rankme(np.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1, abs=1e-4)
    singular = np.array([3.0, 2.0, 1.0])
    share = singular / 6 + 1e-7
    rows = np.linalg.qr(rng.normal(size=(9, 3)))[0] * singular
    assert rankme(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-4)
    directions = np.linalg.qr(rng.normal(size=(400, 30)))[0]
    directions = np.linalg.qr(directions - directions.mean(0))[0]
    for alpha in (0.5, 1.0, 2.0):
        spectrum = np.arange(1, 31) ** (-alpha / 2)
        assert alpha_req(directions * spectrum) == pytest.approx(alpha, abs=1e-6)
    with pytest.raises(UserError, match="eigenvalues above rounding"):
        alpha_req(np.ones((9, 4)))


def test_the_decisive_study_has_the_arms_and_controls_that_its_docs_name():
    """Every arm of every set resolves to phases; partial arms train above a boundary that can be cached."""
    for images in ("blood", "brain", "chest"):
        for arms, seeds in {"cached": 5, "control": 5, "teacher": 5, "full": 3}.items():
            made = settings.resolve(flags.read(f"{ROOT}/configs/label_free_study.py:{images},{arms}"))
            assert len(made.seeds) == seeds
            assert made.strategies[0] == "none"
            for name in made.custom_strategies:
                phases = made.custom_strategies[name].phases
                assert ("*" in phases[-1].trainable) == name.endswith("_full")
                assert all(phase.views for phase in phases) or name in (
                    "reconstruct_full",
                    "two_views_full",
                    "supervised_full",
                )
    with pytest.raises(UserError, match=r"expected SET,ARMS.*'bloood'.*'blood'"):
        flags.read(f"{ROOT}/configs/label_free_study.py:bloood,cached")


def test_lidar_is_the_published_one_and_does_not_count_what_augmentation_fills():
    """By eigenvectors as arXiv 2312.04000 writes it, where the code takes a Cholesky factor."""
    rng = np.random.default_rng(0)
    views = rng.normal(size=(1, 30, 6)) * [3, 2, 1, 1, 0.5, 0.1] + 0.3 * rng.normal(size=(4, 30, 6))
    means = views.mean(0)
    inside = (views - means).reshape(-1, 6)
    within = inside.T @ inside / len(inside) + 1e-4 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    centred = means - means.mean(0)
    eigenvalues = np.linalg.eigvalsh(root @ (centred.T @ centred / 30) @ root)
    share = eigenvalues / eigenvalues.sum() + 1e-7
    assert lidar(views) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    # Ten directions that tell images apart, and ten that only views fill: RankMe counts all, LiDAR ten.
    images, noise = rng.normal(size=(1, 400, 10)), rng.normal(size=(4, 400, 10))
    mixed = np.concatenate([np.repeat(images, 4, 0), noise], -1)
    assert rankme(mixed[0]) > 19
    assert 9 < lidar(mixed) < 11
    for bad in (views[:1], views[:, :1]):
        with pytest.raises(UserError, match="expected two or more of each"):
            lidar(bad)


@pytest.mark.parametrize("size", [1e-8, 1e6, 1e10])
def test_lidar_of_features_of_any_size_is_defined(size):
    """Those of a run that diverges grow long before its loss is infinite."""
    views = size * np.random.default_rng(0).normal(size=(2, 40, 100))
    assert 1 <= lidar(views) < 40


def test_the_report_draws_rank_and_spread_by_epoch_where_an_arm_is_label_free():
    def row(strategy, seed, phase, **metrics):
        curve = [{"epoch": n, "loss": 1.0, **{k: v + n for k, v in metrics.items()}} for n in range(2)]
        return Row(strategy, seed, "dapt", phase, curve=curve)

    spectrum = {"rankme": 40.0, "alpha_req": 1.0, "feature_sd": 0.2, "lidar": 9.0}
    rows = [row("partial", seed, phase, **spectrum) for seed in (0, 1) for phase in ("head", "partial")]
    records = SimpleNamespace(strategies=["partial", "labelled"], seeds=[0, 1], rows=rows)
    figure = curves.spectrum_curves(records)
    assert [axes.get_title() for axes in figure.axes] == list(curves.SPECTRUM.values())
    for axes in figure.axes:
        (mean,) = [line for line in axes.lines if line.get_label() == "partial"]
        assert list(mean.get_xdata()) == [1, 2, 3, 4]  # both phases end to end
    del spectrum["lidar"]  # of phases without cached views
    records.rows = [row("partial", 0, "partial", **spectrum), row("labelled", 0, "partial")]
    assert len(curves.spectrum_curves(records).axes) == 3
    records.rows = [row("labelled", 0, "partial")]
    assert curves.spectrum_curves(records) is None


@pytest.mark.long
def test_the_epoch_of_the_lowest_held_out_loss_is_kept_without_labels(tmp_path, monkeypatch):
    flags = (
        f"--config={ROOT}/tests/configs/tiny_study.py",
        "--config.strategies=simplified",
        "--config.adapt.objective=reconstruct",
        "--config.adapt.epochs=6",
        "--config.adapt.early_stopping_patience=1",
        "--config.adapt.checkpoint_every=1",
        "--config.transfer.protocols=linear",
        f"--workdir={tmp_path}",
    )
    # Which epoch is best must not depend on how a machine rounds: what an epoch adds is larger than what it learns.
    added, evaluate = iter([100, 200, 0, 300, 200]), LabelFreeEvaluator.__call__

    def with_a_known_minimum(*args):
        metrics = evaluate(*args)
        return {**metrics, "val_loss": metrics["val_loss"] + next(added)}

    monkeypatch.setattr(LabelFreeEvaluator, "__call__", with_a_known_minimum)
    assert command.run(*flags) == 0
    folder = tmp_path / "checkpoints" / "simplified-seed0"
    about = json.loads((folder / "adapted.json").read_text())
    (row,) = [row for row in command.rows(tmp_path / "ledger.jsonl") if row["stage"] == "dapt"]
    losses = [point["val_loss"] for point in row["curve"]]
    assert about["chosen_epoch"] == int(np.argmin(losses)) + 1 == 3
    assert about["epochs"] == len(losses) == 5
    assert about["label_free"]
    kept = [safetensors.numpy.load_file(file) for file in sorted((folder / "epochs").glob("*.safetensors"))]
    adapted = safetensors.numpy.load_file(folder / "adapted.safetensors")
    equal = [all(np.array_equal(each[name], adapted[name]) for name in adapted) for each in kept]
    assert equal == [number == about["chosen_epoch"] - 1 for number in range(len(losses))]
    assert not (folder / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus.val_fraction": 0.0}, r"needs images to watch; expected corpus.val_fraction above 0"),
        ({"checkpoint_selection.score": "rankme"}, r"score='rankme' both choose the checkpoint"),
    ],
)
def test_early_stopping_of_adaptation_that_cannot_work_is_one_line(change, said):
    config = settings.default()
    config.adapt.early_stopping_patience = 2
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=said):
        settings.resolve(config)
