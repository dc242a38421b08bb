"""Adapted encoders for other tools: names, layouts and bits come back; programs run at any batch; cards say what is inside."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import dapt_jax as dj
from dapt_jax import main as command
from dapt_jax.errors import UserError
from dapt_jax.export.encoders import parity_image
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.weights import export, locate, readers
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten
from tests.command import ROOT, run, small


def drawn(name: str, seed: int = 0) -> tuple[Tree, Tree]:
    """Parameters and statistics of which no two are alike, as after training."""
    rng = np.random.default_rng(seed)
    params, batch_stats = registry.build(name).init(seed)

    def moved(leaf):
        near = leaf * rng.uniform(0.9, 1.1, leaf.shape)
        return (near + 0.05 * rng.uniform(-1, 1, leaf.shape) * (leaf.ndim == 1)).astype(np.float32)

    return jax.tree.map(moved, params), jax.tree.map(moved, batch_stats)


def same_bits(before: Tree, after: Tree) -> None:
    before, after = flatten(before), flatten(after)
    for path, array in before.items():
        assert np.asarray(array, np.float32).tobytes() == np.ascontiguousarray(after[path]).tobytes(), path


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "efficientnet_lite0", "densenet121", "convnext_tiny", "vit_small", "swin_tiny"],
)
def test_files_of_other_names_come_back_to_the_bit(tmp_path: Path, name: str) -> None:
    params, batch_stats = drawn(name)
    libraries = export.libraries(registry.build(name))
    assert libraries
    for library in libraries:
        path = tmp_path / f"{library.name}.safetensors"
        export.write_named(path, registry.build(name), params, batch_stats, library.scheme)
        assert "head/kernel" not in safetensors.numpy.load_file(path)
        back, back_stats, report = merge(Classifier(registry.build(name), 2), readers.read(path), seed=0)
        assert library.scheme.name in report.source
        assert set(report.initialised) == {"head/kernel", "head/bias"}
        assert report.left_over == ()
        same_bits(params, back)
        same_bits(batch_stats, back_stats)


def test_every_model_of_a_library_names_it() -> None:
    for name in registry.names():
        found = {library.name for library in export.libraries(registry.build(name))}
        if name.endswith(("_keras", "_hidy2024")) or name == "unet":
            assert not found, name
        else:
            assert "timm" in found, name
    assert {each.name for each in export.libraries(registry.build("resnet50"))} == {"timm", "torchvision"}
    assert [each.model for each in export.libraries(registry.build("vit_base"))] == [
        "vit_base_patch16_224",
        "vit_b_16",
    ]
    assert [each.name for each in export.libraries(registry.build("vit_base_dinov2"))] == ["timm"]


STATE_DICTS = json.loads((ROOT / "tests" / "fixtures" / "state_dicts.json").read_text())


@pytest.mark.parametrize("which", STATE_DICTS)
def test_keys_and_shapes_are_those_of_the_library(which: str) -> None:
    """Against the libraries' own state dicts, which `fixtures/make_state_dicts.py` has written down."""
    name, _, model = which.partition(" ")
    (library,) = (each for each in export.libraries(registry.build(model)) if each.name == name)
    encoder = registry.build(model)
    params, batch_stats = (
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree) for tree in encoder.abstract()
    )
    found = export.named(encoder, params, batch_stats, library.scheme)
    assert {key: list(array.shape) for key, array in found.items()} == STATE_DICTS[which]


def test_an_orbax_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    params, batch_stats = drawn("resnet18")
    export.write_orbax(tmp_path / "orbax", params, batch_stats)
    back, back_stats, report = locate.load(
        str(tmp_path / "orbax"), Classifier(registry.build("resnet18"), 2), seed=0
    )
    assert "dapt_jax names" in report.source
    same_bits(params, back)
    same_bits(batch_stats, back_stats)


@pytest.mark.parametrize("form", ["encoder.safetensors", "encoder.npz", "timm.safetensors", "orbax"])
def test_every_form_says_how_images_are_normalised_and_where_the_encoder_was_cut(
    tmp_path: Path, form
) -> None:
    encoder = dj.load_encoder("resnet18", "random", preprocess="0.3,0.2", cut_after="stage2/block1")
    path = tmp_path / form
    if form == "orbax":
        export.write_orbax(path, encoder.params, encoder.batch_stats, encoder.encoder)
    elif form.startswith("timm"):
        encoder.export(path)
    else:
        encoder.save(path)
    back = dj.load_encoder("resnet18", str(path))
    assert back.encoder.groups == encoder.encoder.groups
    assert back.encoder.preprocess == encoder.encoder.preprocess
    assert "as the file remembers" in back.report.normalisation
    same_bits(encoder.params, back.params)
    same_bits(encoder.batch_stats, back.batch_stats)


