"""Adapt an encoder to a folder of images without labels, and export it.

    python -m dapt_jax.main --config=configs/label_free.py --config.corpus.path=/my/images --workdir=runs/mine
    python -m dapt_jax.main --config=configs/label_free.py --config.corpus.path=/my/images --workdir=runs/mine
    --config.mode=export

The argument is CORPUS,OBJECTIVE,STRATEGY, each of which may be left out:
`--config=configs/label_free.py:images,reconstruct,partial` is the default. CORPUS is a kind of data set:
`images` reads every picture, DICOM file and slice of a NIfTI volume below a folder, or the images of a CSV file;
`phantoms` generates some. OBJECTIVE is reconstruct, distil (with --config.adapt.distil.teacher=WEIGHTS),
two_views, mae, which adapts a vision transformer of the weights `package:dinov2_vits14` instead of
EfficientNet-Lite0, or dino, the riskiest. STRATEGY is any of the built-in ones. `--config.mode=plan` prices it
first: targets, heads, and how many fixed views fit the cache. docs/label_free.md says what to choose when.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.objectives import LABEL_FREE, Dino, MaskedAutoencoder
from dapt_jax.settings import default

CHOICES = ("images", "reconstruct", "partial")


def get_config(argument=""):
    given = [part.strip() for part in argument.split(",")] if argument else []
    if len(given) > len(CHOICES):
        raise UserError(f"configs/label_free.py:{argument}: expected CORPUS,OBJECTIVE,STRATEGY")
    corpus, objective, strategy = (*given, *CHOICES[len(given) :])
    if objective not in LABEL_FREE:
        raise UserError(
            f"configs/label_free.py:{argument}: objective {objective!r}; {nearest(objective, LABEL_FREE)}"
        )
    config = default()
    config.name = "label_free"
    config.title = f"Label-free adaptation: {objective}, {strategy}"
    config.strategies = (strategy,)
    config.seeds = (0,)
    config.corpus.kind = corpus
    if corpus == "phantoms":
        config.synthetic = True
        config.corpus.update({"name": "corpus", "n": 900})
    else:
        config.corpus.path = ""
    config.adapt.objective = objective
    config.adapt.epochs = 20
    config.adapt.warmup = 2.0
    config.adapt.hybrid_epochs = 10
    config.adapt.partial_groups = 6
    config.adapt.num_fixed_views = 4 if objective in ("reconstruct", "distil") else 8
    if objective == MaskedAutoencoder.name:
        config.model.name = "vit_small_dinov2"
        config.model.image_size = 112
        config.weights = "package:dinov2_vits14"
        config.adapt.partial_groups = 5
    if objective == Dino.name:  # as published: AdamW, clipped gradients
        config.adapt.optimizer.name = "adamw"
        config.adapt.optimizer.weight_decay = 0.04
        config.adapt.optimizer.clip = 3.0
    config.adapt.augment.flip = "dihedral"
    config.adapt.augment.brightness = 0.3
    config.adapt.augment.contrast = 0.3
    config.adapt.augment.crop = 0.5
    return config
