"""Strict assignment of a file's arrays to a classifier: none may be missing or have another shape."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from dapt_jax.errors import UserError, nearest, one_line
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Tree, init_params
from dapt_jax.weights import adapt, encoders, identity, onnx, tables
from dapt_jax.weights.paths import flatten, unflatten
from dapt_jax.weights.source import Weights
from dapt_jax.weights.tables import prefixes
from dapt_jax.weights.tables.prefixes import Choice

HeadMode = Literal["auto", "load", "new"]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Origin of a classifier's arrays.

    Attributes:
        loaded: Our paths that were filled from the file.
        initialised: Our paths that were initialised from the seed.
        left_over: Keys of the file that none of our paths use.
        source: The file, and the naming scheme that it uses.
        prefix: Prefix of every key.
        adapted: Our paths whose arrays were converted to fit, each with the conversion.
        choice: For a file with several encoders, the selected one, the reason, and how to select another.
        normalisation: Normalisation that the encoder applies to images, and its origin.
        fingerprint: sha256 of the encoder's arrays as loaded; see `identity.fingerprint`. A head is excluded,
            so that one encoder with heads for several tasks has one fingerprint.
        source_sha256: sha256 of the file, or of the folder's files; empty for arrays without a file.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    left_over: tuple[str, ...]
    source: str
    prefix: str
    adapted: tuple[str, ...] = ()
    choice: str = ""
    normalisation: str = ""
    fingerprint: str = ""
    source_sha256: str = ""

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.loaded)} arrays loaded"]
        if self.prefix:
            whose = f" ({tables.LAYOUTS[self.prefix]})" if self.prefix in tables.LAYOUTS else ""
            parts.append(f"behind the prefix {self.prefix!r}{whose}")
        parts += [self.choice] if self.choice else []
        parts += self.adapted[:1]
        parts += [f"{len(self.adapted) - 1} more likewise"] if len(self.adapted) > 1 else []
        parts += (
            [f"{len(self.initialised)} initialised{_examples(self.initialised)}"] if self.initialised else []
        )
        parts += [f"{len(self.left_over)} left over{_examples(self.left_over)}"] if self.left_over else []
        parts += [f"images normalised as {self.normalisation}"] if self.normalisation else []
        parts += [f"fingerprint {self.fingerprint[:16]}"] if self.fingerprint else []
        return one_line(", ".join(parts))  # names in a file may contain any characters


def _examples(names: tuple[str, ...], most: int = 3) -> str:
    return f" ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"


def merge(
    classifier: Classifier,
    source: Mapping[str, np.ndarray],
    *,
    seed: int,
    head: HeadMode = "auto",
    stem: adapt.Stem = "auto",
    prefix: str | None = None,
) -> tuple[Tree, Tree, MergeReport]:
    """Fill a classifier's parameters and statistics from a file's arrays.

    Keys of groups that a truncated encoder lacks, of optimiser states and of other heads are left over.

    Args:
        classifier: Classifier to fill.
        source: Arrays by the names in the file; `Weights` are read one by one, and name themselves in the
            report.
        seed: Seed for initial values.
        head: `auto` uses the file's head if its shape fits, `load` requires it, `new` never uses it.
        stem: Conversion of a stem to another number of channels; see `adapt`.
        prefix: Selection among several encoders in the file (`student.backbone`; see
            `tables.prefixes.named`); None selects the averaged copy (`tables.prefixes.choose`).

    Returns:
        Parameters and statistics as nested dicts of float32 arrays, and the report.

    Raises:
        UserError: An array of the encoder is missing, has another shape, or is not finite floating point; the
            file belongs to another model, which the message names if it is known; or it has several encoders
            and the choice is ambiguous.
    """
    given = source if isinstance(source, Weights) else Weights(source, "the given weights")
    weights = onnx.with_joined_attention(given)
    scheme, entries, source, chosen = _recognise(classifier, weights, prefix)
    prefix, origin = chosen.prefix, source.origin
    params, batch_stats = classifier.abstract()
    shapes = {path: leaf.shape for path, leaf in (flatten(params) | flatten(batch_stats)).items()}

    skipped = [
        path for path in entries if _is_head(path) and not _takes_head(entries, shapes, prefix, source, head)
    ]
    wanted = {path: entry for path, entry in entries.items() if path not in skipped}
    _refuse_missing(wanted, prefix, source, origin)
    _refuse_other_axes(wanted, shapes, prefix, source, origin)
    adapted: list[str] = []

    def fit(path: str, entry: tables.Entry) -> np.ndarray:
        found = entry.convert(source.like(prefix + entry.key)).shape
        way = (
            adapt.way(classifier.encoder, path, found, shapes[path], stem) if found != shapes[path] else None
        )
        array = _fit(path, shapes[path], prefix, entry, source, origin, way)
        adapted.extend([f"{path}: {way.words}"] if way else [])
        return array

    loaded = {path: fit(path, entry) for path, entry in wanted.items()}
    left_over = tuple(sorted(set(source) - {prefix + entry.key for entry in wanted.values()}))
    if any(not key.startswith(f"{prefix}{scheme.head}{scheme.separator}") for key in left_over):
        _refuse_larger(classifier, scheme, source, len(loaded), origin)
    _refuse_richer(classifier, scheme, prefix, left_over, source, origin)
    _refuse_deeper(classifier, scheme, prefix, left_over, source, origin)

    drawn = flatten(init_params({HEAD: params[HEAD]}, classifier.kinds, seed)) if skipped else {}
    report = MergeReport(
        tuple(loaded),
        tuple(drawn),
        left_over,
        f"{origin}, {scheme.name} names",
        prefix,
        tuple(adapted),
        chosen.why,
        fingerprint=identity.fingerprint(
            {path: array for path, array in loaded.items() if not _is_head(path)}
        ),
        source_sha256=identity.digest_all(weights.path, weights.files) if weights.path else "",
    )
    is_stat = flatten(batch_stats)
    merged_params = unflatten({path: a for path, a in (loaded | drawn).items() if path not in is_stat})
    return merged_params, unflatten({path: a for path, a in loaded.items() if path in is_stat}), report


def _is_head(path: str) -> bool:
    return path.startswith(f"{HEAD}/")


def _recognise(
    classifier: Classifier, weights: Weights, given: str | None
) -> tuple[tables.Scheme, dict[str, tables.Entry], Weights, Choice]:
    """Return the scheme that finds most of the encoder in the file, with the arrays and the choice."""
    model = classifier.encoder.name
    schemes = [(scheme, tables.table(scheme, classifier)) for scheme in tables.schemes(model)]
    found = [(each, encoders.find(weights, given, scheme, _body(each))) for scheme, each in schemes]
    entries, best = max(found, key=lambda pair: pair[1].hits)
    scheme = best.scheme
    if given is not None and not best.hits:
        raise encoders.not_there(weights, given, [(scheme, _body(each)) for scheme, each in schemes])
    if best.hits < len(entries) / 2:
        raise _not_of(classifier, weights, best.hits, len(entries))
    shapes = {path: leaf.shape for tree in classifier.abstract() for path, leaf in flatten(tree).items()}
    source, chosen = encoders.decide(best, {path: shapes[path] for path in _body(entries)})
    return scheme, entries, source, chosen


def _not_of(classifier: Classifier, weights: Weights, hits: int, size: int) -> UserError:
    model, source = classifier.encoder.name, weights.only(_is_wanted)
    others = [name for name in registry.names() if name != model and _share(name, source) > 0.9]
    if others:
        looks = f"the names look like {' or '.join(others)}"
    else:
        looks = f"it holds {_examples(tuple(source)).strip(' ()') or 'nothing'}"
    unread = f"; objects of {', '.join(weights.unread[:3])} in it are not read" if weights.unread else ""
    known = ", ".join(scheme.name for scheme in tables.schemes(model))
    return UserError(
        f"{weights.origin}: not weights of {model!r}: {hits} of its {size} arrays found (names tried: "
        f"{known}); {looks}{unread}"
    )


def _is_wanted(key: str) -> bool:
    return not key.endswith("num_batches_tracked")


def _body(entries: Mapping[str, tables.Entry]) -> dict[str, tables.Entry]:
    """Return the encoder's part of a table."""
    return {path: entry for path, entry in entries.items() if not _is_head(path)}


