"""COVID-QU-Ex: infected regions or lungs in chest radiographs.

The set is read as published or as the arrays of MedSegPretrainImageNet.
"""

from collections.abc import Iterator
from pathlib import Path

from dapt_jax.data import arrays
from dapt_jax.data.masks import Parts
from dapt_jax.data.plane import Plane
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import CLASSIFICATION, SEGMENTATION, THREE_SPLITS, file_set
from dapt_jax.errors import UserError, nearest

REGIONS = {"infection": ("infection masks", "inf_masks.npy"), "lung": ("lung masks", "masks.npy")}
UNKNOWN = "radiograph"
"""The class if the arrays name none."""


def _segments(region: str = "infection") -> tuple[str, ...]:
    return ("background", region)


@file_set(
    kind="covid_qu",
    title="COVID-QU-Ex",
    recipe="kaggle datasets download anasmohammedtahir/covidqu (take its folder Infection Segmentation Data)",
    licence="as its Kaggle page states",
    size="5,826 radiographs with masks (2,913 COVID-19), 33,920 in the part with lungs alone",
    splits="official: Train/, Val/, Test/; no patients are named",
    layout=(
        "Train/COVID-19/images, infection masks and lung masks and so on; or imgs.npy with inf_masks.npy "
        "or masks.npy"
    ),
    tasks=(SEGMENTATION, CLASSIFICATION),
    segments=_segments,
    official=THREE_SPLITS,
)
def covid_qu(root: Path, *, region: str = "infection") -> Iterator[Record]:
    """Yield the published images, or arrays [n, h, w] in folders "train and val" and "test".

    All non-zero mask values are marked.

    Args:
        root: Folder of Train/, or one above the arrays.
        region: "infection" or "lung".
    """
    if region not in REGIONS:
        raise UserError(f"region={region!r}; {nearest(region, REGIONS)}")
    folder_name, array_name = REGIONS[region]
    for drawn in sorted(root.rglob(array_name)):
        yield from _arrays(root, drawn, region)
    for folder in sorted(root.rglob(folder_name)):
        find = tree.finder(folder)
        for file in tree.images(tree.needed(folder.parent, "images")):
            written = tree.relative(file, root)
            yield Record(
                written,
                image=file,
                written=written,
                labels=(folder.parent.name,),
                mask=Parts(((find(file.name), 1),), like=file),
                columns={"split": folder.parent.parent.name.lower()},
            )


def _arrays(root: Path, drawn: Path, region: str) -> Iterator[Record]:
    images = tree.needed(drawn.parent, "imgs.npy")
    count, masks = arrays.length(images), arrays.length(drawn)
    if count != masks:
        raise UserError(f"{drawn}: {masks} masks for the {count} images of {images.name}")
    above = drawn.relative_to(root).parts
    label = "COVID-19" if region == "infection" or "COVID-19" in above else UNKNOWN
    for index in range(count):
        written = f"{tree.relative(images, root)}[{index}]"
        yield Record(
            written,
            image=Plane(images, index),
            written=written,
            labels=(label,),
            mask=Parts(((Plane(drawn, index), 1),), like=Plane(images, index)),
            columns={"split": "test" if "test" in above else "train"},
        )
