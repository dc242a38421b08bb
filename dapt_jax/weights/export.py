"""Writes weights: for `locate.load` (flat paths as keys, HWIO, in x out), and for other tools under their names and layouts."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from dapt_jax.errors import UserError
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD, Classifier
from dapt_jax.models.encoder import Encoder, Tree
from dapt_jax.ops import choice
from dapt_jax.weights import normalisation, tables
from dapt_jax.weights.paths import flatten

SUFFIXES = (".safetensors", ".npz")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""What an exported program runs on."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A PyTorch library that builds a model of the registry.

    Attributes:
        name: Of the library.
        model: What it calls the model.
        scheme: Names of its state dict.
    """

    name: str
    model: str
    scheme: tables.Scheme

    @property
    def file(self) -> str:
        """What a file under this library's names is called."""
        return f"{self.name}.safetensors"

    def snippet(self, *, is_whole: bool) -> str:
        """Return the two lines with which a user loads `file`, imports aside.

        torchvision builds its models with a head, which the file has none for; nor has it what a cut encoder
        lacks.
        """
        strict = "" if is_whole else ", strict=False"
        if self.name == "timm":
            made = f'timm.create_model("{self.model}", num_classes=0)'
        else:
            made, strict = f"torchvision.models.{self.model}()", ", strict=False"
        return f'model = {made}\nmodel.load_state_dict(safetensors.torch.load_file("{self.file}"){strict})'


def libraries(model: str) -> tuple[Library, ...]:
    """Return the PyTorch libraries that build a model of the registry with weights of the same names; none for Keras' variants."""
    schemes = {scheme.name: scheme for scheme in tables.schemes(model)}
    return tuple(
        # Where timm has no names of its own for a model, its names are torchvision's.
        Library(library, name, schemes.get(library) or schemes["torchvision"])
        for library, name in registry.entry(model).libraries.items()
    )


def write(path: str | Path, params: Tree, batch_stats: Tree, encoder: Encoder | None = None) -> None:
    """Write parameters and batch-norm statistics to one file under our own names.

    Args:
        path: Where to; its suffix decides the format, `.safetensors` or `.npz`.
        params: Nested dict of arrays.
        batch_stats: Likewise; its leaves (`mean`, `var`) share no path with those of `params`.
        encoder: Encoder that they are of; a `.safetensors` file remembers what it expects of an image.

    Raises:
        UserError: The suffix is neither of the two.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are written as {' or '.join(SUFFIXES)}")
    arrays = {
        key: np.ascontiguousarray(leaf) for key, leaf in (flatten(params) | flatten(batch_stats)).items()
    }
    _save(path, arrays, _about(encoder) if encoder else None)


def _about(encoder: Encoder) -> dict[str, str]:
    """Return what a file remembers of the encoder whose weights it holds."""
    return {"dapt_jax.model": encoder.name, **normalisation.to_metadata(encoder.preprocess)}


def _save(path: Path, arrays: dict[str, Any], about: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial{path.suffix}")
    if path.suffix == ".npz":
        np.savez(partial, **arrays)
    else:
        safetensors.numpy.save_file(arrays, partial, about)
    partial.replace(path)  # all of it or nothing, should the process be killed half-way


def named(encoder: Encoder, params: Tree, batch_stats: Tree, scheme: tables.Scheme) -> dict[str, np.ndarray]:
    """Return an encoder's arrays under the names and in the layouts of other files.

    Args:
        encoder: Whose they are.
        params: Nested dict of the encoder's parameters; a head is left out.
        batch_stats: Likewise of its statistics.
        scheme: The names.

    Returns:
        Contiguous float32 arrays by name. `merge.merge` makes the same parameters of them, to the bit.

    Raises:
        UserError: An array cannot be kept under these names.
    """
    ours = flatten({key: value for key, value in params.items() if key != HEAD}) | flatten(batch_stats)
    entries = tables.table(scheme, Classifier(encoder, 1))
    theirs = {}
    for path, array in ours.items():
        array = np.asarray(array, np.float32)
        found = np.ascontiguousarray(entries[path].restore(array))
        back = entries[path].convert(found)
        if back.shape != array.shape or back.tobytes() != array.tobytes():
            raise UserError(f"{path} of {encoder.name!r} cannot be kept under {scheme.name} names")
        theirs[entries[path].key] = found
    return theirs


def write_named(path: Path, encoder: Encoder, params: Tree, batch_stats: Tree, scheme: tables.Scheme) -> None:
    """Write an encoder as safetensors under the names of other files; see `named`."""
    _save(path, named(encoder, params, batch_stats, scheme), {"format": "pt", **_about(encoder)})


def write_orbax(folder: Path, params: Tree, batch_stats: Tree) -> None:
    """Write an orbax checkpoint: one array per path, which `locate.load` takes as it takes a file."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    arrays = {path: np.asarray(leaf) for path, leaf in (flatten(params) | flatten(batch_stats)).items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), arrays, force=True)


def write_stablehlo(path: Path, encoder: Encoder, params: Tree, batch_stats: Tree, image_size: int) -> None:
    """Write an encoder as a program: StableHLO with its weights inside, for any batch size.

    `jax.export.deserialize(bytes).call(images)` takes uint8 images (b, h, w, c) of `image_size` and returns
    pooled float32 features (b, d), normalisation included, on any of `PLATFORMS`, without this package.
    """
    model = Classifier(encoder, 1)
    (batch,) = jax.export.symbolic_shape("b")
    channels = encoder.preprocess.channels
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, channels), jnp.uint8)

    def features(images: jax.Array) -> jax.Array:
        inside, recorded = jax.tree.map(jnp.asarray, (params, batch_stats))
        return model.features(inside, recorded, images)

    with choice.formulation("lax"):  # the one for every platform, not the one for the machine that writes it
        program = jax.export.export(jax.jit(features), platforms=PLATFORMS)(images)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(program.serialize())
    partial.replace(path)
