"""Renamed and removed settings, for configs and workdirs of earlier versions."""

from collections.abc import Iterator, Mapping
from typing import Any

_RUNS = ("adapt", "transfer.finetune", "transfer.segmentation")
_TARGET_RUNS = _RUNS[1:]
_CLASSIFIERS = ("adapt", "transfer.finetune", "transfer.head")
_LOSS = {
    "loss": "name", "label_smoothing": "label_smoothing", "focal_gamma": "gamma", "focal_alpha": "alpha",
    "gamma_positive": "gamma_positive", "gamma_negative": "gamma_negative", "margin": "margin",
}  # fmt: skip
_SEGMENTATION_LOSS = {"loss": "name", "batchwise": "batchwise", "smooth": "smoothing_constant"}
_SCORING = (
    "every", "names", "task", "images", "budget", "views", "level", "pooled", "distance", "margin",
    "negatives", "downstream",
)  # fmt: skip
_SELECTION = {"rule": "rule", "patience": "patience", "weight": "length_weight"}

RENAMED: dict[str, str] = {
    "phases": "custom_strategies",
    "budget": "compute_budget",
    "select": "checkpoint_selection.score",
    **{f"score.{name}": f"checkpoint_scoring.{name}" for name in _SCORING},
    **{f"score.{old}": f"checkpoint_selection.{new}" for old, new in _SELECTION.items()},
    "model.batch_norm": "model.batch_norm_statistics",
    "parallel.fsdp": "runtime.fsdp",
    "parallel.processes": "runtime.multi_process",
    "parallel.coordinator": "runtime.coordinator_address",
    "parallel.count": "runtime.num_processes",
    "parallel.number": "runtime.process_id",
    "checkpoint.every_s": "runtime.checkpoint_every_s",
    "measure_peak": "runtime.measure_peak",
    "debug.nan": "non_finite.policy",
    "debug.nan_factor": "non_finite.lr_factor",
    "watch.tensorboard": "monitoring.tensorboard",
    "watch.wandb": "monitoring.wandb",
    "watch.prometheus": "monitoring.prometheus",
    "profile.step": "monitoring.profile_step",
    "profile.steps": "monitoring.profile_steps",
    "adapt.views": "adapt.num_fixed_views",
    "transfer.segmentation.views": "transfer.segmentation.num_fixed_views",
    **{f"{run}.accumulate": f"{run}.grad_accum_steps" for run in _RUNS},
    **{f"{run}.norm": f"{run}.batch_norm" for run in _RUNS},
    **{f"{run}.early_stop": f"{run}.early_stopping_patience" for run in _TARGET_RUNS},
    **{f"{part}.{old}": f"{part}.loss.{new}" for part in _CLASSIFIERS for old, new in _LOSS.items()},
    **{
        f"transfer.segmentation.{old}": f"transfer.segmentation.loss.{new}"
        for old, new in _SEGMENTATION_LOSS.items()
    },
}
"""Former names of settings, and of sections, with those of today."""

PHASE_RENAMED = {"norm": "batch_norm", "rates": "lr_multipliers"}
"""Former names of the settings of a phase of a custom strategy, with those of today."""

REMOVED: dict[str, Any] = {
    **{f"{run}.plateau.threshold": 1e-4 for run in _RUNS},
    **{f"{run}.mix.probability": 1.0 for run in ("adapt", "transfer.finetune")},
    "score.window": 1,
    "transfer.segmentation.overlays": 4,
}
"""Former settings that are constants now, with their values."""


def renamed(name: str) -> str:
    """Return the current name of a renamed setting; empty for any other name."""
    section, dot, rest = name.partition(".")
    if dot and section in RENAMED:
        return f"{RENAMED[section]}.{rest}"
    return RENAMED.get(name, "")


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a `config.json` by current names, without those that are now constants.

    Args:
        config: Nested settings, as an earlier version wrote them or as this one does.
    """
    upgraded: dict[str, Any] = {}
    for path, value in _leaves(config, ()):
        name = ".".join(path)
        if name in REMOVED and value == REMOVED[name]:
            continue
        new = renamed(name)
        *sections, leaf = new.split(".") if new else path
        place = upgraded
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = _upgrade_phases(value) if leaf == "phases" else value
        if leaf == "batch_norm" and path[-1] == "norm":
            place["layer_norm"] = _layer_norm(value)
    return upgraded


def _upgrade_phases(phases: object) -> object:
    """Return the phases of a custom strategy by current names."""
    if not isinstance(phases, list | tuple):
        return phases
    return [_upgrade_phase(phase) if isinstance(phase, Mapping) else phase for phase in phases]


def _upgrade_phase(phase: Mapping[str, Any]) -> dict[str, Any]:
    upgraded = {PHASE_RENAMED.get(key, key): value for key, value in phase.items()}
    return {**upgraded, "layer_norm": _layer_norm(phase["norm"])} if "norm" in phase else upgraded


def _layer_norm(norm: Any) -> Any:
    """Return the layer-norm mode of a former `norm`, which set batch norm and layer norm together."""
    if isinstance(norm, str):
        return "train" if norm == "train" else "frozen"
    pairs = norm.items() if isinstance(norm, Mapping) else norm
    return [["*", "frozen"], *([pattern, _layer_norm(mode)] for pattern, mode in pairs)]


def _leaves(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
