"""Writing of weights: in our own format for `locate.load`, and with the names of other tools.

Our format has flat paths as keys, HWIO convolution kernels, and (in, out) matrices.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
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
from dapt_jax.models.encoders import vit
from dapt_jax.ops import choice
from dapt_jax.runtime import atomic_files
from dapt_jax.weights import normalisation, npz, orbax_folder, tables
from dapt_jax.weights.paths import flatten

SUFFIXES = (".safetensors", ".npz")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms of an exported program."""

MODEL, LAST_GROUP, ORIGIN = "dapt_jax.model", "dapt_jax.last_group", "dapt_jax.origin"
"""Keys of the metadata of files of ours: architecture, last layer group, and origin as JSON."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A PyTorch library that builds a model of the registry.

    Attributes:
        name: Name of the library.
        model: The library's name for the model.
        scheme: Names of its state dict.
    """

    name: str
    model: str
    scheme: tables.Scheme

    @property
    def file(self) -> str:
        """File name for this library's format."""
        return f"{self.name}.safetensors"

    def snippet(
        self, encoder: Encoder, side: int, *, file: str = "", outputs: int = 0, is_whole: bool = True
    ) -> str:
        """Return the lines with which a user loads a file, without imports.

        timm's and torchvision's transformers are made for one size of image. The file has positions of the grid that
        the encoder was pretrained on, which these lines resample as the encoder does.

        torchvision builds its models with a head, which the file does not contain; the file also lacks the
        layers that a truncated encoder lacks.

        Args:
            encoder: The encoder.
            side: Side in pixels of its images.
            file: Name of the file; empty for `self.file`.
            outputs: Logits of the head in the file; 0 for a file without a head.
            is_whole: Whether the encoder is not truncated.
        """
        strict = "" if is_whole else ", strict=False"
        read = f'safetensors.torch.load_file("{file or self.file}")'
        if self.name != "timm":
            made = f"model = torchvision.models.{self.model}()"
            return f"{made}\nmodel.load_state_dict({read}, strict=False)"
        variant = vit.VARIANTS.get(encoder.name)
        more = ', global_pool="token"' if variant and variant.is_rotary else ""
        resampled = ""
        if variant and _has_positions_of_another_size(encoder, side):
            more = f", img_size={side}"
            grid = side // variant.patch
            resampled = (
                f"positions = timm.layers.resample_abs_pos_embed(\n"
                f'    state["pos_embed"], [{grid}, {grid}], num_prefix_tokens={int(not variant.registers)}, '
                f"antialias={variant.antialias})\n"
                'state["pos_embed"] = positions\n'
            )
        made = f'model = timm.create_model("{self.model}", num_classes={outputs}{more})'
        if not resampled:
            return f"{made}\nmodel.load_state_dict({read}{strict})"
        return f"{made}\nstate = {read}\n{resampled}model.load_state_dict(state{strict})"


def _has_positions_of_another_size(encoder: Encoder, side: int) -> bool:
    return bool(encoder.token_patch) and side != encoder.image_size


def libraries(encoder: Encoder, side: int = 0) -> tuple[Library, ...]:
    """Return the PyTorch libraries that build a model of the registry with the same weights.

    There are none for Keras' variants. At sizes of images other than that of its pretraining, torchvision has no
    transformers with learnt positions that compute the same, and timm none with shifted windows.

    Args:
        encoder: The encoder.
        side: Side in pixels of its images; 0 for that of its pretraining.
    """
    schemes = {scheme.name: scheme for scheme in tables.schemes(encoder.name)}
    found = [
        # If timm has no names of its own for a model, its names are those of torchvision.
        Library(library, name, schemes.get(library) or schemes["torchvision"])
        for library, name in registry.entry(encoder.name).libraries.items()
    ]
    side = side or encoder.image_size
    without = {"torchvision"} if _has_positions_of_another_size(encoder, side) else set[str]()
    if encoder.name.startswith("swin") and side != encoder.image_size:
        without = {"timm"}
    return tuple(each for each in found if each.name not in without)


