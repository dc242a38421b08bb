"""Sets of stated size in the place of those that are not here: costs and programs depend on nothing else."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dapt_jax.data import near_duplicates
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.framing import Framing
from dapt_jax.data.intensity import EIGHT_BITS, Range
from dapt_jax.data.plane import Source as Place
from dapt_jax.data.sets import SETS
from dapt_jax.data.sets.registry import SEGMENTATION
from dapt_jax.data.sources import KINDS
from dapt_jax.errors import UserError, nearest
from dapt_jax.runtime import streams
from dapt_jax.settings import StudySettings
from dapt_jax.settings.sources import TASK_SPLITS, Sources

WITHOUT_IMAGES = ("plan", "aot")
"""Modes in which the size of a set that is not here may be stated."""

MOST_PATIENTS = 100_000
"""Patients of a set of stated size. Up to so many images are each of their own; dividing more would take long."""


class StatedImages(ImageStore):
    """Images of which only number and size are known: all black."""

    def __init__(self, names: tuple[str, ...], size: int):
        """Hold no pixels."""
        self.names, self.framing = names, Framing(size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.zeros((self.size, self.size, 3), np.uint8)

    @property
    def is_of_files(self) -> bool:
        """True: they stand for files."""
        return True

    def for_crop(self, index: int, most: int) -> np.ndarray:
        """Return a picture of the largest size, in colour."""
        return np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (most, most, 3))

    def source(self, index: int) -> Place | None:
        """Return None: there is no file."""
        return None

    def inside(self, index: int) -> tuple[int, int, int, int]:
        """Return the whole image: nothing is padded."""
        return 0, 0, self.size, self.size

    def take(self, indices: Sequence[int] | np.ndarray) -> "StatedImages":
        """Return the images at `indices`."""
        return StatedImages(tuple(self.names[index] for index in np.asarray(indices, np.int64)), self.size)

    def at_size(self, size: int) -> "StatedImages":
        """Return as many images of another side."""
        return StatedImages(self.names, size)

    def ranges(self) -> list[Range]:
        """Return the range of 8-bit images for each."""
        return [EIGHT_BITS] * len(self)

    def constant(self) -> np.ndarray:
        """Return False for every image, bool [n]."""
        return np.zeros(len(self), bool)

    def digest(self) -> str:
        """Return a hash of the names."""
        return hashlib.blake2b("\0".join(self.names).encode(), digest_size=16).hexdigest()


def check_names(settings: StudySettings, titles: Sequence[str]) -> list[str]:
    """Refuse names in `plan.images` that no set has, and return a line for each set that this study lacks.

    The latter may belong to another study of a grid.

    Args:
        settings: Settings of the study.
        titles: Names of its sets in messages: "corpus", "corpora.NAME", or "TASK SPLIT".

    Raises:
        UserError: A name is neither `corpus`, `corpora.NAME` nor `TASK.SPLIT`, or is followed by no kind of a set.
    """
    known, lines = [title.replace(" ", ".") for title in titles], []
    for name in settings.plan.counts if settings.mode in WITHOUT_IMAGES else ():
        whole, _, kind = name.rpartition(".")
        is_followed = name not in known and (whole in known or (_is_of_set(whole) and not _is_of_set(name)))
        key = whole if is_followed else name
        if key not in known and not _is_of_set(key):
            raise UserError(f"plan.images names {name}, which is no set; {nearest(name, known)}")
        if is_followed and kind not in KINDS:
            raise UserError(f"plan.images names {name}; no kind {kind!r}; {nearest(kind, KINDS)}")
        if key not in known:
            lines.append(f"plan.images names {name}, and this study has no such set; {nearest(key, known)}")
    return lines


def _is_of_set(name: str) -> bool:
    """Return whether a name is that of a set of some study."""
    task, _, split = name.rpartition(".")
    return name == "corpus" or name.startswith("corpora.") or (bool(task) and split in TASK_SPLITS)


def read_or_stated(
    read: Callable[[], Dataset], settings: StudySettings, title: str, source: Sources
) -> Dataset:
    """Return a set; where nothing is trained, one of the size that `plan.images` states if it cannot be read.

    Args:
        read: Reads the set.
        settings: Settings of the study.
        title: Name of the set in messages: "corpus", or "TASK SPLIT".
        source: Description of the set.

    Raises:
        UserError: The set cannot be read, and the mode needs its images, or its size or classes are not stated;
            or it is here with another number of images than is stated.
    """
    if settings.mode not in WITHOUT_IMAGES:
        return read()
    stated, key = settings.plan.counts, title.replace(" ", ".")
    first = source if isinstance(source, Mapping) else source[0]
    count = stated.get(f"{key}.{first.get('kind')}", stated.get(key))
    try:
        dataset = read()
    except UserError as error:
        if not stated:
            raise
        if count is None:
            raise UserError(
                f"{error}; to plan without it, state its size: plan.images='{key}=NUMBER'"
            ) from error
        dataset = of_size(*count, settings.model.image_size, title, source)
        streams.say(f"{title}: not here ({error}); {count[0]:,} images by plan.images")
        return dataset
    if count and count[0] != len(dataset):
        raise UserError(
            f"plan.images states {count[0]:,} images of {key}, and the set is here with {len(dataset):,}; expected "
            "statements of sets alone that are not here"
        )
    if count and dataset.is_labelled:
        _check_classes(count[1], len(dataset.classes), key)
    return dataset


def _check_classes(stated: int, known: int, key: str) -> None:
    """Refuse a stated number of classes of a set whose classes are known and not as many."""
    if stated and stated != known:
        raise UserError(
            f"plan.images states {stated} classes of {key}, which has {known}; expected {key}=NUMBER alone"
        )


def of_size(count: int, number_of_classes: int, image_size: int, title: str, source: Sources) -> Dataset:
    """Return a set of so many images of up to `MOST_PATIENTS` patients, the classes in turn.

    Args:
        count: Number of images.
        number_of_classes: Number of classes, which get numbers for names; 0 for those of the description.
        image_size: Side of the images in pixels, unless the description has its own.
        title: Name of the set.
        source: Description of the set, with its classes, or of a public set whose classes are known.

    Raises:
        UserError: The classes are not known, or not as many as stated; or the segments of a set of masks are not
            known.
    """
    first = source if isinstance(source, Mapping) else source[0]
    entry = SETS.get(str(first.get("kind", "")))
    given = first.get("classes", ())
    dropped = first.get("drop_classes", ())
    classes = tuple(given.split(",") if isinstance(given, str) else given) or (entry.classes if entry else ())
    classes = tuple(name for name in classes if name not in dropped)
    task = first.get("task") or (entry.tasks[0] if entry else "classification")
    segments = tuple(first.get("segments") or ())
    if not segments and entry and task == SEGMENTATION:
        own = {key: value for key, value in first.items() if key in entry.options and value}
        segments = entry.segments(**{**entry.options, **own})
    if classes:
        _check_classes(number_of_classes, len(classes), title.replace(" ", "."))
    elif number_of_classes:
        classes = tuple(map(str, range(number_of_classes)))
    if len(classes) < 2 and not segments:
        raise UserError(
            f"plan.images needs the classes of the set {title}; expected classes=(...) in its description, or "
            f"plan.images='{title.replace(' ', '.')}={count}/CLASSES' with their number"
        )
    size = int(first.get("image_size") or image_size)
    images = StatedImages(tuple(f"{title}/{row:06d}" for row in range(count)), size)
    labels = np.arange(count) % max(len(classes), 1)
    multi_label = entry is not None and entry.multi_label
    side, nothing = near_duplicates.THUMBNAIL, np.zeros(count, np.uint8)
    thumbnails = np.broadcast_to(np.uint8(0), (count, side, side, 3))
    digest = int.from_bytes(hashlib.blake2b(title.encode(), digest_size=7).digest(), "little")
    digests = np.arange(count, dtype=np.uint64) + np.uint64(digest)
    near_duplicates.remember(images, near_duplicates.Looks(thumbnails, digests, *[nothing] * 4))
    return Dataset(
        name=title,
        images=images,
        labels=np.eye(len(classes), dtype=np.float32)[labels] if multi_label else labels,
        classes=classes,
        groups=np.array(images.names[:MOST_PATIENTS])[np.arange(count) % MOST_PATIENTS],
        masks=np.broadcast_to(np.uint8(0), (count, size, size)) if segments else None,
        segments=tuple(dict.fromkeys(segments)),
        overlapping=bool(segments and entry and entry.overlapping),
        merge_look_alikes=False,
    )
