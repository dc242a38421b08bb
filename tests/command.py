"""The command line from inside a test."""

import json
from pathlib import Path

from dapt_jax.main import main

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.py"
REQUIRED_ARGUMENTS = {"own_images": "corpus=scans,target=cases.csv"}
"""Arguments for the shipped configs that refuse to be without one."""
SMALL = {
    "model.image_size": "32",
    "seeds": "0,1",
    "strategies": "none,full,partial",
    "corpus.n": "48",
    "tasks.leukocytes.development.n": "48",
    "tasks.leukocytes.external.n": "36",
    "adapt.head_epochs": "2",
    "adapt.epochs": "1",
    "transfer.folds": "3",
    "transfer.head.epochs": "5",
}


def small(*flags: str) -> list[str]:
    """Flags of a quickstart of seconds, those given in place of its own."""
    given = {flag.partition("=")[0] for flag in flags}
    standard = [
        f"--config.{name}={value}" for name, value in SMALL.items() if f"--config.{name}" not in given
    ]
    return [f"--config={QUICKSTART}", *standard, *flags]


MANIFEST_CONFIG = """\
from dapt_jax.settings import default


def get_config():
    config = default()
    config.seeds = (0,)
    config.strategies = ("none", "full")
    config.model.image_size = 32
    config.adapt.epochs = 1
    config.adapt.head_epochs = 1
    config.transfer.folds = 3
    config.transfer.protocols = ("linear",)
    config.transfer.head.epochs = 5
    manifest = {"kind": "manifest", "path": "manifest.csv"}
    config.corpus.update({**manifest, "where": "source=corpus"})
    config.tasks.cells = {
        "development": {**manifest, "where": "source=development"},
        "external": {**manifest, "where": "source=external"},
    }
    # more
    return config
"""


def run(*flags: str | Path) -> int:
    """Runs a command in this process."""
    return main(["dapt_jax", *map(str, flags)])


def rows(path: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_config(folder: Path, *more: str, name: str = "config.py") -> Path:
    """A config of a study of a manifest, with more lines at the end of its `get_config`."""
    path = folder / name
    path.write_text(MANIFEST_CONFIG.replace("# more", "\n    ".join(more) or "# no more"))
    return path
