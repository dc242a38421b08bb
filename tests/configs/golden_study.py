"""The four studies whose records tests/golden holds: as small as shows each part at work, on phantoms of 32 pixels.

No layer norm is among them, and the encoder is cut early: what is to be seen is the order of things, not
accuracy.
"""

from dapt_jax.settings import default

STEADY = 0.01
"""Epsilon of Adam: with the usual one its first steps are the signs of gradients, which magnify what rounding
leaves."""
CUT = "stage2/block1"
HEAD = {"name": "head", "epochs": 1, "trainable": ("head",), "lr": 3e-3, "augment": False}
TOP = {"name": "top", "epochs": 1, "trainable": ("stage2", "head"), "lr": 1e-3, "views": 2}
ALL = {
    "name": "all",
    "epochs": 2,
    "trainable": ("*",),
    "lr": 1e-3,
    "batch_norm": {"stage2": "train"},
    "lr_multipliers": {"stem": 0.1},
    "schedule": "cosine",
    "warmup": 0.5,
}
CELLS = {
    "development": {"kind": "phantoms", "name": "development", "n": 40},
    "external": {"kind": "phantoms", "name": "external", "n": 20},
}


def _all_but_results(study):
    config = default()
    config.name = f"golden-{study}"
    config.synthetic = True
    config.seeds = (0,)
    config.model.image_size = 32
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 48})
    config.tasks.cells = CELLS
    config.custom_strategies.cut = {"cut_after": CUT}
    config.custom_strategies.hybrid_like = {"cut_after": CUT, "phases": (HEAD, TOP, ALL)}
    config.adapt.batch_size = 8
    config.adapt.grad_accum_steps = 2
    config.adapt.mix.mixup = 0.2
    config.adapt.optimizer.eps = STEADY
    config.adapt.augment.update({"flip": "dihedral", "shift": 0.1, "brightness": 0.1})
    config.transfer.protocols = ("linear",)
    config.transfer.folds = 2
    config.transfer.head.epochs = 5
    return config


def _classification():
    config = _all_but_results("classification")
    config.strategies = ("cut", "hybrid_like")
    config.transfer.protocols = ("linear", "mlp_small", "finetune")
    config.transfer.finetune.optimizer.eps = STEADY
    config.transfer.finetune.update(
        {"epochs": 2, "head_epochs": 1, "batch_size": 8, "val_fraction": 0.2, "early_stopping_patience": 1}
    )
    return config


def _segmentation():
    config = _all_but_results("segmentation")
    config.strategies = ("cut",)
    config.corpus.update({"kind": ""})
    masks = {"segments": ("background", "cytoplasm", "nucleus")}
    config.tasks.cells = {split: {**source, **masks, "n": 16} for split, source in CELLS.items()}
    config.transfer.segmentation.update(
        {"decoder_epochs": 1, "decoder_lr": 1e-4, "epochs": 2, "lr": 1e-5, "batch_size": 8}
    )
    config.transfer.segmentation.optimizer.update({"name": "adamw", "eps": STEADY, "weight_decay": 1e-3})
    config.model.image_size = 16
    config.transfer.segmentation.augment.flip = "dihedral"
    return config


def _scored():
    config = _all_but_results("scored")
    config.strategies = ("hybrid_like",)
    config.checkpoint_selection.score = "knn"
    config.checkpoint_scoring.update(
        {"names": ("robustness", "knn"), "images": 16, "budget": 0.9, "level": 1, "downstream": True}
    )
    return config


def _halved():
    config = _all_but_results("halved")
    config.strategies = ("cut", "whole", "top", "hybrid_like")
    config.custom_strategies.whole = {"cut_after": CUT, "phases": (HEAD, {**ALL, "epochs": 4})}
    config.custom_strategies.top = {"cut_after": CUT, "phases": (HEAD, {**TOP, "epochs": 4})}
    config.checkpoint_selection.score = "logme"
    config.compute_budget = 0.3
    config.checkpoint_scoring.update({"images": 16, "budget": 0.9, "level": 1})
    config.adapt.head_epochs = 1
    return config


def get_config(study):
    return {
        "classification": _classification,
        "segmentation": _segmentation,
        "scored": _scored,
        "halved": _halved,
    }[study]()
