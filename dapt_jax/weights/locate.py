"""From what a config says about weights to arrays."""

import importlib.util
from pathlib import Path

from dapt_jax.errors import UserError, nearest
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.weights import download, readers, zoo
from dapt_jax.weights.merge import HeadMode, MergeReport, merge
from dapt_jax.weights.paths import flatten

IMAGENET = "imagenet"
RANDOM = "random"
EXPECTED = "'imagenet', 'random', a name of the zoo such as 'taher2021:moco-v2', a path, or https://, hf://, package://"


def load(spec: str, classifier: Classifier, *, seed: int, head: HeadMode = "auto") -> tuple[Tree, Tree, MergeReport]:
    """Parameters and statistics for a classifier.

    Args:
        spec: `imagenet` for the model's default source, `random` for initial values, else what `find` takes.
        classifier: what the weights are for.
        seed: of what is initialised: everything under `random`, else a head that the file has no fitting one for.
        head: see `merge.merge`.

    Returns:
        Nested dicts of float32 NumPy arrays, and what came from where.

    Raises:
        UserError: the model has no default source, there is no such file, or the file does not fit the model.
    """
    if spec == RANDOM:
        params, batch_stats = classifier.init(seed)
        paths = tuple(flatten(params) | flatten(batch_stats))
        return params, batch_stats, MergeReport((), paths, (), f"random (seed {seed})", "")
    path = _default(classifier.encoder.name) if spec == IMAGENET else find(spec, classifier.encoder.name)
    return merge(classifier, readers.read(path), seed=seed, head=head)


def fitted(spec: str, encoder: Encoder) -> Encoder:
    """The encoder with the preprocessing that the named weights expect; other weights leave it as its architecture has it."""
    if not zoo.is_name(spec):
        return encoder
    wanted = zoo.entry(spec).preprocess.for_channels(encoder.preprocess.channels)
    return encoder if wanted == encoder.preprocess else encoder.with_preprocess(wanted)


def find(spec: str, model: str = "") -> Path:
    """The file that a config means, downloaded if need be.

    Args:
        spec: a path; a name of the zoo; `https://HOST/FILE`, `hf://OWNER/REPOSITORY/FILE` or `package://PACKAGE/FILE`, each
            with `#sha256=DIGITS` behind it to have the file checked (`hf://...@REVISION` takes a revision).
        model: name of the model that it is for; a zoo entry for another is refused.

    Raises:
        UserError: there is no such file, or it cannot be had; says what to do.
    """
    if zoo.is_name(spec):
        return _from_zoo(spec, model)
    address, _, fragment = spec.partition("#")
    digits = fragment.removeprefix("sha256=").lower() or None
    if "://" in spec and fragment and not fragment.startswith("sha256="):
        raise UserError(f"{spec}: {fragment!r} behind the #; expected sha256=DIGITS")
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme in ("https", "http"):
        return download.fetch(address, sha256=digits)
    if scheme == "hf":
        return _verified(_from_hub(address), digits)
    if scheme == "package":
        return _verified(_packaged(address), digits)
    if scheme:
        raise UserError(f"{spec}: unknown address {scheme}://; expected {EXPECTED}")
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(_missing(path))
    return path


def _default(model: str) -> Path:
    """The file of ImageNet weights that a model has by default."""
    entry = registry.entry(model)
    if entry.package is None:
        known = [name for name in zoo.names(model) if name.startswith(("torchvision:", "timm:"))]
        such = f"pass --config.weights={known[0]} to download them, or " if known else ""
        raise UserError(
            f"no package carries ImageNet weights of {model!r}: {such}--config.weights=PATH, a torchvision .pth or "
            ".safetensors or a Keras .h5 file of that model"
        )
    return _packaged(f"package://{entry.package}/{entry.file}")


def _from_zoo(name: str, model: str) -> Path:
    entry = zoo.entry(name)
    if model and entry.model != model:
        known = zoo.names(model)
        raise UserError(
            f"{name}: weights of {entry.model!r}, not of {model!r}; "
            + (nearest(name, known) if known else f"the zoo has none of {model!r}")
        )
    if entry.url.startswith("package://"):
        return _verified(_packaged(entry.url), entry.sha256)
    if not entry.url:
        raise UserError(f"{name}: cannot be downloaded by a program: {entry.by_hand}")
    return download.fetch(entry.url, sha256=entry.sha256)


def _packaged(address: str) -> Path:
    """A file inside an installed package; the package is found, not imported."""
    package, _, file = address.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{address}: no package {package!r} here; expected: pip install {package.replace('_', '-')}")
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        names = [str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()]
        raise UserError(f"{address}: no such file in the package; {nearest(file, names)}")
    return path


def _from_hub(address: str) -> Path:
    """A file of the Hugging Face hub, by its own client: logins, mirrors and its cache are the client's affair."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{address} needs: pip install 'dapt_jax[hub]' (huggingface_hub)") from None
    rest, _, revision = address.removeprefix("hf://").partition("@")
    owner, _, rest = rest.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{address}: expected hf://OWNER/REPOSITORY/FILE")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except Exception as error:  # the client's own errors, and those of the two HTTP libraries that it has used so far
        told = " ".join(str(error).split())[:160]
        page = f"https://huggingface.co/{owner}/{repository}/resolve/{revision or 'main'}/{file}"
        raise UserError(
            f"{address}: {type(error).__name__}: {told}; download {page} where there is a network and pass the file's path"
        ) from None


def _verified(path: Path, sha256: str | None) -> Path:
    if sha256 and not (found := download.digest(path)).startswith(sha256):
        raise UserError(f"{path}: its sha256 is {found}, expected {sha256}")
    return path


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such weight file, and no folder {path.parent} (weights: {EXPECTED})"
    names = sorted(child.name for child in path.parent.iterdir())
    hint = nearest(path.name, names) if names else "the folder is empty"
    return f"{path}: no such weight file; {hint} (weights: {EXPECTED})"
