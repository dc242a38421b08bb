"""Files and folders that hold masks, by their names, so that no reader takes a mask for an image."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path

from dapt_jax.data import identity

_IMAGES = frozenset(("image", "images", "img", "imgs"))
_MASKS = frozenset(
    ("mask", "masks", "segmentation", "segmentations", "segmentationmask", "segmentationmasks", "annotation",
     "annotations", "groundtruth", "groundtruths", "gt", "labelmap", "labelmaps")
)  # fmt: skip
_LABELS = frozenset(("label", "labels"))
"""Words that mean masks in the name of a folder beside one of images, as in `imagesTr` and `labelsTr`."""
_OF_FILES = _MASKS | {"seg"}
_AT_THE_END = (("roi",), ("label",))
"""Words that mean a mask only at the end of a file's name, after all of its image's name."""
_OF_MASKS_ANYWHERE = _OF_FILES.union(*_AT_THE_END)


def in_words(name: str) -> tuple[str, ...]:
    """Return the words and numbers of a name in lower case.

    >>> in_words("LungMasks"), in_words("benign (1)_mask_2")
    (('lung', 'masks'), ('benign', '1', 'mask', '2'))
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", identity.clean(name))
    return tuple(re.findall(r"[^\W\d_]+|\d+", spaced.casefold()))


def is_of_images(folder: str) -> bool:
    """Return whether a folder's name says that it holds images."""
    return bool(_IMAGES.intersection(in_words(folder))) and not is_of_masks(folder)


def is_of_masks(folder: str, beside: Iterable[str] = ()) -> bool:
    """Return whether a folder's name says that it holds masks: any of its words does.

    >>> [is_of_masks(name) for name in ("lung masks", "Ground Truth", "masked", "labels")]
    [True, True, False, False]
    >>> is_of_masks("labelsTr", beside=["imagesTr", "labelsTr"])
    True

    Args:
        folder: Name of the folder.
        beside: Names of the folders in the same folder.
    """
    words = in_words(folder)
    if _MASKS.intersection((*words, *(first + second for first, second in pairwise(words)))):
        return True
    return bool(_LABELS.intersection(words)) and any(map(is_of_images, beside))


def apart(files: Sequence[Path], root: Path) -> tuple[list[Path], list[str]]:
    """Return the files that are no masks by their names, and lines on those that are.

    A mask is a file in a folder named so, or one that has its image beside it: `x_mask.png` or `x_lung_mask.png`
    beside `x.png`, `mask_1.png` beside `image_1.png`, `P1_seg.nii.gz` beside `P1_t1.nii.gz`. The word alone, without
    an image, makes no mask: it may be a patient's name.

    Args:
        files: Images and volumes.
        root: The folder that they are below; its own name says nothing.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        by_folder[file.parent].append(file)
    of_masks = folders_of_masks(by_folder, root)
    beside = {
        file
        for folder, together in by_folder.items()
        if folder not in of_masks
        for file in beside_their_images(together)
    }
    notes = []
    if of_masks:
        counts: Counter[Path] = Counter()
        for folder in sorted(of_masks):
            counts[of_masks[folder]] += len(by_folder[folder])
        (folder, count), *others = counts.items()
        rest = sum(each for _, each in others)
        more = (
            f", and {len(others)} more such folder{'s' * (len(others) > 1)} of {images(rest)}"
            if others
            else ""
        )
        notes.append(f"{folder}: left out, a folder of {images(count)} named as masks{more}")
    kept = [file for file in files if file.parent not in of_masks and file not in beside]
    if beside:
        first = next(file for file in files if file in beside)
        notes.append(
            f"{root}: left out {len(beside)} masks beside their images, first: {first.name}; kind "
            "'manifest' reads masks"
        )
    return kept, notes


def images(count: int) -> str:
    """Return a number of images in words."""
    return "1 image" if count == 1 else f"{count} images"


def folders_of_masks(folders: Iterable[Path], root: Path) -> dict[Path, Path]:
    """Return the folders whose files are masks, and for each the folder above it or itself that is named so.

    A folder that holds folders of masks, such as `Infection Segmentation Data` those of `images` and `lung masks`,
    says nothing of the other folders in it.
    """
    above = {folder: [folder, *folder.parents][: len(folder.relative_to(root).parts)] for folder in folders}
    inside: dict[Path, set[str]] = defaultdict(set)
    for each in set(chain.from_iterable(above.values())):
        inside[each.parent].add(each.name)
    named = {parent / name for parent, names in inside.items() for name in names if is_of_masks(name, names)}
    divided = {parent for folder in named for parent in folder.parents}
    found = {}
    for folder, parents in above.items():
        for each in parents:
            if each in named and (each == folder or each not in divided):
                found[folder] = each
                break
    return found


def beside_their_images(files: Sequence[Path]) -> set[Path]:
    """Return the files that are the masks of others, of the files of one folder."""
    if not any(_OF_MASKS_ANYWHERE.intersection(_words_of(file)) for file in files):
        return set()  # the usual case, which holds the words of no name
    words = {file: _words_of(file) for file in files}
    names = set(map(_without_image, words.values()))
    plain = [each for each in words.values() if not _OF_FILES.intersection(each)]
    starts = {each[:length] for each in plain for length in range(len(each) + 1)}
    return {file for file, each in words.items() if _is_mask(each, names, starts)}


def _words_of(file: Path) -> tuple[str, ...]:
    return in_words(Path(file.name.removesuffix(".gz")).stem)


def _is_mask(words: tuple[str, ...], names: set[tuple[str, ...]], starts: set[tuple[str, ...]]) -> bool:
    """Return whether a file is the mask of another.

    Args:
        words: The words of its name.
        names: Those of the files beside it, without the word "image".
        starts: The first words of those beside it whose names say nothing of masks.
    """
    at = max((place for place, word in enumerate(words) if word in _OF_FILES), default=-1)
    if at < 0:
        while words and words[-1].isdigit():
            words = words[:-1]
        return words[-1:] in _AT_THE_END and _without_image(words[:-1]) in names
    if at == len(words) - 1 and words[:at] in starts:
        return True
    before, after = _without_image(words[:at]), _without_image(words[at + 1 :])
    image = before or after
    return before in names or any(image[:length] in names for length in range(1, len(image) + 1))


def _without_image(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in _IMAGES)