def _hits(
    classifier: Classifier, scheme: tables.Scheme, source: Weights
) -> tuple[dict[str, tables.Entry], str, int]:
    """Return the table of a scheme, its best prefix in the file, and the number of keys found.

    The best prefix is the one with most of the encoder's keys.
    """
    entries = tables.table(scheme, classifier)
    found = prefixes.hits(_body(entries), scheme.separator, source)
    prefix = max(found, key=lambda name: (found[name], -len(name), name), default="")
    return entries, prefix, found.get(prefix, 0)


def _share(model: str, source: Weights) -> float:
    """Return the share of another registry model in a file, by names and shapes, from 0 to 1."""
    classifier = Classifier(registry.build(model), 1)
    shapes = flatten(classifier.encoder.abstract()[0])
    best = 0.0
    for scheme in tables.schemes(model):
        entries, prefix, _ = _hits(classifier, scheme, source)
        fits = sum(
            prefix + entries[path].key in source
            and entries[path].convert(source.like(prefix + entries[path].key)).shape == leaf.shape
            for path, leaf in shapes.items()
        )
        best = max(best, fits / len(shapes))
    return best


def _takes_head(
    entries: Mapping[str, tables.Entry],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    source: Weights,
    head: HeadMode,
) -> bool:
    """Return whether the file's head is used."""
    if head != "auto":
        return head == "load"
    paths = [path for path in entries if _is_head(path)]
    keys = {path: prefix + entries[path].key for path in paths}
    return all(
        key in source and entries[path].convert(source.like(key)).shape == shapes[path]
        for path, key in keys.items()
    )


