"""Listing of the available models: `python -m dapt_jax.main --config.mode=models`.

The rows are shipped as `models.json`, made by `dapt_jax.export.model_rows`, since to build and count every
model takes several seconds, and JAX one.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHIPPED = Path(__file__).with_name("models.json")
"""The rows by name of the model, the decoders, and the number of classes of the head that is counted."""


def show() -> None:
    """Print a line per encoder.

    It gives parameters, GFLOPs at its default image size, layer groups, and the weights known by name.
    """
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
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
    for name, row in shipped["models"].items():
        table.add_row(
            name,
            f"{row['parameters']:,}",
            str(row["pixels"]),
            f"{row['flops'] / 1e9:.2f}",
            row["groups"],
            row["weights"],
        )
    console.print(table)
    console.print(
        f"Parameters and FLOPs of one image forward, with a head of {shipped['classes']} classes; a "
        "multiply-accumulate is 2. Every model takes any checkpoint of its family by path or address "
        "(--config.weights), any image size and any number of channels. Decoders for segmentation, on any of "
        f"them: {', '.join(shipped['decoders'])}.",
        soft_wrap=True,
    )
