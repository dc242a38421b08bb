"""A pre-training without target tasks, and studies that take its encoders: EfficientNet-Lite0 cut early, 32 pixels."""

from dapt_jax.settings import default

CUT = "stage1/block1"
ALL = {"name": "all", "epochs": 3, "trainable": ("*",), "lr": 1e-3}


def get_config(part="pretraining"):
    config = default()
    config.name = part
    config.synthetic = True
    config.seeds = (0,)
    config.model.image_size = 32
    config.adapt.batch_size = 16
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 32, "val_fraction": 0.0})
    config.corpora.other = {"kind": "textures", "name": "all", "n": 24, "val_fraction": 0.0}
    config.transfer.protocols = ("linear",)
    config.transfer.folds = 2
    config.transfer.baseline = ""
    config.transfer.head.epochs = 2
    config.checkpoint_scoring.level = 1
    config.custom_strategies.own = {"cut_after": CUT, "phases": (ALL,)}
    config.strategies = ("own",)
    if part == "pretraining":
        config.adapt.checkpoints = (1,)
        config.adapt.checkpoint_every = 2
        return config
    config.tasks.cells = {"development": {"kind": "phantoms", "name": "development", "n": 24}}
    if part == "chain":
        first = {**ALL, "name": "textures", "epochs": 1, "corpus": "other"}
        config.custom_strategies.own = {"cut_after": CUT, "phases": (first, {**ALL, "epochs": 1})}
        config.adapt.seed = 7
        config.seeds = (0, 1)
    return config
