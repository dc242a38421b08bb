"""What every config has to be, whatever its data and its model: each setting known, of its type and within its range."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from dapt_jax.cost.energy import CARBON_INTENSITY
from dapt_jax.errors import UserError, nearest
from dapt_jax.losses import AUTO, LOSSES
from dapt_jax.metrics import METRICS
from dapt_jax.records.vocabulary import BASELINE
from dapt_jax.settings.defaults import MODES, OPEN, default

_RUNS = ("adapt", "transfer.finetune", "transfer.segmentation")
_CLASSIFIERS = ("adapt", "transfer.finetune", "transfer.head")
_SHARES = ("switch", "probability")
_MIXED = ("adapt", "transfer.finetune")
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": MODES,
    "model.batch_norm": ("global", "per_device"),
    "parallel.processes": ("auto", "on", "off"),
    "model.dtype": ("float32", "bfloat16"),
    "data.on_bad_image": ("error", "skip"),
    "debug.nan": ("halt", "rollback"),
    "cache.mode": ("auto", "on", "off"),
    "cache.dtype": ("", "float32", "bfloat16"),
    "energy.region": tuple(CARBON_INTENSITY),
    **{f"{run}.loss": (AUTO, *LOSSES) for run in _CLASSIFIERS},
    **{f"{run}.schedule": ("constant", "cosine", "linear", "poly", "step", "plateau") for run in _RUNS},
    **{f"{run}.norm": ("frozen", "stats", "train") for run in _RUNS},
    **{f"{run}.optimizer.name": ("adam", "adamw", "sgd") for run in _RUNS},
    **{f"{run}.augment.flip": ("none", "horizontal", "dihedral") for run in _RUNS},
}
_AT_LEAST = {
    "model.image_size": 8,
    "data.cache_mb": 0,
    "data.threads": 1,
    "data.stall_s": 0,
    "profile.step": 0,
    "profile.steps": 1,
    "adapt.head_epochs": 0,
    "adapt.epochs": 1,
    "adapt.batch_size": 1,
    **{f"{run}.accumulate": 1 for run in _RUNS},
    "parallel.fsdp": 0,
    "parallel.count": 0,
    "parallel.number": -1,
    "adapt.views": 0,
    "aot.compilations": 0,
    "cache.memory_mb": 0,
    "cache.disk_mb": 0,
    "cache.flops_per_byte": 0,
    **{f"{run}.plateau.patience": 0 for run in _RUNS},
    "transfer.folds": 2,
    "transfer.head.epochs": 1,
    "transfer.head.batch_size": 1,
    "transfer.head.weight_decay": 0,
    "transfer.finetune.folds": 1,
    "transfer.finetune.head_epochs": 0,
    "transfer.finetune.epochs": 1,
    "transfer.finetune.batch_size": 1,
    "transfer.segmentation.folds": 1,
    "transfer.segmentation.decoder_epochs": 0,
    "transfer.segmentation.epochs": 1,
    "transfer.segmentation.batch_size": 1,
    "transfer.segmentation.views": 0,
    "transfer.segmentation.overlap": 0,
    "transfer.segmentation.overlays": 0,
    **{f"{run}.early_stop": 0 for run in _RUNS[1:]},
    **{f"{run}.{name}": 0 for run in _CLASSIFIERS for name in ("focal_gamma", "gamma_positive", "gamma_negative")},
    **{f"{run}.mix.{name}": 0 for run in _MIXED for name in ("mixup", "cutmix")},
    "checkpoint.every_s": 0,
    "energy.pue": 1,
    "energy.watts": 0,
    "budget": 0,
    "report.margin": 0,
    "score.every": 0,
    "score.images": 2,
    "score.views": 2,
    "score.level": 1,
    "score.margin": 0,
    "score.negatives": 0,
    "score.patience": 1,
    "score.window": 1,
    "score.weight": 0,
    **{f"{run}.optimizer.{name}": 0 for run in _RUNS for name in ("weight_decay", "clip")},
}
_ABOVE_0 = (
    "adapt.head_lr",
    "adapt.lr",
    *(f"{run}.plateau.factor" for run in _RUNS),
    "transfer.head.lr",
    "score.budget",
    "debug.nan_factor",
    "transfer.finetune.head_lr",
    "transfer.finetune.lr",
    "transfer.segmentation.decoder_lr",
    "transfer.segmentation.lr",
    "transfer.segmentation.smooth",
    *(f"{run}.optimizer.eps" for run in _RUNS),
)
_BELOW_1 = (
    "model.drop_path",
    "model.dropout",
    "corpus.val_fraction",
    "transfer.head.grid.val_fraction",
    "debug.nan_factor",
    *(f"{run}.val_fraction" for run in _RUNS[1:]),
    *(f"{run}.{name}" for run in _CLASSIFIERS for name in ("label_smoothing", "focal_alpha", "margin")),
    "score.budget",
    "transfer.segmentation.overlap",
    *(f"{run}.optimizer.{name}" for run in _RUNS for name in ("b1", "b2", "ema")),
    *(f"{run}.augment.{name}" for run in _RUNS for name in ("shift", "brightness", "contrast")),
)
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "one or several values"}


def check(config: Any) -> None:
    """Refuses what no study can run with.

    Raises:
        UserError: a setting is missing, unknown, or not what it has to be; names it.
    """
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"the config is {type(config).__name__}; expected what dapt_jax.config.default() returns")
    values, defaults = flat(config), flat(default())
    for name in values:
        if name not in defaults and name.partition(".")[0] not in OPEN:
            raise UserError(no_setting(name, defaults))
    for name, standard in defaults.items():
        if name not in values:
            raise UserError(f"the config lacks {name}; expected one that starts from dapt_jax.config.default()")
        if not is_like(values[name], standard):
            raise UserError(f"{name} is {values[name]!r}; expected {wanted(standard)}")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"unknown {name} {values[name]!r}; {nearest(values[name], choices)}")
    metric = values["report.metric"]
    by_class = [each.name for each in METRICS.values() if each.per_class]
    if metric not in METRICS and not (metric.partition("/")[0] in by_class and metric.partition("/")[2]):
        choices = (*METRICS, *(f"{each}/CLASS" for each in by_class))
        raise UserError(f"unknown report.metric {metric!r}; {nearest(metric, choices)}")
    _check_numbers(values)
    _check_watched(values)
    _check_lists(values)
    for section in ("tasks", "phases"):
        for name in config[section]:
            if not re.fullmatch(r"[\w.+-]+", name) or name == BASELINE:
                raise UserError(
                    f"{section} holds the name {name!r}; expected letters, digits and . _ + -, not {BASELINE!r}"
                )


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings by dotted name; of a config, or of the nested dicts that are its JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, config_dict.ConfigDict | dict)
        found.update(flat(value, f"{name}.") if is_section else {name: value})
    return found


def wanted(standard: Any) -> str:
    """What a setting has to be, told by its default."""
    return f"{_WORDS.get(type(standard), type(standard).__name__)}, such as {standard!r}"


def no_setting(name: str, known: Iterable[str]) -> str:
    """The error line for a setting that does not exist."""
    return f"the config has no setting {name!r}; {hint(name, known)}"


def hint(name: str, known: Iterable[str]) -> str:
    """The end of such a line: settings whose last part is the same, or else spelt alike."""
    names = list(known)
    leaf = name.lstrip("-").rpartition(".")[2]
    leaves = [each.rpartition(".")[2] for each in names]
    if leaf not in leaves:
        if (near := nearest(name, names)).startswith("did"):
            return near
        leaf = next(iter(difflib.get_close_matches(leaf, leaves, n=1)), "")
    namesakes = [each for each, last in zip(names, leaves, strict=True) if last == leaf]
    if not namesakes:
        return "python -m dapt_jax.main --help lists them all"
    return f"did you mean {' or '.join(map(repr, namesakes[:3]))}?"


def is_like(value: Any, standard: Any) -> bool:
    """Whether a value is of the kind of a default; a whole number is a number too, and a list is as good as a tuple."""
    if isinstance(standard, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(standard, bool)
    if isinstance(standard, float):
        return isinstance(value, int | float)
    return isinstance(value, tuple | list if isinstance(standard, tuple) else type(standard))


def _check_numbers(values: dict[str, Any]) -> None:
    ranges = [(name, values[name] >= least, f"{least} or more") for name, least in _AT_LEAST.items()]
    ranges += [(name, values[name] > 0, "more than 0") for name in _ABOVE_0]
    ranges += [(name, 0 <= values[name] < 1, "0 to less than 1") for name in _BELOW_1]
    ranges += [
        (f"{run}.mix.{name}", 0 <= values[f"{run}.mix.{name}"] <= 1, "0 to 1") for run in _MIXED for name in _SHARES
    ]
    folds = values["transfer.folds"]
    for run in _RUNS[1:]:
        name = f"{run}.folds"
        ranges += [(name, values[name] <= folds, f"1 to transfer.folds, {folds}")]
    for name, holds, expected in ranges:
        if not holds:
            raise UserError(f"{name} is {values[name]!r}; expected {expected}")


def _check_watched(values: dict[str, Any]) -> None:
    """What settings of target tasks need of one another."""
    for run in _RUNS[1:]:
        if values[f"{run}.early_stop"] and not values[f"{run}.val_fraction"]:
            raise UserError(f"{run}.early_stop needs rows to watch; expected {run}.val_fraction above 0, such as 0.1")
    if (number := values["transfer.finetune.test_crops"]) not in (1, 10):
        raise UserError(f"transfer.finetune.test_crops is {number}; expected 1 or 10")


def _check_lists(values: dict[str, Any]) -> None:
    protocols = (*values["transfer.protocols"], *values["transfer.segmentation.protocols"])
    for name in ("strategies", "seeds", "transfer.protocols", "transfer.segmentation.protocols"):
        listed = tuple(values[name])
        for value in listed:
            if name == "seeds" and not (is_like(value, 0) and 0 <= value < 1 << 32):
                raise UserError(f"seeds holds {value!r}; expected whole numbers from 0")
            if name != "seeds" and not isinstance(value, str):
                raise UserError(f"{name} holds {value!r}; expected names")
        if not listed or len(set(listed)) < len(listed):
            raise UserError(f"{name} is {listed}; expected one or more, each once")
    for name, least in (("lr", "numbers above 0"), ("weight_decay", "numbers from 0")):
        for value in values[f"transfer.head.grid.{name}"]:
            if not is_like(value, 0.0) or value < 0 or (value == 0 and name == "lr"):
                raise UserError(f"transfer.head.grid.{name} holds {value!r}; expected {least}")
    if values["report.protocol"] and values["report.protocol"] not in protocols:
        hint = nearest(values["report.protocol"], protocols)
        raise UserError(f"report.protocol {values['report.protocol']!r} is not one of transfer.protocols; {hint}")
