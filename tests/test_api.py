"""The front door: every public name has an example that runs, and `import dapt_jax` costs nothing."""

import dataclasses
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

import dapt_jax as dj
from dapt_jax import api

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", dj.__all__)
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    value = getattr(dj, name)
    module = sys.modules[value.__module__]
    found = doctest.DocTestFinder(recurse=False).find(
        value, name, module=module, globs={**vars(module), "dj": dj}
    )
    assert [test for test in found if test.examples], f"{name} has no example in its docstring"
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for test in found:
        assert not doctest.DocTestRunner(optionflags=options).run(test).failed


def test_the_examples_of_the_module_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    finder = doctest.DocTestFinder(recurse=False)
    for module in (dj, api):
        for test in finder.find(module):
            assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed


def test_importing_the_package_imports_no_jax():
    code = "import sys; before = set(sys.modules); import dapt_jax; print(*({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_names_that_type_checkers_see_are_those_that_there_are():
    source = inspect.getsource(dj)
    for name in dj.__all__:
        assert f"as {name}\n" in source
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dj.trian  # noqa: B018


def test_features_do_not_depend_on_the_batch(monkeypatch):
    encoder = dj.load_encoder("efficientnet_lite0", "random", cut_after="stage1/block1")
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3)).astype(np.uint8)
    whole, parts = (dj.extract_features(encoder, images, batch_size=size) for size in (7, 3))
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_a_saved_encoder_loads_to_the_bit(tmp_path):
    encoder = dj.load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    encoder.save(tmp_path / "encoder.safetensors")
    again = dj.load_encoder(
        "efficientnet_lite0", str(tmp_path / "encoder.safetensors"), cut_after="stage1/block1"
    )
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert np.array_equal(dj.extract_features(encoder, images), dj.extract_features(again, images))
    with pytest.raises(dj.UserError, match="did you mean 'timm'"):
        encoder.export(tmp_path / "other.safetensors", library="tim")


def test_training_refuses_another_encoder_than_the_runs():
    encoder = dj.load_encoder("efficientnet_lite0", "random", cut_after="stage1/block1")
    other = dj.load_encoder("efficientnet_lite0", "random", cut_after="stem")
    corpus = dj.load_dataset("phantoms", name="corpus", n=24, image_size=32)
    run = dj.adaptation_run(encoder, corpus, [dj.Phase("head", 1, trainable=("head",), lr=1e-3)])
    with pytest.raises(dj.UserError, match="expected the same encoder"):
        dj.train(run, other)


def test_the_api_page_is_made_from_the_docstrings():
    from tests import api_page

    assert sorted(name for names in api_page.GROUPS.values() for name in names) == sorted(dj.__all__)
    assert api_page.PAGE.read_text() == api_page.page(), "python -m tests.api_page makes it anew"


@pytest.fixture(scope="module")
def encoder():
    return dj.load_encoder("efficientnet_lite0", "random", cut_after="stage1/block1")


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def test_features_of_an_array_depend_on_its_pixels_and_not_on_its_type(encoder):
    features = dj.extract_features(encoder, IMAGES)
    np.testing.assert_allclose(dj.extract_features(encoder, IMAGES / 255), features, rtol=1e-5, atol=1e-6)
    grey = np.repeat(IMAGES[..., :1], 3, axis=3)
    expected = dj.extract_features(encoder, grey)
    for same in (IMAGES[..., 0], IMAGES[..., :1]):
        np.testing.assert_allclose(dj.extract_features(encoder, same), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.astype(float), "floats from 0 to 25"),
        (IMAGES.astype(np.uint16) * 256, "images are uint16"),
        (np.where(IMAGES == 0, np.nan, IMAGES / 255), "floats from nan"),
        (IMAGES > 9, "images are bool"),
        (IMAGES.astype(int), "images are int64"),
        (IMAGES[0], r"one image; expected .*images.None."),
        (np.moveaxis(IMAGES, -1, 1), r"\[3, 3, 32, 32\]; expected \[n, h, w, 3\]"),
        (np.concatenate([IMAGES, IMAGES[..., :1]], -1), r"\[3, 32, 32, 4\]; expected"),
        (IMAGES[:, :0], "expected"),
        ([IMAGES[0], IMAGES[0, :9]], "images differ in shape"),
        ("scans/", "expected uint8"),
    ],
)
def test_an_array_whose_values_or_axes_are_not_known_is_refused_not_guessed(encoder, images, words):
    with pytest.raises(dj.UserError, match=words):
        dj.extract_features(encoder, images)


