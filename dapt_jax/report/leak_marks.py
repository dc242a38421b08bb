"""Marks on table splits whose images or patients also occur in another set."""

from __future__ import annotations

import dataclasses

from dapt_jax.records.study_records import Records
from dapt_jax.report.columns import Table


def shown(records: Records, task: str, split: str) -> str:
    """Return the name of a split of a task, marked where it leaks."""
    return f"{split} ‡" if split in records.leaks.get(task, {}) else split


def marked(records: Records, table: Table, task: str | None = None) -> Table:
    """Return a table with leaking splits marked and explained in its note.

    Args:
        records: Records of the study.
        table: A table of one task, or over several.
        task: The task; None for all.
    """
    leaks = {
        split: what
        for name, of in records.leaks.items()
        if task in (None, name)
        for split, what in of.items()
    }
    if not leaks:
        return table

    def mark(text: str) -> str:
        return f"{text} ‡" if text in leaks else text

    listed = "; ".join(f"{split}: {what}" for split, what in leaks.items())
    return dataclasses.replace(
        table,
        groups=[(mark(heading), width) for heading, width in table.groups],
        columns=[mark(column) for column in table.columns],
        rows=[[dataclasses.replace(cell, text=mark(cell.text)) for cell in row] for row in table.rows],
        note=f"‡ Leak, kept on request; seen in training or in another set: {listed}. {table.note}".strip(),
    )
