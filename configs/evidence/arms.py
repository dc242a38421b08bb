"""Arms that the studies of configs/evidence share: strategies at shares of full DAPT's FLOPs, and their controls.

A share is a percentage of what full DAPT takes at its longest: `full_10` is full DAPT cut short to a tenth of it,
`partial_10` the longest partial DAPT within it (`compute_budget`, docs/statistics.md). The argument of every config is
`ENCODER[,SHARE...]`, by default `efficientnet_lite0,1,3,10,30`; `--config.seeds=0,1,2` sets the seeds, and
`--config.mode=plan` says what a choice costs.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

ENCODERS = {
    "efficientnet_lite0": {
        "weights": "imagenet", "image_size": 96, "image_size_of_masks": 96, "top": ("stage6", "stage7", "top"),
        "lora": ("stage6", "stage7", "top"), "cut_after": "stage3/block2",
    },
    "vit_small_dinov2": {
        "weights": "package:dinov2_vits14", "image_size": 112, "image_size_of_masks": 224,
        "top": ("block9..12", "top"), "lora": ("block9..12",), "cut_after": "block6",
    },
}  # fmt: skip
"""Weights, sizes of images, layer groups of partial DAPT and of LoRA, and where simplified DAPT cuts, by encoder.

A pyramid of patches of 14 pixels takes sides that are multiples of 224.
"""

SHARES = ("1", "3", "10", "30")
HEAD_EPOCHS = 4
VIEWS = 4
"""Fixed augmented views per image of arms above a cached prefix."""

STRATEGIES = (
    "partial",
    "hybrid_early",
    "hybrid_late",
    "simplified",
    "gradual",
    "lora",
    "norm_tuning",
    "reconstruct",
)


def study(name, title, argument, *, epochs, strategies=STRATEGIES, elsewhere=None, masks=False):
    """Return the config of a study without its corpus and tasks.

    Args:
        name: Name of the study, which is the file's.
        title: Title of its report.
        argument: Argument of the config, `ENCODER[,SHARE...]`.
        epochs: Epochs of full DAPT at its longest, after those of its head.
        strategies: Strategies that run at every share beside full DAPT, of `STRATEGIES`.
        elsewhere: Settings of a corpus of another domain, for a control at a tenth; None for no such arm.
        masks: Whether a target task is of masks.
    """
    encoder, *shares = [part.strip() for part in argument.split(",")] if argument else [""]
    encoder = encoder or "efficientnet_lite0"
    if encoder not in ENCODERS:
        raise UserError(f"configs/evidence/{name}.py:{argument}: {encoder!r}; {nearest(encoder, ENCODERS)}")
    for share in shares:
        if not share.isdecimal() or not 0 < int(share) < 100:
            raise UserError(
                f"configs/evidence/{name}.py:{argument}: share {share!r}; expected percentages of full DAPT's "
                "FLOPs from 1 to 99, such as 1,3,10,30"
            )
    chosen = ENCODERS[encoder]
    config = default()
    config.name = f"evidence_{name}"
    config.title = title
    config.model.name = encoder
    config.model.image_size = chosen["image_size_of_masks" if masks else "image_size"]
    config.weights = chosen["weights"]
    config.seeds = (0, 1, 2, 3, 4)
    config.adapt.head_epochs = HEAD_EPOCHS
    config.adapt.epochs = epochs
    config.adapt.cut_after = chosen["cut_after"]
    config.adapt.optimizer.update({"name": "adamw", "weight_decay": 1e-4})
    config.adapt.lora.rank = 8
    specs = _strategies(chosen["top"], chosen["lora"], epochs)
    arms = {"scratch": {"weights": "random", "phases": ()}}
    for share in shares or SHARES:
        for each in ("full", *strategies):
            arms[f"{each}_{share}"] = {**specs[each], "compute_budget": int(share) / 100}
    if elsewhere is not None:
        config.corpora.elsewhere = elsewhere
        arms["elsewhere_10"] = {**specs["full"], "corpus": "elsewhere", "compute_budget": 0.1}
    config.custom_strategies.update(arms)
    # Of a cut encoder, what cutting alone does is told apart from what adapting it does.
    controls = ("truncated",) if "simplified" in strategies else ()
    config.strategies = ("none", "full", *arms, *controls)
    config.transfer.protocols = ("linear",)
    config.report.margin = 0.01
    return config


def _strategies(top, with_kernels, epochs):
    """Return custom strategies by name, each as long as full DAPT."""
    lora = tuple(f"{group}:lora" for group in with_kernels)
    norms = tuple(f"{group}*:norm" for group in top)
    early, late = max(1, epochs // 4), max(1, epochs - max(1, epochs // 4))
    return {
        "full": {"like": "full"},
        "simplified": {"like": "simplified"},
        "gradual": {"like": "gradual"},
        "partial": _phases(("partial", top, epochs, VIEWS)),
        "hybrid_early": _phases(("partial", top, early, VIEWS), ("full", ("*",), late, 0)),
        "hybrid_late": _phases(("partial", top, late, VIEWS), ("full", ("*",), early, 0)),
        "lora": _phases(("lora", lora, epochs, VIEWS)),
        "norm_tuning": _phases(("norm_tuning", norms, epochs, VIEWS), batch_norm="affine"),
        "reconstruct": {
            "objective": "reconstruct",
            **_phases(("reconstruct", top, epochs, VIEWS), head=False),
        },
    }


def _phases(*parts, head=True, **others):
    """Return a custom strategy of phases, each a name, groups, epochs and views, after one of the head alone."""
    first = {"name": "head", "epochs": HEAD_EPOCHS, "trainable": ("head",), "lr": 1e-3, "augment": False}
    listed = [
        {
            "name": name, "epochs": epochs, "trainable": (*groups, "head"), "lr": 1e-4, "schedule": "cosine",
            "views": views, **others,
        }
        for name, groups, epochs, views in parts
    ]  # fmt: skip
    return {"phases": (first, *listed) if head else tuple(listed)}
