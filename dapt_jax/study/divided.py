"""One labelled set as corpus and target, `data.split`: divided by patient, the same way whatever is read first."""

from dapt_jax.data import near_duplicates, splits
from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.settings import StudySettings

SEED = 0
"""Seed of the division, the same for every seed of a study: no image is in the corpus of one and a target of
another."""


def task_of(settings: StudySettings) -> str:
    """Return the task whose development set `data.split` divides; empty where it divides none.

    Raises:
        UserError: There is a corpus already, or not exactly one task with a development set.
    """
    if not settings.data.shares:
        return ""
    about = f"data.split is {settings.data.split!r}"
    if settings.corpus.source.get("kind"):
        raise UserError(
            f"{about}, which makes the corpus of the development set, and the config names a corpus as well; "
            "expected data.split='' or no corpus.kind"
        )
    if len(settings.tasks) != 1:
        raise UserError(
            f"{about}, and the config names {len(settings.tasks)} tasks; expected one, to be divided"
        )
    ((name, task),) = settings.tasks.items()
    if task.development is None:
        raise UserError(f"{about}, and tasks.{name} has official lists; expected tasks.{name}.development")
    return name


def part(settings: StudySettings, name: str, dataset: Dataset) -> Dataset:
    """Return a part of the set; look-alikes and spellings of one patient are on one side.

    Args:
        settings: Settings of the study, with `data.split`.
        name: `corpus` or `target`.
        dataset: The whole set, with its labels, which both parts share in equal proportions.

    Raises:
        UserError: There are fewer patients than parts.
    """
    shares = settings.data.shares
    merged = near_duplicates.merged(dataset)
    try:
        parts = splits.grouped_parts(dataset.labels, merged.groups, list(shares.values()), SEED)
    except UserError as error:
        pairs = len(merged.pairs)
        or_else = f", or merge_look_alikes=False: {pairs} pairs of look-alikes were merged" if pairs else ""
        raise UserError(
            f"data.split={settings.data.split!r}: {error}; expected more patients{or_else}"
        ) from error
    return dataset.take(parts[list(shares).index(name)])
