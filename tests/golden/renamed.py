"""Deliberate changes of wording and of setting names: every one is an entry here, so that a review sees it.

Golden files hold the text as it was; comparisons translate it by these tables first. A test refuses entries
that translate nothing. Regenerating the golden files empties the tables.
"""

import re
from collections.abc import Mapping

RENAMED: dict[str, str] = {
    "adapt.lr is nan; expected more than 0": "adapt.lr is nan; expected more than 0, a finite number",
    "condition 'corpus'; expected column=value": "condition 'corpus'; expected column=value, or column=value|value with all "
    "values to select",
    "strategies holds None; expected names": "strategies is (None,); expected names as text, such as ('None',)",
    " or 'ROOT/configs/medmnist.py' or 'ROOT/configs/taher2021.py'?": "?",
    " or 'ROOT/configs/medmnist.py' or 'ROOT/configs/wbc.py'?": "?",
}
"""Error lines: fragment as it was -> fragment as it is. All fragments are replaced at once, the longest
first."""


def line(text: str, table: Mapping[str, str] | None = None) -> str:
    """Return an error line of a golden file as it has to read now.

    >>> line("no setting 'phases'; expected phases of one's own", {"phases": "stages", "'phases'": "'custom'"})
    "no setting 'custom'; expected stages of one's own"
    """
    table = RENAMED if table is None else table
    if not table:
        return text
    fragments = sorted(table, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, fragments)), lambda found: table[found[0]], text)