def write(
    path: str | Path,
    params: Tree,
    batch_stats: Tree,
    encoder: Encoder | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters and batch-norm statistics to one file under our own names.

    Args:
        path: Output file; its suffix selects the format, `.safetensors` or `.npz`.
        params: Nested dict of arrays.
        batch_stats: Nested dict of arrays; its leaves (`mean`, `var`) share no path with those of `params`.
        encoder: Encoder of the weights; the file records the normalisation that it expects, and its last layer
            group.
        origin: What the file records of the weights' origin, as plain JSON values.

    Raises:
        UserError: The suffix is neither of the two.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: weights are written as {' or '.join(SUFFIXES)}")
    arrays = {
        key: np.ascontiguousarray(leaf) for key, leaf in (flatten(params) | flatten(batch_stats)).items()
    }
    about = about_encoder(encoder) if encoder else {}
    if origin:
        about[ORIGIN] = json.dumps(origin)
    save(path, arrays, about or None)


def about_encoder(encoder: Encoder) -> dict[str, str]:
    """Return the metadata of the encoder that a file stores."""
    return {
        MODEL: encoder.name,
        LAST_GROUP: encoder.groups[-1],
        **normalisation.to_metadata(encoder.preprocess),
    }


def save(path: Path, arrays: dict[str, Any], about: dict[str, str] | None = None) -> None:
    """Write arrays by name atomically, with metadata in a fixed order, as the suffix says."""
    # Not by the library's own writer, whose files none but their owner may read, whatever the umask.
    with atomic_files.replacing(path) as file:
        if path.suffix == ".npz":
            if about:
                arrays = {**arrays, npz.METADATA: np.frombuffer(_as_json(about), np.uint8)}
            np.savez(file, **arrays)
        else:
            file.write(_with_sorted_metadata(safetensors.numpy.save(arrays, about)))


def _as_json(about: Mapping[str, str]) -> bytes:
    return json.dumps(about, sort_keys=True).encode()


def _with_sorted_metadata(content: bytes) -> bytes:
    """Return a safetensors file with sorted metadata in its header: the library draws a new order for each file.

    Equal weights then have equal files, bit for bit.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if metadata := header.get("__metadata__"):
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join((content[:8], text.ljust(size), memoryview(content)[8 + size :]))


def named(
    encoder: Encoder, params: Tree, batch_stats: Tree, scheme: tables.Scheme, outputs: int = 0
) -> dict[str, np.ndarray]:
    """Return an encoder's arrays under the names and in the layouts of other files.

    Args:
        encoder: Encoder of the arrays.
        params: Nested dict of the encoder's parameters, and of a head.
        batch_stats: Nested dict of its statistics.
        scheme: Names to use.
        outputs: Logits of the head in `params`; 0 to leave a head out.

    Returns:
        Contiguous float32 arrays by name. `merge.merge` converts them back to bit-identical parameters, or to those of
        `Scheme.equivalent`.

    Raises:
        UserError: An array cannot be stored under these names.
    """
    wanted = {key: value for key, value in params.items() if key != HEAD or outputs}
    ours = scheme.equivalent(flatten(wanted) | flatten(batch_stats))
    entries = tables.table(scheme, Classifier(encoder, outputs or 1))
    theirs = {}
    for path, array in ours.items():
        array = np.asarray(array, np.float32)
        found = np.ascontiguousarray(entries[path].restore(array))
        back = entries[path].convert(found)
        if back.shape != array.shape or back.tobytes() != array.tobytes():
            raise UserError(f"{path} of {encoder.name!r} cannot be kept under {scheme.name} names")
        theirs[entries[path].key] = found
    return theirs


def write_named(
    path: Path, encoder: Encoder, params: Tree, batch_stats: Tree, scheme: tables.Scheme, outputs: int = 0
) -> None:
    """Write an encoder as safetensors under the names of other files; see `named`."""
    arrays = named(encoder, params, batch_stats, scheme, outputs)
    save(path, arrays, {"format": "pt", **about_encoder(encoder)})


def write_orbax(folder: Path, params: Tree, batch_stats: Tree, encoder: Encoder | None = None) -> None:
    """Write an orbax checkpoint with one array per path, which `locate.load` accepts like a file.

    A file beside the arrays records the normalisation that the encoder expects, and its last layer group.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    arrays = {path: np.asarray(leaf) for path, leaf in (flatten(params) | flatten(batch_stats)).items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), arrays, force=True)
    if encoder:
        atomic_files.write_text(folder / orbax_folder.ABOUT, _as_json(about_encoder(encoder)).decode() + "\n")


def write_stablehlo(path: Path, encoder: Encoder, params: Tree, batch_stats: Tree, image_size: int) -> None:
    """Write an encoder as a program: StableHLO that includes its weights, for any batch size.

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

    with choice.formulation("lax"):  # for every platform, not only for the machine that writes it
        program = jax.export.export(jax.jit(features), platforms=PLATFORMS)(images)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(program.serialize())
    partial.replace(path)
