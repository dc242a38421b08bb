"""A study of your own images, without a config file of your own.

    python -m dapt_jax.main --config=configs/own_images.py:corpus=/my/scans,target=/my/cases --workdir=runs/mine
    --config.mode=plan

Without `--config.mode=plan`, which prices it, the study runs. The argument names sets, joined by commas, each a
folder with one folder per class or a CSV file with the columns image, label and patient:

- `corpus`: labelled images to pre-train on; `unlabelled` in its place: any folder of images, DICOM files or NIfTI
  volumes, or a CSV file, which are adapted to by reconstruction and need no labels.
- `target`: the task, scored in five folds by patient. Alone, half of its patients become the corpus.
- `external`: images of another source with the classes of the target, which are only scored.

Strategies none, full, partial and hybrid; EfficientNet-Lite0 at 112 px; three seeds: `--config.seeds=0`,
`--config.model.image_size=224` and every other setting can be given beside it. Rows and columns of a CSV file are
chosen by settings of its set, such as `--config.tasks.target.development.where="split=train"`,
`--config.corpus.label=diagnosis` and `--config.tasks.target.development.group=case`.
"""

from dapt_jax.data import lists
from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

SETS = ("corpus", "unlabelled", "target", "external")


def get_config(argument=""):
    paths = _paths(argument)
    config = default()
    config.name = "own_images"
    config.title = "Adaptation to images of one's own"
    config.model.image_size = 112
    config.strategies = ("none", "full", "partial", "hybrid")
    config.adapt.partial_groups = 3
    config.transfer.protocols = ("linear",)
    config.tasks.target = {"development": _source(paths["target"])}
    if "external" in paths:
        config.tasks.target.external = _source(paths["external"])
    if "unlabelled" in paths:
        config.corpus.update({"kind": "images", "path": paths["unlabelled"]})
        config.adapt.update({"objective": "reconstruct", "epochs": 20, "warmup": 2.0, "hybrid_epochs": 10})
        config.adapt.num_fixed_views = 4
    elif "corpus" in paths:
        config.corpus.update(_source(paths["corpus"]))
    else:
        config.data.split = "corpus=.5,target=.5"
    return config


def _paths(argument):
    """Return the paths by set."""
    where = f"configs/own_images.py:{argument}"
    paths = {}
    for part in argument.split(",") if argument else ():
        name, equals, path = (each.strip() for each in part.partition("="))
        if not equals or not path:
            raise UserError(f"{where}: {part!r}; expected SET=PATH, such as target=/my/cases")
        if name not in SETS:
            raise UserError(f"{where}: {name!r}; {nearest(name, SETS)}")
        if name in paths:
            raise UserError(f"{where}: {name} twice; expected each set once")
        paths[name] = path
    if "target" not in paths:
        raise UserError(
            f"{where}: no target; expected one, such as configs/own_images.py:corpus=/my/scans,target=/my/cases; "
            "configs/label_free.py adapts to images without a task"
        )
    if {"corpus", "unlabelled"} <= set(paths):
        raise UserError(f"{where}: corpus and unlabelled; expected one of them")
    return paths


def _source(path):
    """Return the settings of a labelled set."""
    if path.lower().endswith(lists.TABLES):
        return {"kind": "manifest", "path": path, "label": "label", "where": "", "group": "patient"}
    return {"kind": "folder", "path": path, "where": ""}
