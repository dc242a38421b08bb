"""The rows of `--config.mode=models`, counted from the models; `python -m dapt_jax.export.model_rows` ships them."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from dapt_jax.export import catalogue
from dapt_jax.models import decoders, registry
from dapt_jax.models.classifier import Classifier
from dapt_jax.training import accounting, freezing
from dapt_jax.weights import zoo

CLASSES = 1000
"""Classes of the head with which parameters and FLOPs are reported, as in publications."""


def row(name: str) -> dict[str, Any]:
    """Return a model's parameters, pixels, FLOPs, layer groups and weights."""
    parameters, flops = size(name)
    encoder = registry.build(name)
    return {
        "parameters": parameters,
        "pixels": encoder.image_size,
        "flops": flops,
        "groups": condensed(encoder.groups),
        "weights": known(zoo.names(name)),
    }


def table() -> dict[str, Any]:
    """Return what `catalogue.SHIPPED` holds."""
    return {
        "classes": CLASSES,
        "decoders": list(decoders.BUILDERS),
        "models": {name: row(name) for name in registry.names()},
    }


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


if __name__ == "__main__":
    catalogue.SHIPPED.write_text(json.dumps(table(), indent=1) + "\n")
