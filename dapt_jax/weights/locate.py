"""Loading of the weights that a config names."""

import dataclasses
import functools
import importlib.util
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from dapt_jax.errors import UserError, nearest, nearest_beside
from dapt_jax.models import registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Encoder, LayerGroup, Tree
from dapt_jax.models.preprocess import Preprocess
from dapt_jax.runtime import home, safe_paths
from dapt_jax.weights import (
    download,
    hub,
    identity,
    normalisation,
    readers,
    recognise,
    sharded,
    unreadable,
    zoo,
)
from dapt_jax.weights.export import LAST_GROUP, SUFFIXES
from dapt_jax.weights.merge import HeadMode, MergeReport, merge
from dapt_jax.weights.paths import flatten
from dapt_jax.weights.run_reference import SCHEME, RunReference

IMAGENET = "imagenet"
RANDOM = "random"
EXPECTED = (
    "'imagenet', 'random', a name of the zoo such as 'taher2021:moco-v2', a path, run:WORKDIR, or https://, "
    "hf://, package://"
)


def load(
    spec: str, classifier: Classifier, *, seed: int, head: HeadMode = "auto"
) -> tuple[Tree, Tree, MergeReport]:
    """Return parameters and statistics for a classifier.

    Args:
        spec: `imagenet` for the model's default source, `random` for initial values, else an argument of
            `find`.
        classifier: Classifier that receives the weights.
        seed: Seed for initial values: of everything for `random`, else of a head for which the file has no
            fitting one.
        head: See `merge.merge`.

    Returns:
        Nested dicts of float32 NumPy arrays, and a report of their origins.

    Raises:
        UserError: The model has no default source, the file does not exist, does not fit the model or is known to be
            of another one, or it contains several encoders and the choice is ambiguous.
    """
    encoder = classifier.encoder
    if spec == RANDOM:
        params, batch_stats = classifier.init(seed)
        paths = tuple(flatten(params) | flatten(batch_stats))
        return params, batch_stats, MergeReport((), paths, (), f"random (seed {seed})", "")
    address = Address.of(spec)
    path = _default(encoder.name) if spec == IMAGENET else find(spec, encoder.name)
    weights = readers.read(path)
    expected = recognise.expected(str(path) if spec == IMAGENET else address.place, path)
    _refuse_another_function(encoder, expected.model, weights.origin)
    params, batch_stats, report = merge(classifier, weights, seed=seed, head=head, prefix=address.prefix)
    said = _normalisation(encoder, expected)
    return params, batch_stats, dataclasses.replace(report, normalisation=said)


def _refuse_another_function(encoder: Encoder, model: str, origin: str) -> None:
    """Refuse weights of a model whose arrays may fit, but which computes something else from them.

    Keras' EfficientNet-B0 and PyTorch's, for example, differ in padding and in the epsilon of batch norm alone. Models
    that differ in their normalisation alone (a supervised ViT and MAE's) take each other's weights.
    """
    if model == encoder.name or not {model, encoder.name} <= set(registry.names()):
        return
    ours, theirs = (
        {spec.name: _constructor(spec) for spec in registry.build(name).specs}
        for name in (encoder.name, model)
    )
    if any(group in theirs and theirs[group] != ours[group] for group in encoder.groups):
        raise UserError(
            f"{origin}: these are the weights of {model!r}, not of {encoder.name!r}; expected model.name={model!r}"
        )


def _constructor(spec: LayerGroup) -> tuple[object, ...]:
    """Return what a layer group is built by, without normalisations."""
    if not isinstance(spec.build, functools.partial):
        return (spec.build,)
    return (spec.build.func, *map(_without_preprocess, spec.build.args), sorted(spec.build.keywords.items()))


def _without_preprocess(value: object) -> object:
    if isinstance(value, Preprocess):
        return None
    return tuple(map(_without_preprocess, value)) if isinstance(value, tuple) else value


def is_here(spec: str, model: str) -> bool:
    """Return whether weights are read without a network: a path, even a wrong one, or what was downloaded.

    Args:
        spec: See `load`.
        model: Name of the model.
    """
    if spec == RANDOM:
        return True
    if spec.startswith(SCHEME):
        return True
    place = Address.of(spec).place
    try:
        if spec == IMAGENET:
            return _default(model).is_file()
        if zoo.is_name(place):
            if not zoo.entry(place).url:
                return by_hand(place).is_file()
            place = zoo.entry(place).url
        if place.startswith("package://"):
            return _packaged(place).is_file()
    except UserError:
        return False
    if place.startswith(("https://", "http://")):
        return download.cached(place) is not None
    return "://" not in place and bool(place)


