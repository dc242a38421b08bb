"""The arms of arXiv 2204.13280 beside the paper's own, from the committed records of docs/evidence/mehmood2022.

    python -m benchmarks.paper_arms     the table between its marks in docs/evidence.md

The paper's values are mean AUCs of its first head, one run of a ResNet-50, read off its figures; ours are means over
seeds of EfficientNet-Lite0 with linear heads. Kendall's tau is of the seven arms that adapt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import scipy.stats

from benchmarks import common
from benchmarks.evidence import FOLDER, PAGE
from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.formatting import NONE
from dapt_jax.records.study_records import Records
from dapt_jax.statistics import Summary

BEGIN = "<!-- begin: python -m benchmarks.paper_arms -->"
TASK = "tumour"
SETS = {"test": "inside", "external": "outside"}
"""Splits of this study, other patients and web images, beside the paper's CE-MRI and external images."""
PAPER = {
    "full": (0.974, 0.699),
    "l1sb": (0.905, 0.580),
    "l2sb": (0.930, 0.634),
    "l1sb_pft": (0.954, 0.692),
    "l2sb_pft": (0.966, 0.705),
    "f1b": (0.872, 0.812),
    "f2b": (0.915, 0.758),
    "none": (0.889, 0.625),
}
"""Mean AUC on the paper's CE-MRI and external images, by arm."""

ADAPTING = tuple(name for name in PAPER if name != "none")


def page(records: Records) -> str:
    """Return the table and the rank correlations of a study as Markdown.

    Raises:
        UserError: An arm of the paper has no score.
    """
    scores = {}
    for name in records.strategies:
        of_sets = [
            Summary.of(records.values(name, TASK, split, records.protocol(TASK), "auc")) for split in SETS
        ]
        scores[name] = [None if each is None else each.mean for each in of_sets]
    for name in PAPER:
        if None in scores.get(name, [None]):
            raise UserError(
                f"{name} has no AUC of {TASK}; expected the records of configs/evidence/mehmood2022.py"
            )
    taus = []
    for number in range(len(SETS)):
        theirs, ours = ([of[name][number] for name in ADAPTING] for of in (PAPER, scores))
        taus.append(scipy.stats.kendalltau(theirs, ours)[0])
    head = ["arm", *(f"{who}, {place}" for place in SETS.values() for who in ("paper", "here"))]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, own in scores.items():
        cells = [value for pair in zip(PAPER.get(name, (None, None)), own, strict=True) for value in pair]
        lines.append(
            f"| `{name}` | {' | '.join(NONE if value is None else f'{value:.3f}' for value in cells)} |"
        )
    told = ", ".join(f"{tau:+.2f} {place}" for tau, place in zip(taus, SETS.values(), strict=True))
    order = f"Kendall's tau between the paper's order of the {len(ADAPTING)} arms that adapt and this one"
    return "\n".join([*lines, "", f"{order}: {told}."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, default=FOLDER / "mehmood2022", help="folder of the study")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks")
    given = parser.parse_args(arguments)
    try:
        text = page(Records.read(given.records))
        own = given.page.read_text(encoding="utf-8")
        given.page.write_text(common.between_marks(own, BEGIN, text, given.page), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
