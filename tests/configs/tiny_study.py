"""A study of seconds: EfficientNet-Lite0 cut after its second stage, phantoms of 32 pixels."""

from dapt_jax.settings import default


def get_config():
    config = default()
    config.name = "tiny"
    config.title = "Tiny study of phantoms"
    config.synthetic = True
    config.strategies = ("truncated", "switching")
    config.seeds = (0,)
    config.model.image_size = 32
    phases = (
        {"name": "head", "epochs": 2, "trainable": ("head",), "lr": 1e-3, "augment": False},
        {"name": "partial", "epochs": 2, "trainable": ("stage2", "head"), "lr": 1e-3},
        {"name": "full", "epochs": 2, "trainable": ("*",), "lr": 1e-3, "schedule": "cosine"},
    )
    config.corpus.update({"kind": "phantoms", "name": "corpus", "n": 96})
    config.tasks.cells = {
        "development": {"kind": "phantoms", "name": "development", "n": 80},
        "external": {"kind": "phantoms", "name": "external", "n": 40},
    }
    config.custom_strategies.switching = {"cut_after": "stage2/block2", "phases": phases}
    config.adapt.cut_after = "stage2/block2"
    config.adapt.batch_size = 8
    config.adapt.augment.flip = "dihedral"
    config.transfer.protocols = ("linear", "finetune")
    config.transfer.folds = 2
    config.transfer.head.epochs = 10
    config.transfer.finetune.epochs = 2
    config.transfer.finetune.head_epochs = 2
    config.transfer.finetune.batch_size = 8
    config.runtime.checkpoint_every_s = 0.0
    return config