@pytest.mark.parametrize("form", ["encoder.npz", "orbax"])
def test_damaged_metadata_is_one_line(tmp_path: Path, form) -> None:
    encoder = dj.load_encoder("resnet18", "random", cut_after="stem")
    path = tmp_path / form
    if form == "orbax":
        export.write_orbax(path, encoder.params, encoder.batch_stats, encoder.encoder)
        (path / "dapt_jax.json").write_text("[1]")
    else:
        arrays = flatten(encoder.params) | flatten(encoder.batch_stats)
        np.savez(path, **arrays, __metadata__=np.frombuffer(b"{", np.uint8))
    with pytest.raises(UserError, match="damaged metadata; expected those that dapt_jax writes"):
        dj.load_encoder("resnet18", str(path))


def test_damaged_orbax_folders_are_one_line(tmp_path: Path) -> None:
    params, batch_stats = drawn("resnet18")
    export.write_orbax(tmp_path / "orbax", {"stem": params["stem"]}, {"stem": batch_stats["stem"]})
    for path in sorted((tmp_path / "orbax").rglob("*")):
        if path.is_file() and path.name not in ("_METADATA",):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # In a process of its own: what orbax has begun to read goes on behind the error, and complains at the
    # end.
    script = "import sys; from dapt_jax.weights import readers; dict(readers.read(sys.argv[1]))"
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "orbax"], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 1
        # Threads of orbax write to the same stream: the line may begin behind something of theirs.
        assert "an orbax checkpoint that cannot be read" in ended.stderr
        (tmp_path / "orbax" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"not an orbax checkpoint .*it holds orbax"):
        readers.read(tmp_path)