def _refuse_missing(
    wanted: Mapping[str, tables.Entry], prefix: str, source: Mapping[str, Any], origin: str
) -> None:
    missing = [
        (path, prefix + entry.key) for path, entry in wanted.items() if prefix + entry.key not in source
    ]
    if missing:
        path, key = missing[0]
        others = f", {_examples(tuple(key for _, key in missing[1:])).strip(' ()')}" if missing[1:] else ""
        unknown = tuple(sorted(set(source) - {prefix + entry.key for entry in wanted.values()}))
        unasked = f"; nothing asks for {len(unknown)}{_examples(unknown)}" if unknown else ""
        raise UserError(
            f"{origin}: {len(missing)} arrays missing, first {key!r} (for {path}){others}; "
            f"{nearest(key, source)}{unasked}"
        )


_OTHER_AXES = {4: ((3, 2, 0, 1), (2, 3, 1, 0)), 2: ((1, 0),)}
"""Axis orders of kernels in other frameworks."""


def _refuse_other_axes(
    wanted: Mapping[str, tables.Entry],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    source: Weights,
    origin: str,
) -> None:
    """Refuse a file whose kernels all have another axis order than their names imply.

    Kernels with equal numbers of inputs and outputs fit either way: only the other kernels of the file show
    that these are transposed.
    """
    likes = {path: source.like(prefix + entry.key) for path, entry in wanted.items()}
    kernels = [path for path, like in likes.items() if like.ndim in _OTHER_AXES]
    unfit = [path for path in kernels if wanted[path].convert(likes[path]).shape != shapes[path]]
    for axes in _OTHER_AXES[likes[unfit[0]].ndim] if unfit else ():
        if likes[unfit[0]].ndim == len(axes) and all(
            wanted[path]
            .convert(likes[path].transpose(axes if likes[path].ndim == len(axes) else (1, 0)))
            .shape
            == shapes[path]
            for path in unfit
        ):
            key, stored = prefix + wanted[unfit[0]].key, likes[unfit[0]].shape
            raise UserError(
                f"{origin}: kernels are transposed: {key!r} has shape {stored}, its name tells of "
                f"{tuple(stored[axis] for axis in axes)}; so are {len(unfit)} of {len(kernels)} kernels"
            )


def _fit(
    path: str,
    shape: tuple[int, ...],
    prefix: str,
    entry: tables.Entry,
    source: Weights,
    origin: str,
    way: adapt.Way | None,
) -> np.ndarray:
    """Return one checked array in our layout."""
    key = prefix + entry.key
    like = entry.convert(source.like(key))
    if like.shape != shape and way is None:
        raise UserError(
            f"{origin}: {key!r} (for {path}) has shape {like.shape} in our layout, expected {shape}"
        )
    if not jax.numpy.issubdtype(like.dtype, np.floating):
        raise UserError(f"{origin}: {key!r} (for {path}) is {like.dtype}, expected floating point")
    array = np.array(entry.convert(source[key]), np.float32, order="C")
    # The extremes of a float array are finite exactly if all values are, and need no second array.
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise UserError(f"{origin}: {key!r} (for {path}) holds values that are not finite")
    return array if way is None else np.ascontiguousarray(way.convert(array), np.float32)


