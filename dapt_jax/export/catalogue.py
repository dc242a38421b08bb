"""Which models there are: `python -m dapt_jax.main --config.mode=models`."""

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dapt_jax.models import decoders, registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import accounting, freezing
from dapt_jax.weights import zoo

CLASSES = 1000
"""Of the head that parameters and FLOPs are given with, as in publications."""


def show() -> None:
    """Prints a line per encoder: parameters, GFLOPs at its own image size, layer groups, and the weights known by name."""
    console = Console(width=None if Console().is_terminal else 170)
    table = Table()
    for column, justify in (
        ("model", "left"),
        ("parameters", "right"),
        ("pixels", "right"),
        ("GFLOPs", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("layer groups")
    table.add_column("weights known by name", overflow="fold")
    for name in registry.names():
        parameters, flops = size(name)
        encoder = registry.build(name)
        table.add_row(
            name,
            f"{parameters:,}",
            str(encoder.image_size),
            f"{flops / 1e9:.2f}",
            condensed(encoder.groups),
            known(zoo.names(name)),
        )
    console.print(table)
    console.print(
        f"Parameters and FLOPs of one image forward, with a head of {CLASSES} classes; a multiply-accumulate is 2. Every "
        "model takes any checkpoint of its family by path or address (--config.weights), any image size and any number "
        f"of channels. Decoders for segmentation, on any of them: {', '.join(decoders.BUILDERS)}.",
        soft_wrap=True,
    )


def size(name: str) -> tuple[int, int]:
    """Parameters of a model, and model FLOPs of one image forward at the size that its pretrained weights were made at."""
    encoder = registry.build(name)
    classifier = Classifier(encoder, CLASSES)
    pooled = accounting.forward(classifier, encoder.image_size, len(encoder.groups)).model
    return freezing.count(classifier.abstract()[0]), pooled + 2 * encoder.features * CLASSES


def condensed(groups: Sequence[str]) -> str:
    """`stem, stage1 (3), top` of `stem, stage1/block1, ...`."""
    runs = ((stem, len(list(members))) for stem, members in itertools.groupby(groups, _leading))
    return ", ".join(f"{stem} ({count})" if count > 1 else stem for stem, count in runs)


def _leading(group: str) -> str:
    """What groups that belong together share: the stage, or the name without its number."""
    stage, slash, _ = group.partition("/")
    return stage if slash else group.rstrip("0123456789")


def known(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many there are."""
    if not names:
        return "-"
    more = f", ... ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more
