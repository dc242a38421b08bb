"""ACDC: short-axis slices of the heart at end-diastole and end-systole."""

from collections.abc import Iterator
from pathlib import Path

from dapt_jax.data import nifti
from dapt_jax.data.plane import Plane, Window
from dapt_jax.data.records import Record
from dapt_jax.data.sets import tree
from dapt_jax.data.sets.registry import CLASSIFICATION, SEGMENTATION, TWO_SPLITS, file_set
from dapt_jax.errors import UserError


@file_set(
    kind="acdc",
    title="ACDC",
    recipe="ACDC.zip (humanheart-project.creatis.insa-lyon.fr)",
    licence="CC BY-NC-SA 4.0",
    size="150 patients, two phases each",
    splits="official: training/ (100 patients) and testing/ (50)",
    layout=(
        "training/patient001/Info.cfg with patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz, "
        "testing/ likewise"
    ),
    classes=("NOR", "MINF", "DCM", "HCM", "RV"),
    tasks=(SEGMENTATION, CLASSIFICATION),
    segments=("background", "right ventricle", "myocardium", "left ventricle"),
    official=TWO_SPLITS,
)
def acdc(root: Path, *, window: str = "") -> Iterator[Record]:
    """Yield every slice of the two frames named in Info.cfg; columns `phase` (ED, ES) and `slice`.

    Args:
        root: Folder that contains training/ and testing/.
        window: Black and white, see `Window.parse`; by default the 1st and 99th percentile of the volume.
    """
    shown = Window.parse(window)
    for info in sorted(root.rglob("Info.cfg")):
        patient = info.parent.name
        about = _info(info)
        split = {"training": "train", "testing": "test"}.get(info.parent.parent.name, "")
        for phase in ("ED", "ES"):
            stem = f"{patient}_frame{int(about[phase]):02d}"
            image = tree.needed(info.parent, f"{stem}.nii.gz", f"{stem}.nii")
            drawn = tree.needed(info.parent, f"{stem}_gt.nii.gz", f"{stem}_gt.nii")
            for index in range(nifti.length(image)):
                written = f"{tree.relative(image, root)}[{index}]"
                yield Record(
                    written,
                    image=Plane(image, index, window=shown),
                    written=written,
                    labels=(about["Group"],),
                    mask=Plane(drawn, index),
                    group=patient,
                    columns={"split": split, "phase": phase, "slice": str(index)},
                )


def _info(path: Path) -> dict[str, str]:
    """Return the entries of Info.cfg, such as "ED: 1"."""
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    about = {key.strip(): value.strip() for key, _, value in lines}
    for key in ("ED", "ES", "Group"):
        if not about.get(key) or (key != "Group" and not about[key].isdecimal()):
            raise UserError(
                f"{path}: {key} is {about.get(key)!r}; expected the lines 'ED: 1', 'ES: 12', 'Group: DCM'"
            )
    return about
