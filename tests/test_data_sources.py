import dataclasses
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dapt_jax.data.sources import load
from dapt_jax.errors import MissingLabelsError, UserError


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("x/1.png", 10), ("y/2.png", 20)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(np.full((10, 10), shade, np.uint8)).save(tmp_path / name)
    (tmp_path / "manifest.csv").write_text("image,label,patient\nx/1.png,x,P1\ny/2.png,y,P2\n")
    return tmp_path


def test_a_manifest_spec_reads_below_the_data_folder(folder):
    spec = {
        "kind": "manifest",
        "path": "manifest.csv",
        "classes": ["y", "x"],
        "crop": 0,
        "where": "",
        "group": None,
    }
    data = load(spec, data_dir=folder, image_size=8)
    assert data.classes == ("y", "x")
    assert data.labels.tolist() == [1, 0]
    assert data.groups.tolist() == ["P1", "P2"]
    assert data.images.size == 8


def test_a_set_may_have_a_size_of_its_own(folder):
    spec = {"kind": "manifest", "path": "manifest.csv", "image_size": 20}
    assert load(spec, data_dir=folder, image_size=8).images.size == 20
    for wrong in (0, "20", -1, True):
        with pytest.raises(UserError, match=r"image_size is .*; expected a side in pixels"):
            load({**spec, "image_size": wrong}, data_dir=folder, image_size=8)


def test_a_folder_spec_may_have_an_absolute_path(folder):
    (folder / "x/3.png").write_bytes(b"")
    spec = {"kind": "folder", "path": str(folder)}
    data = load(spec, data_dir=None, image_size=8, on_bad_image="skip")
    assert data.class_counts() == {"x": 1, "y": 1}
    assert data.skipped == 1
    with pytest.raises(UserError, match=r"1 of 3 images .* cannot be read, first: x/3\.png"):
        load(spec, data_dir=None, image_size=8)


def test_a_phantom_spec_needs_no_data_folder():
    data = load({"kind": "phantoms", "name": "external", "n": 5}, data_dir=None, image_size=24, seed=2)
    assert len(data) == 5
    assert data.images.names[0] == "phantom/external/2/000000"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "manfest"}, r"no kind 'manfest'; did you mean 'manifest' or 'images'\?"),
        ({}, "no kind ''; valid: 'manifest', 'folder', 'images', 'phantoms', 'textures', 'tfds'"),
        ({"kind": "manifest", "pth": "a"}, r"kind 'manifest' has no key 'pth'; did you mean 'path'\?"),
        ({"kind": "phantoms", "where": "a=b"}, "kind 'phantoms' has no key 'where'"),
        ({"kind": "manifest"}, "kind 'manifest' needs a path"),
        ({"kind": "phantoms"}, "kind 'phantoms' needs a name"),
        ({"kind": "manifest", "path": "a.csv"}, r"a\.csv is relative .* pass --config\.data_dir=FOLDER"),
    ],
)
def test_a_wrong_spec_is_explained(spec, message):
    with pytest.raises(UserError, match=message):
        load(spec, data_dir=None, image_size=8)


def test_a_data_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"no folder .*nowhere; pass the folder that holds a\.csv as --config"
    ):
        load({"kind": "manifest", "path": "a.csv"}, data_dir=tmp_path / "nowhere", image_size=8)


def test_a_prepared_tfds_set_is_read(shared_data):
    data = load({"kind": "tfds", "path": "tfds_toy", "split": "train"}, data_dir=shared_data, image_size=16)
    assert data.class_counts() == {"a": 4, "b": 4}
    assert set(data.columns["split"]) == {"train"}
    assert data.images.batch(range(8)).shape == (8, 16, 16, 3)
    only = {"kind": "tfds", "path": "tfds_toy/1.0.0", "drop_classes": ("a",)}
    assert load(only, data_dir=shared_data, image_size=16).class_counts() == {"b": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tran"}, r"no split 'tran'; did you mean 'train'\?"),
        ({"label": "lable"}, r"no feature 'lable'; did you mean 'label'\?"),
        ({"classes": ("a",)}, r"label 'b' \(\d+ images\) is not in classes"),
        ({"path": "wbc"}, "wbc: no prepared TFDS set; expected a folder with dataset_info.json"),
    ],
)
def test_a_wrong_tfds_spec_is_explained(shared_data, options, message):
    with pytest.raises(UserError, match=message):
        load({"kind": "tfds", "path": "tfds_toy", **options}, data_dir=shared_data, image_size=16)