def test_sets_with_images_in_common_are_scored_where_that_is_asked_for(encoder, capsys):
    data = dj.load_dataset("phantoms", name="development", n=40, image_size=32)
    rows = dj.evaluate(encoder, data, data, folds=2, leaks="mark")
    assert {row["split"] for row in rows} == {"development", "external"}
    assert capsys.readouterr().out.startswith("warning: ")


def test_a_workdir_may_be_elsewhere(tmp_path, monkeypatch):
    """By the same mirror as of the command: no folder `memory:` is made here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    files = fsspec.filesystem("memory")
    for name in ("config.json", "results.jsonl", "ledger.jsonl"):
        files.pipe_file(f"/bucket/study/{name}", (ROOT / "docs" / "wbc" / name).read_bytes())
    assert dj.read_study("memory://bucket/study").results == dj.read_study(ROOT / "docs" / "wbc").results
    files.store.clear()
    folder = ROOT / "docs" / "wbc"
    for call in (
        lambda place: dj.run_study(dj.default_config(), place),
        lambda place: dj.score(dj.default_config(), place),
        lambda place: dj.compare([folder, folder], place),
    ):
        with pytest.raises(dj.UserError, match="nosuch://bucket/x"):
            call("nosuch://bucket/x")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_wrong_arguments_are_answered_with_what_was_expected(encoder):
    data, small = (
        dj.load_dataset("phantoms", name="development", n=24, image_size=size) for size in (32, 16)
    )
    with pytest.raises(dj.UserError, match="external: image_size is 16; expected 32"):
        dj.evaluate(encoder, data, small)
    with pytest.raises(dj.UserError, match="24 images are in both task external and task development"):
        dj.evaluate(encoder, data, data)
    with pytest.raises(dj.UserError, match="unknown leaks 'mrk'; did you mean 'mark'"):
        dj.evaluate(encoder, data, data, leaks="mrk")
    phases = [dj.Phase("head", 1, trainable=("head",), lr=1e-3)]
    with pytest.raises(dj.UserError, match=r"these are names: .*HIGHEST' with all of them, and ordinal=True"):
        dj.adaptation_run(encoder, data, phases, loss="ordinal")
    grades = dataclasses.replace(data, ordinal=True)
    assert dj.adaptation_run(encoder, grades, phases, loss="ordinal").model.outputs == len(data.classes) - 1
    with pytest.raises(dj.UserError, match="corpus is a ndarray; expected a data set"):
        dj.adaptation_run(encoder, IMAGES, [])
    for size in (0, 64.0, "64"):
        with pytest.raises(dj.UserError, match=r"image_size is .*expected a whole number, 8 or more"):
            dj.load_dataset("phantoms", name="development", n=24, image_size=size)
    with pytest.raises(dj.UserError, match=r"epochs is 1.5; expected a whole number"):
        dj.Phase("head", 1.5, trainable=("head",), lr=1e-3)
    with pytest.raises(dj.UserError, match=r"trainable is 'head'; expected several names, such as .'head',"):
        dj.Phase("head", 1, trainable="head", lr=1e-3)
    labels = np.arange(24) % 2
    assert set(dj.transferability_scores("logme", np.random.default_rng(0).normal(size=(24, 3)), labels)) == {
        "logme"
    }