def test_a_program_runs_at_any_batch_and_needs_nothing_else(tmp_path: Path) -> None:
    encoder = registry.build("resnet18").truncate("stage1/block1")
    params, batch_stats = encoder.init(0)
    export.write_stablehlo(tmp_path / "encoder.stablehlo", encoder, params, batch_stats, 32)
    program = jax.export.deserialize(bytearray((tmp_path / "encoder.stablehlo").read_bytes()))
    assert set(program.platforms) == set(export.PLATFORMS)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    expected = jax.jit(Classifier(encoder, 1).features)(params, batch_stats, images)
    np.testing.assert_allclose(program.call(images), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(program.call(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_small", "swin_tiny", "convnext_tiny", "efficientnet_lite0"])
def test_every_family_is_a_program_of_any_batch(tmp_path: Path, name: str) -> None:
    encoder = registry.build(name)
    encoder = encoder.truncate(encoder.groups[1])
    export.write_stablehlo(tmp_path / "encoder.stablehlo", encoder, *encoder.init(0), 64)
    program = jax.export.deserialize(bytearray((tmp_path / "encoder.stablehlo").read_bytes()))
    (images,), (features,) = program.in_avals, program.out_avals
    assert images.shape[0] == features.shape[0]
    assert not isinstance(images.shape[0], int)
    assert features.shape[1] == encoder.features


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A study of two adapted arms, one with a corpus and weights of its own, exported by the same command."""
    folder = tmp_path_factory.mktemp("study")
    config = folder / "config.py"
    config.write_text(
        "import runpy\n\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(ROOT / 'configs' / 'quickstart.py')!r})['get_config']()\n"
        "    config.corpora.smears = {'kind': 'phantoms', 'name': 'corpus', 'n': 30}\n"
        "    config.custom_strategies.own = {'like': 'partial', 'weights': 'random', 'corpus': 'smears'}\n"
        "    return config\n"
    )
    _, *rest = small("--config.seeds=0", "--config.strategies=none,partial,own")
    flags = (f"--config={config}", *rest, f"--workdir={folder / 'run'}")
    assert run(*flags) == 0
    assert run(*flags, "--config.mode=export") == 0
    return folder / "run"


def flags_of(workdir: Path, *flags: str) -> list[str]:
    """The command that made the workdir, with others of its flags."""
    given = small("--config.mode=export", "--config.seeds=0", "--config.strategies=none,partial,own")[1:]
    left = [
        each for each in given if each.partition("=")[0] not in {flag.partition("=")[0] for flag in flags}
    ]
    return [f"--config={workdir.parent / 'config.py'}", *left, *flags, f"--workdir={workdir}"]


def test_the_mode_writes_every_form_and_a_card(workdir: Path) -> None:
    assert {path.name for path in (workdir / "export").iterdir()} == {"partial-seed0", "own-seed0"}
    arm = workdir / "export" / "partial-seed0"
    assert {path.name for path in arm.iterdir()} == {
        "README.md", "encoder.safetensors", "encoder.stablehlo", "orbax", "timm.safetensors",
    }  # fmt: skip
    model = Classifier(registry.build("efficientnet_lite0"), 2)
    adapted, batch_stats, _ = locate.load(
        str(workdir / "checkpoints" / "partial-seed0" / "adapted.safetensors"), model, seed=0
    )
    del adapted["head"]
    for name in ("encoder.safetensors", "timm.safetensors", "orbax"):
        back, back_stats, _ = locate.load(str(arm / name), model, seed=0)
        same_bits(adapted, back)
        same_bits(batch_stats, back_stats)


def test_the_card_says_where_from_at_what_cost_and_how_good(workdir: Path) -> None:
    card = (workdir / "export" / "partial-seed0" / "README.md").read_text()
    ledger = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    results = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert "efficientnet-lite0-57934424.pth" in card
    assert "The images of this study are synthetic" in card
    assert "48 images, classes" in card
    assert "partial: 1 epochs" in card
    assert "(x - [127, 127, 127]) / [128, 128, 128]" in card
    phases = [row for row in ledger if (row["strategy"], row["stage"]) == ("partial", "dapt")]
    assert [f"| {row['phase']} | {row['steps']:,} |" in card for row in phases] == [True, True]
    for row in results:
        if row["strategy"] == "partial" and "/" not in row["metric"]:
            assert f"{row['value']:.4f}" in card
    assert 'timm.create_model("tf_efficientnet_lite0", num_classes=0)' in card


def test_the_card_names_the_weights_and_the_corpus_of_the_strategy(workdir: Path) -> None:
    card = (workdir / "export" / "own-seed0" / "README.md").read_text()
    assert "| source weights | `random`; random (seed 0) |" in card
    (line,) = (each for each in card.splitlines() if each.startswith("| in-domain corpus |"))
    assert line.startswith("| in-domain corpus | 30 images, classes ")
    assert "n 30" in line
    contents = json.loads((workdir / "config.json").read_text())["contents"]
    assert f"fingerprint `{contents['corpora.smears']['images']}`" in line


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.adapt.partial_groups=1", "adapt.partial_groups was 3 there and is 1 now"),
        ("--config.adapt.lr=0.5", "adapt.lr was"),
        ("--config.weights=random", "weights was 'imagenet' there and is 'random' now"),
    ],
)
def test_a_card_is_not_written_by_settings_of_another_study(workdir: Path, capsys, flag, words) -> None:
    assert run(*flags_of(workdir, flag)) == 2
    assert f"{workdir} holds the study of another config: {words}" in capsys.readouterr().err


def test_an_export_may_be_of_some_strategies_on_another_machine(workdir: Path, capsys) -> None:
    assert run(*flags_of(workdir, "--config.strategies=own", "--config.cache.memory_mb=7")) == 0
    assert capsys.readouterr().out.strip().endswith("own-seed0")


def test_the_parity_hint_tells_a_transposed_kernel(workdir: Path) -> None:
    card = (workdir / "export" / "partial-seed0" / "README.md").read_text()
    told = {int(at): float(value) for at, value in re.findall(r"\[(\d+)\] = ([-+.e\d]+\d)", card)}
    assert len(told) == 6
    encoder = registry.build("efficientnet_lite0")
    params, batch_stats, _ = locate.load(
        str(workdir / "export" / "partial-seed0" / "orbax"), Classifier(encoder, 2), seed=0
    )
    features = jax.jit(Classifier(encoder, 2).features)
    image = parity_image(32, 3)[None]
    places, values = list(told), list(told.values())
    np.testing.assert_allclose(features(params, batch_stats, image)[0, places], values, rtol=1e-3, atol=1e-4)
    kernel = params["stage1"]["block1"]["depthwise"]["kernel"]  # 3 x 3: fits either way
    params["stage1"]["block1"]["depthwise"]["kernel"] = kernel.swapaxes(0, 1)
    assert not np.allclose(features(params, batch_stats, image)[0, places], values, rtol=0.01, atol=0.01)


def test_exporting_what_no_study_has_made_is_one_line(tmp_path: Path, workdir: Path, capsys) -> None:
    assert run(*small("--config.mode=export"), f"--workdir={tmp_path}") == 2
    assert "no such file" in capsys.readouterr().err
    assert run(*flags_of(workdir, "--config.strategies=none")) == 2
    assert "no finished adapted.safetensors (no strategy adapts)" in capsys.readouterr().err
    assert command.main(["x", "--config.mode=export"]) == 2


@pytest.mark.parametrize(
    ("name", "side", "names"),
    [
        ("resnet50", 224, ["timm", "torchvision"]),
        ("efficientnet_lite0", 224, ["timm"]),
        ("densenet121", 224, ["timm", "torchvision"]),
        ("convnext_tiny", 224, ["timm", "torchvision"]),
        ("vit_small", 224, ["timm"]),
        ("vit_small", 96, ["timm"]),
        ("vit_small_dinov2", 112, ["timm"]),
        ("vit_small_dinov2_registers", 112, ["timm"]),
        ("vit_small_dinov3", 96, ["timm"]),
        ("swin_tiny", 224, ["timm", "torchvision"]),
        ("swin_tiny", 96, ["torchvision"]),
    ],
)
def test_a_few_lines_of_pytorch_load_it_and_see_the_same(
    tmp_path: Path, monkeypatch, name: str, side: int, names: list[str]
) -> None:
    """The snippet of the card is run as it stands."""
    encoder = registry.build(name)
    libraries = export.libraries(encoder, side)
    assert [library.name for library in libraries] == names
    torch = pytest.importorskip("torch")
    for library in libraries:
        module = pytest.importorskip(library.name)
        loader = importlib.import_module("safetensors.torch")
        params, batch_stats = drawn(name)
        export.write_named(tmp_path / library.file, encoder, params, batch_stats, library.scheme)
        monkeypatch.chdir(tmp_path)
        scope = {library.name: module, "safetensors": importlib.import_module("safetensors"), "torch": torch}
        assert loader
        snippet = library.snippet(encoder, side)
        assert len(snippet.splitlines()) == 2 or side < encoder.image_size
        exec(snippet, scope)
        model = scope["model"].eval()
        images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
        x = torch.from_numpy(np.asarray(encoder.preprocess(images))).permute(0, 3, 1, 2)
        with torch.no_grad():
            if library.name == "timm":
                theirs = model(x)
            else:
                for head in ("fc", "classifier", "head", "heads"):
                    if hasattr(model, head):
                        last = getattr(model, head)
                        kept = list(last.children())[:-1] if isinstance(last, torch.nn.Sequential) else []
                        setattr(model, head, torch.nn.Sequential(*kept))
                theirs = model(x)
        ours = np.asarray(jax.jit(Classifier(encoder, 1).features)(params, batch_stats, images))
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


def test_equal_weights_are_equal_files_bit_for_bit(tmp_path):
    encoder = registry.build("resnet18")
    params, batch_stats = encoder.init(0)
    files = []
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        export.write(path, params, batch_stats, encoder, {"strategy": "füll", "seed": 0, "note": "a\x01b\n"})
        files.append(path.read_bytes())
    assert len(set(files)) == 1
    with safetensors.safe_open(tmp_path / "0.safetensors", "np") as file:
        assert json.loads(file.metadata()[export.ORIGIN])["strategy"] == "füll"


@pytest.mark.parametrize("suffix", export.SUFFIXES)
def test_files_of_weights_have_the_modes_of_the_umask_and_survive_a_failed_write(
    tmp_path, monkeypatch, suffix
):
    tree = {"stem": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    path, before = tmp_path / f"w{suffix}", os.umask(0o027)
    try:
        export.write(path, tree, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    np.testing.assert_array_equal(readers.read(path)["stem/kernel"], tree["stem"]["kernel"])
    content = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export.write(path, {"stem": {"kernel": np.zeros(3)}}, {})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content


def test_an_adapted_encoder_with_registers_is_kept_by_timm_with_its_position_in_the_class_token() -> None:
    """Its own class token has a position, of which timm's files know nothing: both are added before the first block."""
    encoder = registry.build("vit_small_dinov2_registers")
    params, batch_stats = drawn("vit_small_dinov2_registers")
    (library,) = export.libraries(encoder)
    arrays = export.named(encoder, params, batch_stats, library.scheme)
    before = params["stem"]["class_token"] + params["stem"]["position"][:, :1]
    np.testing.assert_array_equal(arrays["cls_token"], before)
    assert arrays["pos_embed"].shape[1] == params["stem"]["position"].shape[1] - 1
