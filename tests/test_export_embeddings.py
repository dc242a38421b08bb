"""`mode=embed`: the features of all images, by id, and not twice."""

import numpy as np

import dapt_jax as dj
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
