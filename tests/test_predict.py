"""Target models on new images: the study's own predictions are the oracle."""

import csv
import dataclasses
import shutil
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import dapt_jax as dj
from dapt_jax.data import masks
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.framing import Framing
from dapt_jax.data.plane import Plane, Window
from dapt_jax.errors import UserError
from dapt_jax.inference import deploy, inputs, results, stream, target_model
from dapt_jax.inference.predictor import Ensemble, Outputs
from dapt_jax.inference.target_model import Reading
from dapt_jax.losses import LOSSES, SEGMENTATION_LOSSES
from dapt_jax.models import registry
from dapt_jax.models.segmenter import Segmenter
from dapt_jax.records import overlays, samples
from dapt_jax.settings import StrategySpec, default, resolve
from dapt_jax.study import plan, prepare, saliency, strategies, target_models
from dapt_jax.study.tasks import Task
from dapt_jax.weights import locate
from dapt_jax.weights.paths import flatten, unflatten
from tests import command
from tests import medical_files as write

SIDE = 32
CELLS = {"kind": "phantoms", "name": "development", "n": 40}
SEGMENTS = ("background", "cytoplasm", "nucleus")
CLASSES = dj.load_dataset("phantoms", name="external", n=24, image_size=SIDE)


def study_config():
    """Two seeds of heads on the first block of an encoder without adaptation; all models are kept."""
    config = default()
    config.strategies, config.seeds, config.model.image_size = ("cut",), (0, 1), SIDE
    config.custom_strategies.cut = {"cut_after": "stage1/block1"}
    config.tasks.cells = {"development": CELLS, "external": {**CELLS, "name": "external", "n": 24}}
    config.transfer.keep, config.transfer.folds = "all", 2
    config.transfer.protocols = ("linear", "mlp_small")
    config.transfer.head.epochs, config.transfer.head.early_stopping = 3, True
    config.cache.memory_mb, config.cache.disk_mb = 64, 0
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    dj.run_study(study_config(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same with networks that are fine-tuned, and with decoders for masks; one seed."""
    config = study_config()
    config.seeds, config.transfer.protocols = (0,), ("finetune",)
    config.tasks.masks = {"development": {**CELLS, "segments": SEGMENTS, "n": 16}}
    finetune, segmentation = config.transfer.finetune, config.transfer.segmentation
    finetune.epochs = finetune.head_epochs = segmentation.epochs = segmentation.decoder_epochs = 1
    finetune.folds = segmentation.folds = 2
    segmentation.protocols = ("frozen",)
    folder = tmp_path_factory.mktemp("trained")
    dj.run_study(config, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(24):
        Image.fromarray(CLASSES.images[number]).save(folder / f"{number:02d}.png")
    return folder


def models(workdir, task, protocol):
    return workdir / "models" / task / f"cut-{protocol}"


def predict(*flags):
    return command.run("--config.mode=predict", *flags)


def of_linear_heads(study, images, out):
    """Flags that predict images by the linear heads of a study."""
    return (
        f"--config.predict.model={models(study, 'cells', 'linear')}",
        f"--config.predict.images={images}",
        f"--workdir={out}",
    )


def table(folder):
    with (folder / "predict" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_external(workdir, protocol, seeds):
    found = dj.load_predictor(models(workdir, "cells", protocol))(CLASSES.images.batch(range(24)))
    stored = []
    for seed in seeds:
        with np.load(workdir / "predictions" / f"cut-seed{seed}" / "cells-external.npz") as file:
            stored.append(file[f"probability/{protocol}"])
    np.testing.assert_allclose(found.probabilities, np.mean(stored, 0), atol=2e-5)
    assert found.classes == CLASSES.classes
    assert (found.spread > 0).any()


def check_held_out(workdir, protocol, seed):
    data = dj.load_dataset("phantoms", name="development", n=40, image_size=SIDE)
    with np.load(workdir / "predictions" / f"cut-seed{seed}" / "cells-development.npz") as file:
        stored = file[f"probability/{protocol}"]
    files = target_model.find([models(workdir, "cells", protocol)])
    read = [target_model.read(file) for file in files if f"seed{seed}" in file.name]
    members = [one_member(model, number) for model in read for number in range(len(model.members))]
    assert [each.about.folds for each in members] == [(0,), (1,)]
    for model, (_, rows) in zip(members, Task("cells", data, {}).folds(2, seed), strict=True):
        found = Ensemble([model])(data.images.batch(rows)).probabilities
        np.testing.assert_allclose(found, stored[rows], atol=2e-5)


@pytest.mark.parametrize("protocol", ["linear", "mlp_small"])
def test_heads_predict_what_the_study_predicted(workdir, protocol):
    check_external(workdir, protocol, (0, 1))
    check_held_out(workdir, protocol, 1)


@pytest.mark.long
def test_fine_tuned_networks_predict_what_the_study_predicted(trained):
    check_external(trained, "finetune", (0,))
    check_held_out(trained, "finetune", 0)


def one_member(model, number):
    temperatures = model.about.temperatures[number : number + 1]
    folds = model.about.folds[number : number + 1]
    about = dataclasses.replace(model.about, folds=folds, temperatures=temperatures)
    return dataclasses.replace(model, about=about, members=(model.members[number],))


@pytest.mark.long
def test_masks_are_those_that_the_study_shows(trained):
    (samples,) = overlays.read(trained)
    (path,) = target_model.find([models(trained, "masks", "frozen")])
    model = target_model.read(path)
    assert len(model.members) == 2
    ensemble = Ensemble([one_member(model, 0)])
    found = ensemble.decide(ensemble(samples.images).probabilities)
    np.testing.assert_array_equal(found, samples.predicted)


def test_a_csv_that_was_cut_anywhere_ends_as_one_that_was_not(workdir, images, tmp_path):
    flags = (
        f"--config.predict.model={models(workdir, 'cells', 'linear')}",
        f"--config.predict.images={images}",
        "--config.predict.batch_size=8",
    )
    assert predict(*flags, f"--workdir={tmp_path / 'whole'}") == 0
    whole = (tmp_path / "whole" / "predict" / "predictions.csv").read_bytes()
    rows = table(tmp_path / "whole")
    assert [row["image"] for row in rows] == [f"{number:02d}.png" for number in range(24)]
    expected = dj.load_predictor(models(workdir, "cells", "linear"))(CLASSES.images.batch(range(24)))
    found = np.array([[float(row[f"p_{name}"]) for name in expected.classes] for row in rows])
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-5)
    for share in (0.0, 0.4, 0.73, 1.0):
        other = tmp_path / f"cut{share}"
        shutil.copytree(tmp_path / "whole", other)
        file = other / "predict" / "predictions.csv"
        file.write_bytes(whole[: int(share * len(whole))])
        assert predict(*flags, f"--workdir={other}") == 0
        assert file.read_bytes() == whole


def test_names_are_no_formulas_and_images_that_cannot_be_read_have_a_row(workdir, images, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "00.png", folder / "=cmd().png")
    (folder / "torn.png").write_bytes((images / "01.png").read_bytes()[:200])
    noise = np.random.default_rng(0).integers(0, 256, (200, 300), np.uint8)
    Image.fromarray(noise).save(folder / "grey.png")
    flags = of_linear_heads(workdir, folder, tmp_path / "out")
    assert predict(*flags) == 2
    assert "torn.png" in (line := capsys.readouterr().err)
    assert "data.on_bad_image=skip" in line
    assert predict(*flags, "--config.data.on_bad_image=skip") == 0
    first, grey, torn = table(tmp_path / "out")
    assert first["image"] == "'=cmd().png"
    assert not first["unlike"]
    assert "training images are in colour" in grey["unlike"]
    assert "times as far" in grey["unlike"]
    assert torn["unlike"].startswith("unreadable: ")
    assert not torn["predicted"]
    more = (
        "--config.data.on_bad_image=skip",
        "--config.predict.unlike=error",
        f"--workdir={tmp_path / 'strict'}",
    )
    assert predict(*flags[:2], *more) == 2
    assert "grey.png: unlike the training images" in capsys.readouterr().err


def test_the_memory_that_an_image_may_take_is_that_of_the_setting(workdir, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (900, 900)).save(tmp_path / "in" / "large.png")
    flags = of_linear_heads(workdir, tmp_path / "in", tmp_path / "out")
    assert predict(*flags, "--config.data.max_image_mb=1") == 2
    assert "the limit for decoded data is 0.000977 GiB" in capsys.readouterr().err
    assert predict(*flags) == 0


def test_heads_that_stop_early_cost_what_was_planned(workdir):
    ready = prepare.prepare(resolve(study_config()))
    planned = plan.transfer_flops(ready, ready.arms[0], ready.tasks[0])
    spent = {row["phase"]: row["model_flops"] for row in command.rows(workdir / "ledger.jsonl")}
    assert spent["cells/mlp_small"] == planned["mlp_small"]
    config = study_config()
    config.transfer.head.early_stopping = False
    ready = prepare.prepare(resolve(config))
    assert plan.transfer_flops(ready, ready.arms[0], ready.tasks[0])["mlp_small"] < planned["mlp_small"] / 2
    config.transfer.head.early_stopping = config.transfer.head.score_every_epoch = True
    with pytest.raises(UserError, match="expected one of the two"):
        resolve(config)


def test_calibration_softens_and_keeps_the_order(workdir, images, tmp_path):
    model = models(workdir, "cells", "linear")
    plain, calibrated = (dj.load_predictor(model, calibrate=each) for each in (False, True))
    pixels = CLASSES.images.batch(range(24))
    temperatures = [each.about.temperatures for each in plain.ensemble.models]
    assert all(0.05 <= value <= 20 for values in temperatures for value in values)
    np.testing.assert_allclose(calibrated(pixels).probabilities.sum(1), 1, atol=1e-5)
    assert not np.allclose(plain(pixels).probabilities, calibrated(pixels).probabilities, atol=1e-4)


def test_without_images_held_out_all_models_stay_and_none_is_calibrated(tmp_path, images, capsys):
    config = study_config()
    config.custom_strategies.stem = {"cut_after": "stem"}
    config.strategies, config.seeds, config.transfer.keep = ("cut", "stem"), (0,), "best"
    config.transfer.protocols = ("linear",)
    config.tasks.cells = {"train": CELLS, "test": {**CELLS, "name": "external", "n": 24}}
    dj.run_study(config, tmp_path / "study")
    assert {each.name for each in (tmp_path / "study" / "models" / "cells").iterdir()} == {
        "cut-linear",
        "stem-linear",
    }
    line = "cells: no strategy has a development score, so those of all strategies stay, as with transfer.keep=all"
    assert line in capsys.readouterr().out
    flags = of_linear_heads(tmp_path / "study", images, tmp_path / "out")
    assert predict(*flags, "--config.predict.calibrate=true") == 2
    assert "seed0.safetensors stores no temperature: no labelled development" in capsys.readouterr().err
    assert predict(*flags) == 0


def test_images_in_memory_are_checked(workdir):
    predictor = dj.load_predictor(models(workdir, "cells", "linear"))
    pixels = CLASSES.images.batch(range(3))
    as_floats = predictor(pixels.astype(np.float32) / 255).probabilities
    np.testing.assert_allclose(as_floats, predictor(pixels).probabilities, atol=1e-6)
    for wrong, words in (
        (np.zeros((2, 32, 32, 2), np.uint8), "expected .n, h, w, 3."),
        (np.full((2, 32, 32, 3), 255.0), "expected 0 to 1"),
        (np.zeros((2, 32, 32, 3), np.int64), "expected uint8"),
    ):
        with pytest.raises(UserError, match=words):
            predictor(wrong)


@pytest.mark.parametrize(
    ("model", "folder", "words"),
    [
        ("absent", "images", "absent: no such target model"),
        ("bare", "images", "--config.transfer.keep=best"),
        ("study", "images", "several tasks or strategies; expected one folder of"),
        ("linear", "empty", "empty: no images; expected .png"),
        ("linear", "imagse", "imagse: no such images; did you mean 'images'?"),
        ("linear", "empty.csv", "empty.csv: no images; expected rows that name images"),
        ("", "images", "predict.model names no target model, and"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_a_line(workdir, images, tmp_path, capsys, model, folder, words):
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "empty.csv").write_text("image,patient\n")
    places = {"study": workdir, "linear": models(workdir, "cells", "linear")}
    where = {"images": images}.get(folder, tmp_path / folder)
    assert (
        predict(
            f"--config.predict.model={places.get(model, tmp_path / model) if model else ''}",
            f"--config.predict.images={where}",
            f"--workdir={tmp_path / 'out'}",
        )
        == 2
    )
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def test_a_command_that_ended_before_its_first_image_does_not_hold_the_workdir(workdir, images, tmp_path):
    assert predict(*of_linear_heads(workdir, tmp_path / "imagse", tmp_path / "out")) == 2
    assert predict(*of_linear_heads(workdir, images, tmp_path / "out")) == 0
    assert len(table(tmp_path / "out")) == 24


def segmenter_model(side, axis=2):
    """A network of masks of random weights; of 336 pixels, a multiple of every side of the volume."""
    network = Segmenter(registry.build("efficientnet_lite0").truncate("stage1/block1"), 3)
    params, batch_stats = network.init(0)
    own = {name: params.pop(name) for name in [*params] if name not in ("stem", "stage1")}
    for name in [*batch_stats]:
        if name not in ("stem", "stage1"):
            own[name] = unflatten(flatten(own[name]) | flatten(batch_stats.pop(name)))
    about = target_model.About(
        "masks", "cut", "frozen", 0, (0,), "efficientnet_lite0", "stage1/block1", "float32",
        "dice_ce", dataclasses.asdict(SEGMENTATION_LOSSES["dice_ce"](3)), Reading(side, axis=axis),
        segments=SEGMENTS, decoder="unet", side=side,
    )  # fmt: skip
    return target_model.TargetModel(about, network.encoder, params, batch_stats, (own,))


ORIENTATIONS = [
    np.diag([2.0, 3.0, 4.0, 1]),
    np.array([[0, -2.0, 0, 5], [0, 0, 3.0, -7], [-4.0, 0, 0, 9], [0, 0, 0, 1]]),
]


@pytest.mark.parametrize("affine", ORIENTATIONS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_masks_of_volumes_lie_where_the_volume_lies(tmp_path, monkeypatch, affine, axis):
    """An ensemble that marks bright pixels marks the bright voxels, whatever the orientation of the file."""
    values = np.zeros((20, 24, 28), np.float32)
    values[3:11, 5:19, 8:22] = 1000
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    (tmp_path / "in").mkdir()
    image.to_filename(tmp_path / "in" / "scan.nii.gz")

    def bright(self, pixels, batch_size=0):
        inside = (pixels[..., :1] > 127).astype(np.float32)
        probabilities = np.concatenate([1 - inside, inside, 0 * inside], -1)
        return Outputs(probabilities, np.zeros(len(pixels)), np.full(len(pixels), np.nan))

    monkeypatch.setattr(Ensemble, "__call__", bright)
    segmenter_model(336, axis).write(tmp_path / "model.safetensors")
    config = default()
    config.mode, config.predict.model = "predict", (str(tmp_path / "model.safetensors"),)
    config.predict.images = str(tmp_path / "in")
    stream.run(resolve(config), tmp_path / "out")
    found = nibabel.load(tmp_path / "out" / "predict" / "masks" / "scan.nii.gz")
    np.testing.assert_array_equal(found.affine, image.affine)
    assert found.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(found.dataobj), (values > 500).astype(np.uint8))
    assert (
        len(table(tmp_path / "out"))
        == values.shape[int(np.flatnonzero(nibabel.io_orientation(affine)[:, 0] == axis)[0])]
    )


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0), (2, 3)])
def test_the_mask_of_a_volume_is_placed_as_the_volume_is(tmp_path, codes):
    """Also where the header names no coordinates: beside its image the mask is read back as it was written."""
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 3.0, 4.0, 1]))
    for name, code in zip(("sform", "qform"), codes, strict=True):
        getattr(image, f"set_{name}")(image.affine if code else None, code)
    image.to_filename(tmp_path / "scan.nii.gz")
    slice_ = Plane(tmp_path / "scan.nii.gz", 2)
    shown = np.random.default_rng(0).integers(0, 2, (5, 4)).astype(np.uint8)
    mask = results.VolumeMask(slice_.path, 2, tmp_path / "mask.nii.gz")
    mask.put(slice_, shown)
    mask.write()
    header = nibabel.load(mask.file).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == codes
    np.testing.assert_array_equal(nibabel.load(mask.file).affine, nibabel.load(slice_.path).affine)
    np.testing.assert_array_equal(masks.read(masks.place(Plane(mask.file, 2), slice_)), shown)


def test_weights_of_a_truncated_encoder_need_not_say_where(workdir, tmp_path):
    encoder = dj.load_encoder("efficientnet_lite0", "random", cut_after="stage2/block1")
    encoder.save(tmp_path / "cut.safetensors")
    again = dj.load_encoder("efficientnet_lite0", str(tmp_path / "cut.safetensors"))
    assert again.encoder.groups == encoder.encoder.groups
    target = target_model.find([models(workdir, "cells", "linear")])[0]
    of_target = dj.load_encoder("efficientnet_lite0", str(target))
    assert of_target.encoder.groups == ("stem", "stage1/block1")
    settings = resolve(study_config())
    settings = dataclasses.replace(settings, weights=str(tmp_path / "cut.safetensors"))
    fitted = locate.fitted(settings.weights, settings.model.encoder())
    assert strategies.resolve("full", fitted, settings).encoder.groups == encoder.encoder.groups
    spec = {"whole": StrategySpec(weights="imagenet", phases=())}
    settings = dataclasses.replace(settings, custom_strategies=spec)
    assert strategies.resolve("whole", fitted, settings).encoder.groups == settings.model.encoder().groups


def whole_model(seed=0):
    """A whole network with linear heads of two folds, of random weights of which no two are alike."""
    encoder = registry.build("resnet18")
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.uniform(0, 1, leaf.shape).astype(np.float32), encoder.init(0)
    )
    members = tuple(
        {
            "shift": rng.normal(size=512).astype(np.float32),
            "factor": rng.uniform(0.5, 2, 512).astype(np.float32),
            "layer0": {
                "kernel": 0.02 * rng.normal(size=(3, 512)).astype(np.float32),
                "bias": rng.normal(size=3).astype(np.float32),
            },
        }
        for _ in range(2)
    )
    about = target_model.About(
        "cells", "full", "linear", 0, (0, 1), "resnet18", encoder.groups[-1], "float32", "ce",
        dataclasses.asdict(LOSSES["ce"](3)), Reading(64), classes=("a", "b", "c"),
    )  # fmt: skip
    return target_model.TargetModel(about, encoder, *moved, members)


def test_programs_give_the_same_probabilities(tmp_path, workdir):
    model = target_model.read(target_model.find([models(workdir, "cells", "linear")])[0])
    assert (
        command.run("--config.mode=export", f"--config.predict.model={model.path}", f"--workdir={tmp_path}")
        == 0
    )
    folder = tmp_path / "export" / "cells" / "cut-linear" / model.path.stem
    pixels = CLASSES.images.batch(range(3))
    expected = Ensemble([model])(pixels).probabilities
    program = jax.export.deserialize(bytearray((folder / deploy.STABLEHLO).read_bytes()))
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-4)
    np.testing.assert_allclose(program.call(pixels[:1]), expected[:1], atol=1e-4)
    assert f"Images are RGB of {SIDE} x {SIDE} pixels" in (folder / "README.md").read_text()
    masks = segmenter_model(32)
    deploy.write_stablehlo(tmp_path / "masks.stablehlo", masks)
    program = jax.export.deserialize(bytearray((tmp_path / "masks.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(pixels), Ensemble([masks])(pixels).probabilities, atol=1e-4)


@pytest.mark.parametrize(("number", "words"), [(10, "2 members and ten crops of 24"), (1, "the central 24")])
def test_a_program_takes_the_crops_that_were_scored(tmp_path, workdir, number, words):
    model = target_model.read(target_model.find([models(workdir, "cells", "linear")])[0])
    model = dataclasses.replace(model, about=dataclasses.replace(model.about, side=24, crops=number))
    deploy.write(tmp_path, model)
    pixels = CLASSES.images.batch(range(3))
    program = jax.export.deserialize(bytearray((tmp_path / deploy.STABLEHLO).read_bytes()))
    np.testing.assert_allclose(program.call(pixels), Ensemble([model])(pixels).probabilities, atol=1e-4)
    assert words in (page := (tmp_path / "README.md").read_text())
    assert f"Images are RGB of {SIDE} x {SIDE} pixels" in page


def test_the_page_of_a_program_of_masks_says_that_scores_are_of_windows():
    masks = segmenter_model(48)
    masks = dataclasses.replace(masks, about=dataclasses.replace(masks.about, side=32))
    assert "means over windows that overlap by 0.5, the output is that of one" in deploy._page(masks)


def test_weights_of_timm_with_the_head_see_the_same(tmp_path):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    model = whole_model()
    files = deploy.write_timm(tmp_path, model)
    pixels = CLASSES.images.batch(range(3)).repeat(2, 1).repeat(2, 2)
    x = torch.from_numpy(np.asarray(model.encoder.preprocess(pixels))).permute(0, 3, 1, 2)
    found = []
    for file in files:
        network = timm.create_model("resnet18", num_classes=3).eval()
        network.load_state_dict({name: torch.from_numpy(each) for name, each in load_file(file).items()})
        with torch.no_grad():
            found.append(network(x).softmax(1).numpy())
    np.testing.assert_allclose(np.mean(found, 0), Ensemble([model])(pixels).probabilities, atol=1e-4)


def test_a_path_may_select_a_slice_as_a_table_does(tmp_path):
    """Any slice of a volume of the axis that the training images have; without an index a line asks for one."""
    values = np.random.default_rng(0).uniform(0, 1000, (20, 24, 28)).astype(np.float32)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / "scan.nii.gz")
    (tmp_path / "list.csv").write_text("image\nscan.nii.gz[0]\nscan.nii.gz[5]\n")
    reading = Reading(SIDE, axis=1)
    paths = [tmp_path / "scan.nii.gz[0]", f"{tmp_path}/scan.nii.gz[5]"]
    found = inputs.from_paths(paths, reading)
    (batch,) = inputs.batches(tmp_path / "list.csv", reading, 2)
    np.testing.assert_array_equal(found, inputs.read(batch, reading, 1).pixels)
    assert (found[0] != found[1]).any()
    with pytest.raises(UserError, match="holds 24 slices, expected one image per file; name one, 0 to 23"):
        inputs.from_paths([tmp_path / "scan.nii.gz"], reading)


def test_masks_beside_images_are_not_predicted_as_images(tmp_path, capsys):
    """As a corpus leaves them out; a file that is named by itself, or by a table, is what it is taken for."""
    named = ("a/p1.png", "a/p1_mask.png", "a/sub/p2.png", "a/x.png", "masks/p1.png", "masked.png")
    for name in named:
        write.image(tmp_path / name, np.zeros((SIDE, SIDE), np.uint8))

    def found(place):
        return [item.name for batch in inputs.batches(place, Reading(SIDE), 4) for item in batch.items]

    assert found(tmp_path) == ["a/p1.png", "a/sub/p2.png", "a/x.png", "masked.png"]
    assert "left out 2 masks by their names, first: a/p1_mask.png" in capsys.readouterr().out
    assert found(tmp_path / "a" / "p1_mask.png") == ["p1_mask.png"]
    assert found(tmp_path / "masks") == ["p1.png"]
    assert "left out" not in capsys.readouterr().out


def test_predictions_among_their_images_are_not_predicted_themselves(tmp_path):
    """Masks and overlays of the first images are written while others are still listed."""
    for number in range(12):
        write.image(tmp_path / f"a{number:02d}.png", CLASSES.images[number])
    segmenter_model(SIDE).write(tmp_path / "model.safetensors")
    flags = (
        f"--config.predict.model={tmp_path / 'model.safetensors'}",
        f"--config.predict.images={tmp_path}",
        f"--workdir={tmp_path / 'out'}",
        "--config.predict.batch_size=2",
    )
    for _ in range(2):  # started again, it goes on behind the last image
        assert predict(*flags) == 0
        assert [row["image"] for row in table(tmp_path / "out")] == [f"a{n:02d}.png" for n in range(12)]
    assert list((tmp_path / "out" / "predict" / "overlays").iterdir())


def test_a_table_names_images_row_by_row(images, tmp_path):
    lines = "".join(f"{number:02d}.png;P{number}\n" for number in range(5))
    (images / "list.csv").write_text(f"file_name;patient\n{lines}")
    found = list(inputs.batches(images / "list.csv", Reading(SIDE), 2))
    (images / "list.csv").unlink()
    assert [len(batch.items) for batch in found] == [2, 2, 1]
    assert found[2].items[0].name == "04.png"


@pytest.mark.parametrize(
    ("windows", "kept"),
    [(((0, 9), (0, 9)), (0, 9, False, False)), (((0, 9), (0, 5)), ()), (((0, 9), None), ())],
)
def test_volumes_are_sliced_as_in_training_whatever_their_windows(tmp_path, windows, kept):
    """A development set may join sources with windows of their own; a window of some is none of the set."""
    write.nifti(tmp_path / "scan.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    write.image(tmp_path / "plain.png", np.zeros((4, 4), np.uint8))
    shown = [Window(*each) if each else None for each in windows]
    slices = [Plane(tmp_path / "scan.nii", k, axis=1, window=each) for k, each in enumerate(shown)]
    plain = tmp_path / "plain.png"
    store = ImageStore.from_files([*slices, Plane(plain, window=shown[1]) if shown[1] else plain], 4)
    data = Dataset("ct", store, np.array([0, 1, 1]), ("a", "b"), np.array(["P1", "P2", "P3"]))
    reading = target_models.reading_of(data)
    assert (reading.axis, reading.window) == (1, kept)


def test_models_that_show_other_values_as_white_are_no_ensemble():
    model = segmenter_model(SIDE)
    ranges = [{"16-bit grey": (0.0, 2.0**bits - 1, f"{bits} bits", bits)} for bits in (12, 16)]
    several = [
        dataclasses.replace(
            model,
            about=dataclasses.replace(
                model.about, reading=dataclasses.replace(model.about.reading, ranges=each)
            ),
        )
        for each in ranges
    ]
    with pytest.raises(
        UserError, match=r"reads images with ranges .*65535.*4095.*expected models that read images alike"
    ):
        Ensemble(several)


def test_images_of_a_table_with_equal_ends_have_masks_of_their_own(tmp_path):
    """A table lies among lists, and names images beside its folder and others further up."""
    names = ["b/1.png", "../b/1.png", "../../b/1.png", "b/1.jpg"]
    places = [results.place(tmp_path, name, ".png") for name in names]
    assert len(set(places)) == len(names)
    assert all(place.resolve().is_relative_to(tmp_path.resolve()) for place in places)
    same = ("./b/1.png", "b\\1.png", "b//1.png")
    assert {results.place(tmp_path, name, ".png") for name in same} == {places[0]}


@pytest.mark.parametrize(
    "framing", [Framing(8, 10), Framing(8, resize="crop"), Framing(8, resize="pad")], ids=str
)
def test_the_mask_of_a_file_is_background_where_the_model_saw_nothing(framing):
    whole = results.at_size(np.ones((8, 8, 1), np.float32), (20, 30), framing)[..., 0]
    top, left, bottom, right = framing.box((20, 30))
    assert whole.shape == (20, 30)
    assert whole[top:bottom, left:right].all()
    assert whole.sum() == (bottom - top) * (right - left)


def assert_drops_of(predictor, found, places, **tolerance):
    """The saliency of these examples is how far the probability by a kept model drops."""
    for place in places:
        image = CLASSES.images.batch([int(found.names[place])])[0]
        column = predictor.classes.index(found.predicted[place])
        drops = saliency.drops(
            lambda images, column=column: predictor(images).probabilities[:, column], image
        )
        assert found.saliency[place] == pytest.approx(drops, **tolerance)


def test_examples_have_the_saliency_of_the_model_that_is_kept(workdir):
    found = samples.read(samples.Examples, samples.examples_path(workdir, "cut", 0, "cells", "external"))
    few = np.flatnonzero(np.isfinite(found.saliency).all((1, 2)))
    assert [(found.kinds[few] == kind).sum() for kind in samples.KINDS] == [
        min(2, (found.kinds == kind).sum()) for kind in samples.KINDS
    ]
    predictor = dj.load_predictor(workdir / "models/cells/cut-linear/seed0.safetensors")
    assert_drops_of(predictor, found, few, abs=1e-5)
    assert np.abs(found.saliency[few]).max() > 1e-3
    own = samples.read(samples.Examples, samples.examples_path(workdir, "cut", 0, "cells", "development"))
    count = len(few) + np.isfinite(own.saliency).all((1, 2)).sum()
    (row,) = [each for each in command.rows(workdir / "ledger.jsonl") if each["phase"] == "cells/saliency"]
    assert (row["seed"], row["images"], row["model_flops"]) == (0, count * (saliency.GRID**2 + 1), 0)
    features = next(
        each for each in command.rows(workdir / "ledger.jsonl") if each["phase"] == "cells/features"
    )
    per_image = features["model_flops"] // features["images"]
    assert row["hardware_flops"] == row["images"] * per_image
    page = (workdir / "report.html").read_text()
    assert "Saliency is by occlusion" in page
    assert page.count("<strong>saliency</strong>") == count


@pytest.mark.long
def test_examples_of_fine_tuned_networks_have_the_saliency_of_the_networks_that_predicted_them(trained):
    found = samples.read(samples.Examples, samples.examples_path(trained, "cut", 0, "cells", "external"))
    assert found.protocol == "finetune"
    few = np.flatnonzero(np.isfinite(found.saliency).all((1, 2)))
    predictor = dj.load_predictor(models(trained, "cells", "finetune"))
    assert_drops_of(predictor, found, few[:2], abs=2e-5)
    assert np.abs(found.saliency[few]).max() > 1e-4
    own = samples.read(samples.Examples, samples.examples_path(trained, "cut", 0, "cells", "development"))
    held = np.isfinite(own.saliency).all((1, 2)).sum()
    (row,) = [each for each in command.rows(trained / "ledger.jsonl") if each["phase"] == "cells/saliency"]
    passes = saliency.GRID**2 + 1
    assert row["images"] == passes * (2 * len(few) + held)  # by both folds, or by the one that holds it out
    assert row["model_flops"] == 0
    phases = [
        each for each in command.rows(trained / "ledger.jsonl") if "cells/finetune/fold" in each["phase"]
    ]
    assert phases
    assert row["hardware_flops"] % row["images"] == 0
    assert "Saliency is by occlusion" in (trained / "report.html").read_text()


@pytest.mark.parametrize(("full", "said"), [((0.8, 0.9), True), ((0.6, 0.7), False)])
def test_models_of_a_strategy_that_seeds_made_best_too_late_are_missed_with_a_line(
    tmp_path, capsys, full, said
):
    folder = tmp_path / "models" / "t" / "none-linear"
    folder.mkdir(parents=True)
    (folder / f"seed0{target_model.SUFFIX}").touch()
    values = {"none": (0.7, 0.8), "full": full}
    records = SimpleNamespace(
        strategies=list(values), metric=lambda task: "auc", values=lambda strategy, *_: values[strategy]
    )
    transfer = SimpleNamespace(keep="best", protocols=("linear",))
    settings = SimpleNamespace(
        transfer_of=lambda task: transfer, report=SimpleNamespace(primary_of=lambda protocols: "linear")
    )
    task = SimpleNamespace(name="t", is_segmentation=False, scored="development")
    target_models._prune(SimpleNamespace(settings=settings), task, records, tmp_path)
    assert folder.is_dir()
    line = capsys.readouterr().out
    assert ("those of full-linear, whose mean is now the best, were removed" in line) is said
