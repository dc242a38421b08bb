import time

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.manifest import load_manifest
from dapt_jax.data.phantoms import LEUKOCYTES, SMEAR_OBJECTS, cells, load_phantoms, main
from dapt_jax.data.splits import grouped_holdout
from dapt_jax.errors import UserError


def test_an_image_depends_on_the_seed_and_its_number_alone():
    few, many = cells(7, size=32, seed=3), cells(20, size=32, seed=3)
    for short, long in zip(few, many, strict=True):
        np.testing.assert_array_equal(short, long[:7])
    assert (cells(7, size=32, seed=4).images != few.images).any()
    assert (cells(7, size=32, seed=3, stain=1).images != few.images).any()


def test_phantoms_have_the_promised_shapes_and_classes():
    drawn = cells(120, size=32)
    assert drawn.images.shape == (120, 32, 32, 3)
    assert drawn.images.dtype == np.uint8
    assert drawn.masks.shape == (120, 32, 32)
    assert set(np.unique(drawn.labels)) == set(range(len(LEUKOCYTES)))
    assert all(set(np.unique(mask)) == {0, 1, 2} for mask in drawn.masks)
    assert len(set(drawn.smears.tolist())) == 20


def test_a_lymphocytes_nucleus_fills_more_of_its_cell_than_a_neutrophils():
    drawn = cells(200, size=48)
    share = (drawn.masks == 2).sum(axis=(1, 2)) / (drawn.masks > 0).sum(axis=(1, 2))
    mean = {name: share[drawn.labels == label].mean() for label, name in enumerate(LEUKOCYTES)}
    assert mean["lymphocyte"] > mean["monocyte"] > mean["neutrophil"]


def test_nuclei_are_darker_than_the_cytoplasm_and_that_than_the_background():
    drawn = cells(60, size=48)
    brightness = [drawn.images[drawn.masks == part].mean() for part in range(3)]
    assert brightness[0] > brightness[1] > brightness[2] + 20


def test_no_smear_is_in_two_sets():
    sets = [
        load_phantoms(name, 30, 24, seed) for name in ("corpus", "development", "external") for seed in (0, 1)
    ]
    smears = [set(data.groups.tolist()) for data in sets]
    assert sum(map(len, smears)) == len(set.union(*smears))


def test_ready_made_sets_say_where_they_come_from():
    data = load_phantoms("corpus", 40, 24)
    assert data.classes == SMEAR_OBJECTS
    assert set(data.columns["source"]) == {"corpus"}
    assert data.images.names[12] == "phantom/corpus/0/000012"
    assert data.load_masks().shape == (40, 24, 24)
    assert data.fingerprint() == load_phantoms("corpus", 40, 24).fingerprint()
    assert data.fingerprint() != load_phantoms("corpus", 40, 24, seed=1).fingerprint()


def thumbnails(data: Dataset) -> np.ndarray:
    small = [
        Image.fromarray(data.images[index]).resize((8, 8), Image.Resampling.BOX) for index in range(len(data))
    ]
    return np.stack([np.asarray(image) for image in small]).reshape(len(data), -1) / 255


def test_mean_colours_solve_part_of_the_task_and_fail_on_the_other_stain():
    development, external = load_phantoms("development", 400, 48), load_phantoms("external", 200, 48)
    train, held = grouped_holdout(development.labels, development.groups, 0.25, seed=0)
    features, labels = thumbnails(development), development.labels
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced"))
    model.fit(features[train], labels[train])
    inside = balanced_accuracy_score(labels[held], model.predict(features[held]))
    outside = balanced_accuracy_score(external.labels, model.predict(thumbnails(external)))
    assert 0.4 < inside < 0.9
    assert outside < inside - 0.15


def test_written_phantoms_read_back_to_the_same_pixels(tmp_path, capsys):
    main(["--out", str(tmp_path), "--n", "8", "--size", "24", "--seed", "5"])
    assert "SYNTHETIC" in capsys.readouterr().out
    for name in ("corpus", "development", "external"):
        drawn = load_phantoms(name, 8, 24, seed=5)
        read = load_manifest(
            tmp_path / "manifest.csv", image_size=24, where=f"source={name}", classes=drawn.classes
        )
        np.testing.assert_array_equal(read.images.batch(range(8)), drawn.images.batch(range(8)))
        np.testing.assert_array_equal(read.load_masks(), drawn.load_masks())
        np.testing.assert_array_equal(read.labels, drawn.labels)
        np.testing.assert_array_equal(read.groups, drawn.groups)


def test_phantoms_are_drawn_fast_enough_to_need_no_cache():
    start = time.perf_counter()
    cells(60, size=96)
    # A tenth of what one idle core does: the test must hold on a loaded machine too.
    assert 60 / (time.perf_counter() - start) > 40


def test_wrong_requests_are_explained():
    with pytest.raises(UserError, match=r"no set 'developement'; did you mean 'development'\?"):
        load_phantoms("developement", 4, 24)
    with pytest.raises(UserError, match="no kind 'smears'; did you mean 'smear'"):
        cells(1, kind="smears")
    with pytest.raises(UserError, match="no stain 2; valid: 0, 1"):
        cells(1, stain=2)
    with pytest.raises(UserError, match="8 pixels are too few"):
        cells(1, size=8)
    with pytest.raises(UserError, match="n=-1"):
        load_phantoms("corpus", -1)
