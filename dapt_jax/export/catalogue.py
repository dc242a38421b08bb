"""Listing of the available models: `python -m dapt_jax.main --config.mode=models`."""

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dapt_jax.models import decoders, registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import accounting, freezing
from dapt_jax.weights import zoo

CLASSES = 1000
"""Classes of the head with which parameters and FLOPs are reported, as in publications."""


def show() -> None:
    """Print a line per encoder.

    It gives parameters, GFLOPs at its default image size, layer groups, and the weights known by name.
    """
    console = Console(width=None if Console().is_terminal else 170, markup=False, emoji=False)
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
        f"Parameters and FLOPs of one image forward, with a head of {CLASSES} classes; a multiply-accumulate "
        "is 2. Every model takes any checkpoint of its family by path or address (--config.weights), any "
        f"image size and any number of channels. Decoders for segmentation, on any of them: "
        f"{', '.join(decoders.BUILDERS)}.",
        soft_wrap=True,
    )


def size(name: str) -> tuple[int, int]:
    """Return a model's parameters, and model FLOPs of one image forward at its pretrained image size."""
    encoder = registry.build(name)
    classifier = Classifier(encoder, CLASSES)
    pooled = accounting.forward(classifier, encoder.image_size, len(encoder.groups)).model
    return freezing.count(classifier.abstract()[0]), pooled + 2 * encoder.features * CLASSES


def condensed(groups: Sequence[str]) -> str:
    """Return `stem, stage1 (3), top` for `stem, stage1/block1, ...`."""
    runs = ((stem, len(list(members))) for stem, members in itertools.groupby(groups, _leading))
    return ", ".join(f"{stem} ({count})" if count > 1 else stem for stem, count in runs)


def _leading(group: str) -> str:
    """Return the common part of related group names: the stage, or the name without its number."""
    stage, slash, _ = group.partition("/")
    return stage if slash else group.rstrip("0123456789")


def known(names: Sequence[str], most: int = 2) -> str:
    """Return the first names, and the number of all names."""
    if not names:
        return "-"
    more = f", ... ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more