def fitted(spec: str, encoder: Encoder, preprocess: str = "", may_read: bool = True) -> Encoder:
    """Return the encoder with the normalisation that the named weights expect, cut where theirs was cut.

    Args:
        spec: See `load`.
        encoder: Encoder to copy with another normalisation, or without the groups that the weights lack.
        preprocess: `config.model.preprocess`; if it is not empty, it takes precedence
            (`normalisation.parse`).
        may_read: Whether the file may be read, and downloaded, where its name does not tell.

    Returns:
        The same object if it already has this normalisation and is not cut. Weights with an unknown normalisation
        (`recognise`) use the default of the architecture.
    """
    wanted = normalisation.parse(preprocess, encoder.channels)
    if wanted is None and spec not in (IMAGENET, RANDOM):
        place = Address.of(spec).place
        known = recognise.expected(place)
        if not known.is_certain and may_read and (path := _here(spec)):
            known = recognise.expected(place, path)
        wanted = known.preprocess.for_channels(encoder.channels) if known.preprocess else None
    if wanted is None:
        wanted = _default_normalisation(encoder)
    last = _last_group(spec) if may_read and spec not in (IMAGENET, RANDOM) else ""
    if last in encoder.groups[:-1]:
        encoder = encoder.truncate(last)
    return encoder if wanted == encoder.preprocess else encoder.with_preprocess(wanted)


def _last_group(spec: str) -> str:
    """Return the last layer group of an encoder that a study has left on this machine; empty for others."""
    place = Address.of(spec).place
    if "://" in place or zoo.is_name(place):
        return ""
    path = _here(spec)
    is_ours = path is not None and (path.suffix in SUFFIXES or path.is_dir())
    return readers.read(path).metadata.get(LAST_GROUP, "") if path and is_ours else ""


def remembered(path: Path) -> Preprocess | None:
    """Return the normalisation recorded in a file of ours; None for a file without a record."""
    return normalisation.from_metadata(readers.read(path).metadata, str(path))


def _here(spec: str) -> Path | None:
    """Return the file, downloaded if needed; None for a missing path, which `load` reports."""
    place = Address.of(spec).place
    if place.startswith(SCHEME):
        return find(spec)
    if "://" not in place and not zoo.is_name(place) and not home.expanded(place).exists():
        return None
    return find(spec)


def _default_normalisation(encoder: Encoder) -> Preprocess:
    if encoder.name not in registry.names():
        return encoder.preprocess
    return registry.build(encoder.name).preprocess.for_channels(encoder.channels)


def _normalisation(encoder: Encoder, expected: recognise.Expected) -> str:
    """Return the normalisation of an encoder's images and its origin, in words."""
    said = normalisation.describe(encoder.preprocess)
    if expected.preprocess and expected.preprocess.for_channels(encoder.channels) == encoder.preprocess:
        return f"{said} ({expected.why})"
    if expected.preprocess:
        return f"{said} (by model.preprocess; {expected.why}: {normalisation.describe(expected.preprocess)})"
    if encoder.preprocess == _default_normalisation(encoder):
        return f"{said} (the default of {encoder.name}; {expected.why})"
    return f"{said} (by model.preprocess)"


class Address(NamedTuple):
    """Parts of `config.weights`: `PLACE#prefix=student.backbone&sha256=DIGITS`.

    Attributes:
        place: A path, a name of the zoo or a URL.
        prefix: Selection among several encoders in the file, or None.
        sha256: Digits that start the checksum of the file, or None.
    """

    place: str
    prefix: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, spec: str) -> "Address":
        """Parse a specification; if a file with # in its name exists, the whole text is its path.

        Raises:
            UserError: The part after the # is neither of the two.
        """
        place, sharp, fragment = spec.partition("#")
        if "://" not in spec:
            if home.expanded(spec).exists():
                return cls(spec)
            place, sharp, fragment = spec.rpartition("#")
            if not sharp or not fragment.startswith(("prefix=", "sha256=")):
                return cls(spec)
        options: dict[str, str] = {}
        for option in fragment.split("&") if sharp else ():
            name, equals, value = option.partition("=")
            if name not in ("prefix", "sha256") or not equals or name in options:
                raise UserError(
                    f"{place}: behind the # expected sha256=DIGITS, prefix=NAME (of several encoders in "
                    "one file), or both with & between them"
                )
            options[name] = value
        digits = options["sha256"].lower() if "sha256" in options else None
        if digits is not None:
            download.check_digits(place, digits)
        return cls(place, options.get("prefix"), digits)


