"""Domain-adaptive pre-training of medical image encoders in JAX, at a fraction of the usual compute.

    >>> import dapt_jax as dj
    >>> encoder = dj.load_encoder("efficientnet_lite0", cut_after="stage1/block1")
    >>> features = dj.extract_features(
    ...     encoder, dj.load_dataset("phantoms", name="development", n=6, image_size=32)
    ... )
    >>> features.shape
    (6, 16)

Names are imported when they are first used: `import dapt_jax` itself imports nothing, so that reports and
`--help` need no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapt_jax.api import PretrainedEncoder as PretrainedEncoder
    from dapt_jax.api import Trained as Trained
    from dapt_jax.api import adaptation_run as adaptation_run
    from dapt_jax.api import compare as compare
    from dapt_jax.api import evaluate as evaluate
    from dapt_jax.api import extract_features as extract_features
    from dapt_jax.api import list_encoders as list_encoders
    from dapt_jax.api import load_dataset as load_dataset
    from dapt_jax.api import load_encoder as load_encoder
    from dapt_jax.api import load_predictor as load_predictor
    from dapt_jax.api import plan as plan
    from dapt_jax.api import plan_study as plan_study
    from dapt_jax.api import read_study as read_study
    from dapt_jax.api import run_study as run_study
    from dapt_jax.api import score as score
    from dapt_jax.api import train as train
    from dapt_jax.api import transferability_scores as transferability_scores
    from dapt_jax.cost.flops import count as count_flops
    from dapt_jax.data.augment import Augment as Augment
    from dapt_jax.data.dataset import Dataset as Dataset
    from dapt_jax.errors import UserError as UserError
    from dapt_jax.settings import StudySettings as StudySettings
    from dapt_jax.settings import default as default_config
    from dapt_jax.training.callbacks import Callback as Callback
    from dapt_jax.training.context import RunContext as RunContext
    from dapt_jax.training.freezing import resolve_trainable as resolve_trainable
    from dapt_jax.training.optim import Optimizer as Optimizer
    from dapt_jax.training.phases import Phase as Phase
    from dapt_jax.training.run import TrainData as TrainData
    from dapt_jax.training.run import TrainingRun as TrainingRun

__version__ = "0.1.0"

_EXPORTS = {
    **dict.fromkeys(
        (
            "PretrainedEncoder",
            "Trained",
            "adaptation_run",
            "compare",
            "evaluate",
            "extract_features",
            "list_encoders",
            "load_dataset",
            "load_encoder",
            "load_predictor",
            "plan",
            "plan_study",
            "read_study",
            "run_study",
            "score",
            "train",
            "transferability_scores",
        ),
        "dapt_jax.api",
    ),
    "Augment": "dapt_jax.data.augment",
    "Callback": "dapt_jax.training.callbacks",
    "Dataset": "dapt_jax.data.dataset",
    "Optimizer": "dapt_jax.training.optim",
    "Phase": "dapt_jax.training.phases",
    "RunContext": "dapt_jax.training.context",
    "StudySettings": "dapt_jax.settings",
    "TrainData": "dapt_jax.training.run",
    "TrainingRun": "dapt_jax.training.run",
    "UserError": "dapt_jax.errors",
    "resolve_trainable": "dapt_jax.training.freezing",
}
_RENAMED = {
    "count_flops": ("dapt_jax.cost.flops", "count"),
    "default_config": ("dapt_jax.settings", "default"),
}

__all__ = [
    "Augment",
    "Callback",
    "Dataset",
    "Optimizer",
    "Phase",
    "PretrainedEncoder",
    "RunContext",
    "StudySettings",
    "TrainData",
    "Trained",
    "TrainingRun",
    "UserError",
    "adaptation_run",
    "compare",
    "count_flops",
    "default_config",
    "evaluate",
    "extract_features",
    "list_encoders",
    "load_dataset",
    "load_encoder",
    "load_predictor",
    "plan",
    "plan_study",
    "read_study",
    "resolve_trainable",
    "run_study",
    "score",
    "train",
    "transferability_scores",
]


def __getattr__(name: str) -> Any:
    module, attribute = _RENAMED.get(name, (_EXPORTS.get(name, ""), name))
    if not module:
        raise AttributeError(f"module 'dapt_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
