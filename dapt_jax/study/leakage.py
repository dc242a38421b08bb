"""No image and no patient on both sides: what an encoder has seen in adaptation is not what it is scored on."""

import itertools
import os
from collections.abc import Mapping, Sequence

from dapt_jax.data.dataset import Dataset
from dapt_jax.data.splits import check_disjoint
from dapt_jax.study.tasks import Task


def check_leakage(tasks: Sequence[Task], corpora: Mapping[str, Dataset]) -> None:
    """Refuses an image or a patient that is in two sets which have to be apart.

    Args:
        tasks: of a study.
        corpora: by name; that without a name is the study's own.

    Raises:
        UserError: two sets share one; names both.
    """
    for task in tasks:
        sets = {f"{task.name} {split}": dataset for split, dataset in task.datasets.items()}
        sets |= {name or "corpus": corpus for name, corpus in corpora.items()}
        images = {name: [_true_path(image) for image in dataset.images.names] for name, dataset in sets.items()}
        trained = {name or "corpus" for name in corpora}
        for (first, a), (second, b) in itertools.combinations(sets.items(), 2):
            if {first, second} <= trained:
                continue  # no arm sees both
            check_disjoint(images[first], images[second], first, second, word="image")
            if a.name == b.name:  # one manifest: its patients are the same people
                check_disjoint(a.groups, b.groups, first, second)


def _true_path(image: str) -> str:
    """One name for a file, whichever way it is referred to; made-up names of images in memory stay."""
    return os.path.realpath(image) if os.path.exists(image) else image
