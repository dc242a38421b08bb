"""`mode=embed`: the features of all images, by id, and not twice."""

import numpy as np
from PIL import Image

import dapt_jax as dj
from dapt_jax.data.unlabelled import load_images
from dapt_jax.export import embeddings
from tests import command


def test_features_are_those_of_the_encoder_with_the_ids_of_the_images(tmp_path, capsys):
    flags = command.small("--config.mode=embed", "--config.strategies=full", f"--workdir={tmp_path}")
    assert command.run(*flags) == 0
    files = {path.stem: path for path in (tmp_path / "embeddings").iterdir()}
    assert set(files) == {"corpus", "leukocytes-development", "leukocytes-external"}
    encoder = dj.load_encoder("efficientnet_lite0")
    data = dj.load_dataset("phantoms", name="external", n=36, image_size=32)
    with np.load(files["leukocytes-external"]) as found:
        np.testing.assert_allclose(found["feature"], dj.extract_features(encoder, data), atol=1e-5)
        assert found["image"].tolist() == list(data.images.names)
        assert len(set(found["image"].tolist())) == 36
        np.testing.assert_array_equal(found["label"], data.labels)
        assert found["classes"].tolist() == list(data.classes)
    written = {name: path.stat().st_mtime_ns for name, path in files.items()}
    capsys.readouterr()
    assert command.run(*flags) == 0
    assert capsys.readouterr().out.count("is complete") == 3
    assert {name: path.stat().st_mtime_ns for name, path in files.items()} == written

    assert command.run(*flags, "--config.embed_level=stage3/block1") == 0
    with np.load(files["corpus"]) as found:
        assert found["feature"].shape == (48, 40)
        assert "level stage3/block1" in str(found["key"])
    capsys.readouterr()
    assert command.run(*flags, "--config.embed_level=stage3/blok1") == 2
    assert "did you mean 'stage3/block1'" in capsys.readouterr().err


def test_features_of_another_encoder_are_not_those_that_are_there(tmp_path, capsys, monkeypatch):
    """Random weights have no fingerprint, and files of equal weights may be normalised otherwise."""
    monkeypatch.setattr(
        "dapt_jax.cost.hardware.lacks_bfloat16", lambda: False
    )  # else it is float32 on some CPUs
    flags = command.small(
        "--config.mode=embed", "--config.strategies=none", "--config.weights=random", f"--workdir={tmp_path}"
    )
    file, features = tmp_path / "embeddings" / "leukocytes-external.npz", []
    for change in (
        "--config.model.name=efficientnet_lite0",
        "--config.model.preprocess=half",
        "--config.model.dtype=bfloat16",
        "--config.model.name=resnet18",
    ):
        flags = [*(each for each in flags if each.partition("=")[0] != change.partition("=")[0]), change]
        assert command.run(*flags) == 0
        with np.load(file) as found:
            features.append(found["feature"])
    assert features[-1].shape[1] == 512
    assert not np.allclose(features[0], features[1], atol=1e-4)
    assert capsys.readouterr().out.count("is complete") == 0
    assert command.run(*flags) == 0
    assert capsys.readouterr().out.count("is complete") == 2


def test_features_of_images_that_were_renamed_carry_the_names_of_now(tmp_path, capsys):
    folder = tmp_path / "cells"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(folder / f"cell{number}.png")

    def named():
        data = load_images(folder, image_size=8, group="(cell)")  # else a name is its own group
        written = embeddings._write(data, lambda x: x[:, 0, 0].astype(np.float32), "mean", tmp_path / "x.npz")
        with np.load(written) as found:
            return found["image"].tolist()

    before = named()
    assert named() == before
    assert capsys.readouterr().out.count("is complete") == 1
    (folder / "cell2.png").rename(folder / "cell9.png")
    assert named() == [name.replace("cell2", "cell9") for name in before] != before
