"""What `--config.mode=plan` prints of three configs: the numbers of its tables, not their titles nor its prose."""

import json
import re

from tests.golden import FOLDER

PLANS = {
    "quickstart": "configs/quickstart.py",
    "segmentation": "tests/configs/golden_study.py:segmentation",
    "halved": "tests/configs/golden_study.py:halved",
}
FILE = FOLDER / "plans.json"

Tables = dict[str, dict[str, list[str]]]


def parse(text: str) -> Tables:
    """Read the tables of a plan: for each its rows by name, the cells as printed, of prose the numbers in it.

    The last table, that of all strategies, is called `overview`, whatever its title; a line below it that
    begins with the name of a strategy is a row of `lines`.
    """
    tables: Tables = {}
    title, cells, previous = "", list[str](), ""
    for line in text.splitlines():
        if line.startswith("┏"):
            title, tables[previous.strip()] = previous.strip(), {}
        elif line.startswith("│"):
            read = [cell.strip() for cell in line.strip("│").split("│")]
            if read[0]:
                cells = tables[title][read[0]] = read[1:]
            else:  # goes on from the line above
                cells[:] = [f"{above} {below}".strip() for above, below in zip(cells, read[1:], strict=True)]
        previous = line
    tables["overview"] = tables.pop(title)
    about = {
        name: text for name, colon, text in (line.partition(": ") for line in text.splitlines()) if colon
    }
    tables["lines"] = {name: [about[name]] for name in tables["overview"] if name in about}
    return {
        title: {name: [part for cell in cells for part in _numbers(cell)] for name, cells in table.items()}
        for title, table in tables.items()
    }


def _numbers(cell: str) -> list[str]:
    """A cell that is a number or a dash as it is; of any other, the numbers."""
    number = r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"
    return [cell] if re.fullmatch(rf"-|{number}", cell) else re.findall(number, cell)


def golden() -> dict[str, Tables]:
    """Read the golden plans."""
    return json.loads(FILE.read_text())


def write(plans: dict[str, Tables]) -> None:
    """Write the golden plans, a row of a table a line."""
    text = json.dumps(plans, indent=1, ensure_ascii=False)
    FILE.write_text(re.sub(r"\[[^\[\]]+\]", lambda row: re.sub(r"\s*\n\s*", " ", row[0]), text) + "\n")
