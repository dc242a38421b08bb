"""What other projects' checkpoints look like, from container to prefix: each is told from its keys, loaded and named."""

from pathlib import Path

import numpy as np
import pytest

from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.weights import readers, tables
from dapt_jax.weights.merge import merge
from dapt_jax.weights.paths import flatten
from tests.torch_files import tensor, write_zip

MODEL = Classifier(registry.build("resnet50").truncate("stage1/block2"), 3)


def named(scheme_name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Every array of the model, a number of its own in each, as a family of files has them."""
    (scheme,) = (each for each in tables.schemes("resnet50") if each.name == scheme_name)
    params, batch_stats = MODEL.abstract()
    shapes = flatten(params) | flatten(batch_stats)
    source = {}
    for number, (path, entry) in enumerate(tables.table(scheme, MODEL).items()):
        ours = np.full(shapes[path].shape, number, np.float32)
        ours.flat[0] = -number
        if scheme_name == "haiku" and ours.ndim == 1:
            ours = ours.reshape(1, 1, 1, -1)
        if scheme.framework == "torch":
            ours = {4: lambda a: a.transpose(3, 2, 0, 1), 2: np.transpose}.get(ours.ndim, lambda a: a)(ours)
        source[prefix + entry.key] = np.ascontiguousarray(ours)
    return source


def checkpoint(path: Path, source: dict[str, np.ndarray], *containers: str) -> Path:
    content = {key: tensor(array, str(number)) for number, (key, array) in enumerate(source.items())}
    for container in reversed(containers):
        content = {"epoch": 200, "arch": "resnet50", container: content}
    return write_zip(
        path, content, {str(number): array.tobytes() for number, array in enumerate(source.values())}
    )


@pytest.mark.parametrize(
    ("scheme", "prefix", "containers", "said"),
    [
        ("torchvision", "", (), "torchvision names"),
        ("torchvision", "module.encoder_q.", ("state_dict",), "'module.encoder_q.' (MoCo's query encoder)"),
        ("torchvision", "module.", (), "'module.' (DataParallel, as SwAV"),
        ("torchvision", "module.", ("state_dict",), "['state_dict']"),
        ("torchvision", "module.encoder.", ("model",), "'module.encoder.' (PyContrast's encoder)"),
        ("torchvision", "model.", ("state_dict",), "'model.' (Lightning)"),
        ("torchvision", "backbone.", (), "'backbone.'"),
        ("torchvision", "model.encoder.", ("state_dict",), "'model.encoder.'"),
        ("SimCLR-v2", "", ("resnet",), "SimCLR-v2 names"),
        ("nn.Sequential of torchvision", "backbone.", (), "nn.Sequential of torchvision names"),
        ("haiku", "res_net50/~/", (), "haiku names"),
    ],
)
def test_layouts_are_told_from_keys_and_named(
    tmp_path: Path, scheme: str, prefix: str, containers, said: str
) -> None:
    source = named(scheme, prefix)
    extra = {
        f"{prefix}projection_head.0.weight": np.ones((2, 2), np.float32),
        "queue": np.ones((4, 2), np.float32),
    }
    weights = readers.read(checkpoint(tmp_path / "w.pth.tar", source | extra, *containers))
    params, batch_stats, report = merge(MODEL, weights, seed=0, head="new")
    assert said in str(report)
    assert report.prefix == prefix
    assert set(extra) <= set(report.left_over)
    for number, path in enumerate(tables.table(tables.schemes("resnet50")[1], MODEL)):
        if not path.startswith("head/"):
            array = (flatten(params) | flatten(batch_stats))[path]
            assert (array.flat[0], array.flat[-1]) == (-number, number), path


def test_both_encoders_of_moco_and_its_queue_are_told_apart(tmp_path: Path) -> None:
    source = named("torchvision", "module.encoder_q.")
    keys = {key.replace("encoder_q", "encoder_k"): array + 1 for key, array in source.items()}
    _, _, report = merge(
        MODEL, readers.read(checkpoint(tmp_path / "moco.tar", keys | source, "state_dict")), seed=0
    )
    assert report.prefix == "module.encoder_q."
    assert set(report.left_over) == set(keys)


def test_an_optimiser_inside_is_never_read(tmp_path: Path) -> None:
    source = named("torchvision")
    state = {key: tensor(array, str(number)) for number, (key, array) in enumerate(source.items())}
    # The moments' numbers are not even there: reading them would fail.
    moments = {
        number: {"exp_avg": tensor(array, f"m{number}")} for number, array in enumerate(source.values())
    }
    content = {
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "state_dict": state,
    }
    runs = {str(number): array.tobytes() for number, array in enumerate(source.values())}
    report = merge(MODEL, readers.read(write_zip(tmp_path / "w.pth", content, runs)), seed=0)[2]
    assert report.left_over == ()