def test_masks_of_a_tfds_set_are_read_with_or_without_labels(shared_data, monkeypatch):
    real = tfds.builder_from_directory
    rng = np.random.default_rng(0)
    drawn, lacking = rng.integers(0, 3, (8, 16, 16, 1)), set()

    def builder(folder):
        made = real(folder)
        features = {**made.info.features, "segmentation_mask": None, "other": None}
        features = {name: feature for name, feature in features.items() if name not in lacking}
        info = types.SimpleNamespace(
            file_format=made.info.file_format, features=features, splits=made.info.splits, name="toy"
        )
        examples = [
            {**example, "segmentation_mask": mask, "other": mask[:8]}
            for example, mask in zip(made.as_data_source("train"), drawn, strict=True)
        ]
        return types.SimpleNamespace(info=info, as_data_source=lambda part: examples)

    monkeypatch.setattr(tfds, "builder_from_directory", builder)
    spec = {"kind": "tfds", "path": "tfds_toy", "mask": "segmentation_mask", "segments": ("back", "a", "b")}
    data = load(spec, data_dir=shared_data, image_size=16)
    np.testing.assert_array_equal(data.targets, drawn[..., 0])
    assert data.class_counts() == {"a": 4, "b": 4}
    with pytest.raises(UserError, match="no feature 'lable'; did you mean 'label'"):
        load({**spec, "label": "lable"}, data_dir=shared_data, image_size=16)
    with pytest.raises(UserError, match=r"the mask of toy/train/.* holds the value 2; expected 0 to 1"):
        load({**spec, "segments": ("back", "a")}, data_dir=shared_data, image_size=16)
    with pytest.raises(UserError, match=r"train\[0\]: mask is int64 \[8, 16, 1\], expected whole numbers"):
        load({**spec, "mask": "other"}, data_dir=shared_data, image_size=16)
    with pytest.raises(UserError, match="no feature 'segmentation'; did you mean 'segmentation_mask'"):
        load({**spec, "mask": "segmentation"}, data_dir=shared_data, image_size=16)
    lacking.add("label")
    alone = load(spec, data_dir=shared_data, image_size=16)
    np.testing.assert_array_equal(alone.masks, data.masks)


@pytest.mark.parametrize("unlabelled", [2, 8])
def test_a_tfds_set_without_labels_is_refused_but_for_what_needs_none(shared_data, monkeypatch, unlabelled):
    real = tfds.builder_from_directory

    def builder(folder):
        made = real(folder)
        examples = [
            {**example, "label": -1} if row < unlabelled else example
            for row, example in enumerate(made.as_data_source("train"))
        ]
        return types.SimpleNamespace(info=made.info, as_data_source=lambda part: examples)

    monkeypatch.setattr(tfds, "builder_from_directory", builder)
    spec = {"kind": "tfds", "path": "tfds_toy", "split": "train"}
    message = rf"tfds_toy.*: {unlabelled} of 8 examples of split 'train' have no label \(-1\); expected one for each"
    with pytest.raises(MissingLabelsError, match=message):
        load(spec, data_dir=shared_data, image_size=16)
    assert len(load(spec, data_dir=shared_data, image_size=16, labels=False)) == 8


def test_a_negative_label_is_refused_not_counted_from_the_last_class():
    data = load({"kind": "phantoms", "name": "corpus", "n": 6}, data_dir=None, image_size=16)
    labels = np.array([0, 1, -1, 2, -1, 0])
    with pytest.raises(
        UserError, match=r"2 of 6 labels are negative, first: -1 of .*; expected class numbers"
    ):
        dataclasses.replace(data, labels=labels)


