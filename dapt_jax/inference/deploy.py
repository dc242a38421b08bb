"""Target models as programs and weights of other tools: StableHLO, and PyTorch (timm) with the head."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dapt_jax.data import crops
from dapt_jax.inference import target_model
from dapt_jax.inference.predictor import head_logits
from dapt_jax.inference.target_model import TargetModel
from dapt_jax.losses import ClassificationLoss, SegmentationLoss
from dapt_jax.models import registry
from dapt_jax.models.classifier import HEAD
from dapt_jax.models.encoder import Tree
from dapt_jax.ops import choice
from dapt_jax.runtime import atomic_files, safe_paths, streams
from dapt_jax.weights import export

FOLDER, STABLEHLO = "export", "model.stablehlo"


def program(model: TargetModel) -> Callable[[UInt8[Array, "b h w c"]], Float[Array, "b ..."]]:
    """Return the function from images to probabilities: of classes [b, classes], of masks [b, h, w, outputs].

    They are means over the model's members, without calibration. Normalisation is inside. Of classes, images
    have the side `Reading.image_size`, and the crops of the model are inside too; of masks, they are one window
    of the side `About.input_side`.
    """
    about, objective = model.about, model.about.objective

    def classes(images: Array) -> Array:
        assert isinstance(objective, ClassificationLoss)
        params, batch_stats = jax.tree.map(jnp.asarray, (model.params, model.batch_stats))
        squares = crops.seen(images, about.input_side, about.crops)
        features = model.classifier.features(params, batch_stats, jnp.concatenate(squares))
        every = jnp.stack(
            [objective.probabilities(head_logits(member, features)) for member in model.members]
        )
        by_crop = every.reshape(len(model.members), len(squares), images.shape[0], every.shape[-1])
        return by_crop.mean((0, 1))

    def masks(images: Array) -> Array:
        assert isinstance(objective, SegmentationLoss)
        network = model.segmenter
        every = []
        for number in range(len(model.members)):
            params, batch_stats = jax.tree.map(jnp.asarray, model.segmenter_weights(number))
            every.append(objective.probabilities(network(params, batch_stats, images)))
        return jnp.stack(every).mean(0)

    return masks if about.segments else classes


def write_stablehlo(path: Path, model: TargetModel) -> None:
    """Write a model as StableHLO for any batch size; see `program`.

    `jax.export.deserialize(bytes).call(images)` takes uint8 images (b, side, side, 3) on any of
    `export.PLATFORMS`, without this package.
    """
    side = _side(model)
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, side, side, model.encoder.channels), jnp.uint8)
    with choice.formulation("lax"):  # for every platform, not only for the machine that writes it
        made = jax.export.export(jax.jit(program(model)), platforms=export.PLATFORMS)(images)
    with atomic_files.replacing(path) as file:
        file.write(made.serialize())


def _side(model: TargetModel) -> int:
    """Return the side in pixels of the images that the program takes."""
    about = model.about
    return about.input_side if about.segments else about.reading.image_size


def timm_library(model: TargetModel) -> export.Library | None:
    """Return the layout of timm for a model; None where timm has no such network.

    That is so of truncated encoders, of masks, of heads that are not one linear layer, and of shifted windows at other
    sizes than that of their pretraining.
    """
    is_linear = not model.about.segments and all("layer1" not in member for member in model.members)
    is_whole = model.encoder.groups == registry.build(model.about.model).groups
    of_side = export.libraries(model.encoder, model.about.input_side)
    found = [each for each in of_side if each.name == "timm"]
    return found[0] if found and is_linear and is_whole else None


def write_timm(folder: Path, model: TargetModel) -> list[Path]:
    """Write each member as weights of timm, with the scaling of features inside the head.

    Returns:
        The files, `timm-foldF.safetensors`; none where timm has no such network.
    """
    library = timm_library(model)
    if library is None:
        return []
    files = []
    for fold, member in zip(model.about.folds, model.members, strict=True):
        path = folder / f"timm-fold{fold}.safetensors"
        params = {**model.params, HEAD: _folded(member)}
        outputs = len(params[HEAD]["bias"])
        export.write_named(path, model.encoder, params, model.batch_stats, library.scheme, outputs)
        files.append(path)
    return files


def _folded(member: Tree) -> Tree:
    """Return the kernel [d, outputs] and bias of unscaled features."""
    layer = member["layer0"]
    kernel = np.asarray(layer["kernel"], np.float64) * member["factor"]
    bias = np.asarray(layer["bias"], np.float64) - kernel @ np.asarray(member["shift"], np.float64)
    return {"kernel": np.ascontiguousarray(kernel.T, np.float32), "bias": bias.astype(np.float32)}


def write(folder: Path, model: TargetModel) -> list[str]:
    """Write a model in every format that there is for it, with a page that says how each is loaded.

    Returns:
        Names of the files.
    """
    write_stablehlo(folder / STABLEHLO, model)
    names = [STABLEHLO]
    names += [path.name for path in write_timm(folder, model)]
    atomic_files.write_text(folder / "README.md", _page(model))
    return names


def run(places: Sequence[str], workdir: Path) -> list[Path]:
    """Write target models to `workdir/export/TASK/STRATEGY-PROTOCOL/NAME`, each in its formats.

    Args:
        places: Files of target models, a folder of them, or a study's workdir.
        workdir: Folder of the results.

    Returns:
        The folders.

    Raises:
        UserError: There is no target model.
    """
    made = []
    for file in target_model.find(places):
        model = target_model.read(file)
        task, strategy, protocol = model.about.family
        name = f"{FOLDER}/{task}/{strategy}-{protocol}/{file.stem}"
        folder = workdir.joinpath(*safe_paths.check(name, file))
        names = write(folder, model)
        streams.say(f"export: {folder} ({', '.join(names)})")
        made.append(folder)
    return made


def _page(model: TargetModel) -> str:
    about, preprocess = model.about, model.encoder.preprocess
    outputs = f"the probabilities of {', '.join(about.classes)}"
    if about.segments:
        outputs = f"the probabilities of each pixel for {', '.join(about.segments)}"
    parts = [
        f"# {about.task}: `{about.strategy}`, `{about.protocol}`, seed {about.seed}",
        f"Images are RGB of {_side(model)} x {_side(model)} pixels from 0 to 255, {_framing(model)}; the output is "
        f"{outputs}, the mean over {_averaged(model)}, not calibrated. A research tool: not a medical device.",
        f"`{STABLEHLO}`, uint8 in, {'' if about.segments else 'crops and '}normalisation inside:",
        "    program = jax.export.deserialize(open('model.stablehlo', 'rb').read())\n"
        "    program.call(images)",
    ]
    if (library := timm_library(model)) is not None:
        mean, std = list(preprocess.mean), list(preprocess.std)
        order = ", channels in the order blue, green, red" if preprocess.bgr else ""
        alone = ", of one crop each" if about.crops == 10 else ""
        parts += [
            f"`timm-foldF.safetensors`, one file for each member; logits{alone}, of squares of {about.input_side} "
            f"pixels normalised by (x - {mean}) / {std}{order}:",
            textwrap.indent(
                library.snippet(
                    model.encoder, about.input_side, file="timm-fold0.safetensors", outputs=_outputs(model)
                ),
                "    ",
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _framing(model: TargetModel) -> str:
    """Return how an image becomes one that the program takes, in words."""
    reading, side = model.about.reading, model.about.input_side
    crop = f" after a centre crop of {reading.crop} pixels" if reading.crop else ""
    square = f"made square as by model.resize={reading.resize}{crop}"
    if not model.about.segments or side == reading.image_size:
        return square
    return (
        f"a window of what is {square} at {reading.image_size} pixels: predictions and scores of this package are "
        f"means over windows that overlap by {model.about.overlap:g}, the output is that of one"
    )


def _averaged(model: TargetModel) -> str:
    """Return what the output is the mean over, in words."""
    about = model.about
    members = f"{len(model.members)} members"
    if about.crops == 10:
        return f"{members} and ten crops of {about.input_side} pixels"
    is_cut = not about.segments and about.input_side < about.reading.image_size
    return f"{members}, of the central {about.input_side} pixels" if is_cut else members


def _outputs(model: TargetModel) -> int:
    return len(model.members[0]["layer0"]["bias"])