def find(spec: str, model: str = "") -> Path:
    """Return the file that a config refers to, downloaded if needed.

    Args:
        spec: A path; a name of the zoo; `run:WORKDIR@strategy=full,seed=0,epoch=50`, an encoder of a study
            (see `run_reference`); `https://HOST/FILE`, `hf://OWNER/REPOSITORY/FILE` or
            `package://PACKAGE/FILE`. Each may end with `#sha256=DIGITS` to verify the file
            (`hf://...@REVISION` selects a revision), and with `#prefix=NAME` to select one of several
            encoders in the file.
        model: Name of the model to load; a zoo entry for another model is refused.

    Raises:
        UserError: The file does not exist or cannot be obtained; says what to do.
    """
    place, _, digits = Address.of(spec)
    if place.startswith(SCHEME):
        return _verified(RunReference.of(place).path(), digits)
    if zoo.is_name(place):
        return _verified(_from_zoo(place, model), digits)
    scheme = place.partition("://")[0] if "://" in place else ""
    if scheme in ("https", "http"):
        if urllib.parse.urlsplit(place).path.endswith(sharded.SUFFIX):
            raise UserError(
                f"{place}: an index of several files; download them into one folder and pass its path"
            )
        return download.fetch(place, sha256=digits)
    if scheme == "hf":
        return _verified(_from_hub(place), digits)
    if scheme == "package":
        return _verified(_packaged(place), digits)
    if scheme:
        raise UserError(f"{place}: unknown address {scheme}://; expected {EXPECTED}")
    path = home.expanded(place)
    if not path.exists():
        if unreadable.is_tensorflow_prefix(path):
            raise UserError(unreadable.tensorflow_prefix(path))
        raise UserError(_missing(path))
    return _verified(path, digits)


def _default(model: str) -> Path:
    """Return the file of a model's default ImageNet weights."""
    entry = registry.entry(model)
    if entry.package is None:
        known = [n for n in zoo.names(model) if n.startswith(("torchvision:", "timm:", "keras:"))]
        such = f"pass --config.weights={known[0]} to download them, or " if known else ""
        files = (
            "a Keras .h5" if model.endswith("_keras") else "a torchvision .pth or .safetensors or a Keras .h5"
        )
        raise UserError(
            f"no package carries ImageNet weights of {model!r}: {such}--config.weights=PATH, {files} file of "
            "that model"
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
        path = by_hand(name)
        if path.is_file():
            return path
        raise UserError(
            f"{name}: cannot be downloaded by a program: {entry.by_hand}; put the file at {path}, or pass "
            "--config.weights=PATH"
        )
    return download.fetch(entry.url, sha256=entry.sha256)


def by_hand(name: str) -> Path:
    """Return where the file of a zoo entry without a download is looked for, whether or not it is there.

    Args:
        name: Name of the entry.
    """
    return download.folder() / name.partition(":")[0] / zoo.entry(name).file


def _packaged(address: str) -> Path:
    """Return a file inside an installed package; the package is located, not imported."""
    package, _, file = address.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{address}: no package {package!r} here; expected: pip install {package.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = safe_paths.inside(root, root.joinpath(*safe_paths.check(file, address)), address)
    if not path.is_file():
        names = [str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()]
        raise UserError(f"{address}: no such file in the package; {nearest(file, names)}")
    return path


def _from_hub(address: str) -> Path:
    """Return a file of the Hugging Face hub, and every file that it is the index of beside it."""
    rest, _, revision = address.removeprefix("hf://").partition("@")
    owner, _, rest = rest.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{address}: expected hf://OWNER/REPOSITORY/FILE")
    safe_paths.check(file, address)

    def download_one(file: str) -> Path:
        return hub.fetch(f"{owner}/{repository}", file, revision, address)

    path = download_one(file)
    if path.name.endswith(sharded.SUFFIX):
        folder = file.rpartition("/")[0]
        for each in sorted(set(sharded.shards(path).values())):
            download_one(f"{folder}/{each}" if folder else each)
    return path


def _verified(path: Path, sha256: str | None) -> Path:
    if sha256 and not (found := identity.digest(path)).startswith(sha256):
        raise UserError(f"{path}: its sha256 is {found}, expected {sha256}")
    return path


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such weight file, and no folder {path.parent} (weights: {EXPECTED})"
    words = (IMAGENET, RANDOM, *zoo.names()) if path.name == str(path) else ()
    hint = nearest_beside(path, lambda entry: entry.suffix.lower() in readers.SUFFIXES, words)
    return f"{path}: no such weight file; {hint} (weights: {EXPECTED})"