def test_reading_tfds_imports_no_tensorflow(shared_data):
    code = (
        "import sys; from dapt_jax.data.sources import load\n"
        f"load({{'kind': 'tfds', 'path': {str(shared_data / 'tfds_toy')!r}}}, data_dir=None, image_size=16)\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_values_of_masks_are_named_checked_and_merged():
    spec = {"kind": "phantoms", "name": "development", "n": 6}
    parts = load({**spec, "segments": ("background", "cytoplasm", "nucleus")}, data_dir=None, image_size=32)
    cells = load({**spec, "segments": "background,cell,cell"}, data_dir=None, image_size=32)
    assert (parts.segments, cells.segments) == (
        ("background", "cytoplasm", "nucleus"),
        ("background", "cell"),
    )
    assert (parts.targets.dtype, parts.targets.shape) == (np.uint8, (6, 32, 32))
    np.testing.assert_array_equal(cells.targets, parts.targets > 0)
    np.testing.assert_array_equal(parts.take([4, 1]).targets, parts.targets[[4, 1]])
    assert parts.fingerprint() != cells.fingerprint()
    with pytest.raises(
        UserError, match=r"the mask of \S+ holds the value 2; expected 0 to 1, one for each of"
    ):
        load({**spec, "segments": ("background", "cell")}, data_dir=None, image_size=32)


class _Builder:
    """A set of TFDS's catalogue, seen from outside: preparing it puts a prepared set into the folder."""

    def __init__(self, name, data_dir, file_format):
        assert (name, file_format) == ("toy", "array_record")
        self.data_path = Path(data_dir) / name / "1.0.0"

    def download_and_prepare(self):
        shutil.copytree(self.prepared / "1.0.0", self.data_path)


def test_a_tfds_set_is_prepared_by_name_once(shared_data, tmp_path, monkeypatch):
    spec = {"kind": "tfds", "path": str(tmp_path), "dataset": "toy"}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"does not hold toy prepared.* takes TensorFlow; pip install 'dapt_jax\[tfds\]'"
    ):
        load(spec, data_dir=None, image_size=16)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "TensorFlow is there")
    monkeypatch.setattr(_Builder, "prepared", shared_data / "tfds_toy", raising=False)
    monkeypatch.setattr("tensorflow_datasets.builder", _Builder)
    assert load(spec, data_dir=None, image_size=16).class_counts() == {"a": 4, "b": 4}
    monkeypatch.undo()  # what is there needs neither TensorFlow nor a catalogue
    assert len(load(spec, data_dir=None, image_size=16)) == 8


def test_a_set_that_tfds_does_not_know_or_cannot_prepare_is_one_line(tmp_path, monkeypatch):
    spec = {"kind": "tfds", "path": str(tmp_path), "dataset": "colorectal_histologie"}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "TensorFlow is there")

    def builder(error):
        def fail(*_, **__):
            raise error

        return fail

    unknown = tfds.core.registered.DatasetNotFoundError("never heard of it")
    monkeypatch.setattr("tensorflow_datasets.builder", builder(unknown))
    monkeypatch.setattr("tensorflow_datasets.list_builders", lambda: ["mnist", "colorectal_histology"])
    with pytest.raises(
        UserError, match=r"no set 'colorectal_histologie' in TFDS; did you mean 'colorectal_histology'"
    ):
        load(spec, data_dir=None, image_size=16)
    monkeypatch.setattr("tensorflow_datasets.builder", builder(ConnectionError("no route\nto host")))
    with pytest.raises(UserError, match=r"colorectal_histologie cannot be prepared \(no route to host\)"):
        load(spec, data_dir=None, image_size=16)


def test_tensorflow_prepares_a_set_that_the_reader_then_reads(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing takes TensorFlow, the extra tfds")
    code = f"""
import numpy as np, tensorflow_datasets as tfds
class NamedToy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = {{"image": tfds.features.Image(shape=(16, 16, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples()}}
    def _generate_examples(self):
        for row in range(6):
            yield row, {{"image": np.full((16, 16, 1), row, np.uint8), "label": row % 2}}
from dapt_jax.data.sources import load
data = load({{"kind": "tfds", "path": {str(tmp_path)!r}, "dataset": "named_toy"}}, data_dir=None, image_size=16)
assert data.class_counts() == {{"a": 3, "b": 3}}, data.class_counts()
assert sorted(data.images.batch(range(6))[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4, 5]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    again = load(
        {"kind": "tfds", "path": str(tmp_path), "dataset": "named_toy"}, data_dir=None, image_size=16
    )
    assert len(again) == 6


def test_paths_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for path, data_dir in (
        ("~/manifest.csv", None),
        ("manifest.csv", "~"),
        ("~/manifest.csv", "~/elsewhere"),
    ):
        assert len(load({"kind": "manifest", "path": path}, data_dir=data_dir, image_size=16)) == 2