def _refuse_larger(
    classifier: Classifier, scheme: tables.Scheme, source: Weights, loaded: int, origin: str
) -> None:
    """Refuse the file of a deeper model, which contains every array of a shallower one.

    An example is a ResNet-34 file for a ResNet-18.
    """
    own = classifier.encoder.name
    size = len(flatten(registry.build(own).abstract()[0])) if own in registry.names() else loaded
    for name in registry.names():
        if scheme.module not in [other.module for other in tables.schemes(name)]:
            continue
        if name == own or len(flatten(registry.build(name).abstract()[0])) <= size:
            continue
        if _share(name, source) == 1.0:
            raise UserError(f"{origin}: these are the weights of {name!r}, not of {own!r}")


_UNUSED = ("attn_mask", "mask_token")
"""Last names of floating-point arrays inside layers that no encoder computes with: masks of shifted windows, and the
token that takes the place of masked patches in pretraining, which transformers keeps among a stem's."""


def _refuse_richer(
    classifier: Classifier,
    scheme: tables.Scheme,
    prefix: str,
    left_over: tuple[str, ...],
    source: Weights,
    origin: str,
) -> None:
    """Refuse a file whose layers have parameters that the model's lack: without them, they compute something else.

    Examples are a transformer with layer scale and a ResNet with squeeze-and-excitation. Names of PyTorch alone tell
    parameters from the state of moving averages.
    """
    if scheme.framework != "torch":
        return
    encoder, sign = classifier.encoder, scheme.separator
    whole = registry.build(encoder.name) if encoder.name in registry.names() else encoder
    known = {prefix + entry.key for entry in tables.table(scheme, Classifier(whole, 1)).values()}
    layers: dict[str, list[str]] = {}
    for path, entry in _body(tables.table(scheme, classifier)).items():
        layers.setdefault(encoder.group_of(path), []).append(entry.key.rpartition(sign)[0].replace(sign, "/"))
    inside = {os.path.commonpath(modules).replace("/", sign) for modules in layers.values()} - {""}
    starts = tuple(f"{prefix}{module}{sign}" for module in inside)
    unread = tuple(
        key
        for key in left_over
        if key.startswith(starts)
        and key not in known
        and key.rpartition(sign)[2] not in _UNUSED
        and _is_floating(source, key)
    )
    if unread:
        raise UserError(
            f"{origin}: weights of another architecture than {encoder.name!r}: its layers lack {len(unread)} arrays of "
            f"the file's{_examples(unread)}; expected weights whose layers hold no others"
        )


def _refuse_deeper(
    classifier: Classifier,
    scheme: tables.Scheme,
    prefix: str,
    left_over: tuple[str, ...],
    source: Weights,
    origin: str,
) -> None:
    """Refuse a file with more layer groups than the model: a deeper network that the registry does not have.

    Examples are an EfficientNet-B1 for a B0, whose widths are equal, and a ResNet-200 for a ResNet-152. Their arrays
    have the names of numbered layer groups, with other numbers (in Keras, letters).
    """
    name = classifier.encoder.name
    if name not in registry.names():
        return  # an encoder that is not registered does not tell what it was truncated from
    whole = registry.build(name)
    entries = _body(tables.table(scheme, Classifier(whole, 1)))
    known = {prefix + entry.key for entry in entries.values()}
    groups = {path: whole.group_of(path) for path in entries}
    numbered = {_without_numbers(entries[path].key) for path in entries if re.search(r"\d", groups[path])}
    more = tuple(
        key
        for key in left_over
        if key.startswith(prefix)
        and key not in known
        and _without_numbers(key.removeprefix(prefix)) in numbered
        and _is_floating(source, key)
    )
    if more:
        raise UserError(
            f"{origin}: weights of a deeper network than {name!r}, which has no layers for {len(more)} arrays of the "
            f"file{_examples(more)}; expected weights of its own depth"
        )


def _is_floating(source: Weights, key: str) -> bool:
    """Return whether an array of a file holds floating-point numbers: others are counts, no parameters."""
    return bool(jax.numpy.issubdtype(source.like(key).dtype, np.floating))


def _without_numbers(key: str) -> str:
    """Return a key without the numbers of its layers: `blocks.#.#.bn#.weight`, and `block#_bn/beta` of Keras' block2c."""
    return re.sub(r"\d+([a-z](?=[_/]))?", "#", key)
