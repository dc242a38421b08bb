"""Every setting of a study with its default: a config file starts here and changes what it needs."""

from ml_collections import config_dict

from dapt_jax.records.vocabulary import MARGIN

MODES = ("run", "plan", "aot", "status", "report", "export", "models")
OPEN = ("corpus", "corpora", "tasks", "phases")
"""Sections whose settings are the user's own."""


def default() -> config_dict.ConfigDict:
    """A study's settings.

    Returns:
        A config that is locked but for corpus, tasks and phases: no setting can be added elsewhere.
    """
    config = config_dict.ConfigDict()
    config.name = "study"
    config.title = ""  # of the report
    config.note = ""  # a line below it
    config.synthetic = False  # the images are made by a generator: said wherever results are shown
    config.mode = "run"  # run | plan | aot | status | report | export | models
    config.strategies = ("none", "full", "partial", "hybrid", "simplified")
    config.seeds = (0, 1, 2)
    config.model = {
        "name": "efficientnet_lite0",
        "image_size": 96,
        "dtype": "float32",  # of activations: float32 | bfloat16
        "drop_path": 0.0,  # stochastic depth while training, of the last residual branch
        "dropout": 0.0,  # while training, of transformers
        # Statistics of batch norm that trains: of the global batch, or each device's of its own examples; the latter's results
        # depend on the number of devices.
        "batch_norm": "global",  # global | per_device
        "remat": (),  # layer groups whose activations are computed again instead of kept; "*" for all
    }
    config.weights = "imagenet"  # imagenet | random | a name of weights/zoo.py | a path | https:// | hf:// | package://
    # Devices and processes; none of it changes results beyond rounding.
    config.parallel = {
        "fsdp": 1,  # devices over which each copy of parameters and optimizer state is spread; 0: all
        "processes": "auto",  # auto (several if the cluster or the environment says so) | on | off
        "coordinator": "",  # HOST:PORT of the first process, where no cluster says it
        "count": 0,  # of processes
        "number": -1,  # of this one, from 0
    }
    config.data_dir = ""  # what relative paths below start from: a folder, gs://, s3:// ...
    config.data = {
        "on_bad_image": "error",  # error | skip (counted)
        "cache_mb": 2048,  # decoded images kept in memory
        "threads": 2,  # that decode
        "stall_s": 120.0,  # a read that takes longer is told of, with its file; 0: never
    }
    # The in-domain corpus: see data/sources.py for what a source may say.
    config.corpus = config_dict.ConfigDict({"kind": "", "val_fraction": 0.1})
    # More of them, by name, for strategies that say corpus="NAME": each a source, with val_fraction if it is not 0.1.
    config.corpora = config_dict.ConfigDict()
    # Target tasks: name -> {development, test (optional), external (optional)}, each a source.
    config.tasks = config_dict.ConfigDict()
    config.adapt = {
        "head_epochs": 10,  # the head alone, before anything else: every strategy begins with it
        "head_lr": 1e-3,
        "epochs": 4,  # after it
        "lr": 1e-4,
        "schedule": "cosine",  # constant | cosine | linear | poly | step | plateau, within each phase
        "warmup": 0.0,  # epochs
        "norm": "frozen",  # frozen | stats | train: batch norm of the groups that train
        "partial_groups": 2,  # partial: last layer groups that train
        "hybrid_epochs": 2,  # hybrid: of `epochs`, those that are partial
        "cut_after": "",  # simplified: last layer group that is kept
        "gradual_steps": 4,  # gradual: phases in which the encoder is unfrozen from the top
        "batch_size": 32,  # over all devices
        "accumulate": 1,  # parts of a batch that each device goes through one after the other, for want of memory
        "views": 0,  # augmented views per image; 0: new ones each epoch
        **_loss(),
        "mix": _mix(),
        "balance_classes": True,  # weight classes by inverse frequency
        "optimizer": _optimizer(),
        "plateau": _plateau(),
        "augment": _augment(),
        "single_logit": False,  # two classes by one sigmoid output, as the paper's head
    }
    # Activations of frozen prefixes, computed once for all arms, seeds and tasks.
    config.cache = {
        "mode": "auto",  # auto | on | off
        "memory_mb": 2048,  # on the device
        "disk_mb": 8192,  # past it; 0: none
        "dir": "",  # on disk; empty: in the workdir, and removed when the study is done
        "dtype": "",  # float32 | bfloat16; empty: as computed
        "flops_per_byte": 0.0,  # least forward FLOPs that a byte read from disk must save; 0: by the kind of device
    }
    # Strategies of the user's own: name -> {"phases": tuple of dicts, see phases.Phase, or "like": a named strategy;
    # and if it differs from the study's: "weights", "corpus" (a name of corpora), "cut_after" (a layer group)}.
    config.phases = config_dict.ConfigDict()
    config.transfer = {
        "protocols": ("linear", "mlp_small", "mlp_large"),  # and finetune
        "folds": 5,
        "head": {
            "epochs": 100,
            "lr": 3e-4,
            "batch_size": 64,
            "weight_decay": 1e-4,
            "standardise": True,
            **_loss(),
            # Several of either: each fold takes the pair that is best on rows held out of its own training rows.
            "grid": {"lr": (), "weight_decay": (), "val_fraction": 0.2},
        },
        "finetune": {
            "folds": 1,  # of `folds`, those that are run
            "head_epochs": 50,
            "head_lr": 1e-3,
            "epochs": 8,
            "lr": 1e-4,
            "schedule": "cosine",
            "norm": "frozen",
            "batch_size": 16,
            "accumulate": 1,
            **_loss(),
            "mix": _mix(),
            "augment": _augment(),
            "optimizer": _optimizer(),
            **_watched(),
            "test_crops": 1,  # 10: corners and middle, and mirrored, of the size of `augment.patch`, averaged
        },
        # Tasks whose sets name `segments` (data/sources.py): a decoder on the encoder.
        "segmentation": {
            "protocols": ("frozen", "finetune"),  # the encoder stays as it is, or trains after the decoder
            "folds": 1,  # of `folds`, those that are run
            "decoder": "unet",  # unet | attention_unet | swin_unet | upernet
            "loss": "dice_ce",  # dice | ce | dice_ce | tversky
            "batchwise": False,  # Dice over the pixels of a batch instead of image by image
            "smooth": 1.0,  # of Dice
            "decoder_epochs": 5,  # the decoder alone, first
            "decoder_lr": 1e-3,  # for as long as it trains
            "epochs": 15,  # then all layers; of the protocol `frozen`, the decoder still
            "lr": 1e-4,  # of the encoder
            "schedule": "cosine",
            "norm": "frozen",  # of the encoder; the decoder's batch norm trains always
            "batch_size": 16,
            "accumulate": 1,
            "views": 0,  # augmented views per image; 0: new ones each epoch
            "augment": _augment(),
            **_watched(),
            "overlap": 0.5,  # of neighbouring windows, where `augment.patch` trains on parts of the images
            "overlays": 4,  # images of each set whose masks the report shows
            "optimizer": _optimizer(),
        },
        "baseline": "mean_gradient",  # what any encoder has to beat, of images and of pixels; "" for none
    }
    # Read where the hardware has no energy counter: the Green Algorithms formula.
    config.energy = {
        "region": "world",  # whose carbon intensity the report takes: see cost/energy.py
        "pue": 1.67,  # power usage effectiveness of the place where the machine stands
        "watts": 0.0,  # of each device; 0: the table's
    }
    # mode=aot: the study's steps compiled for TPUs that are not there, of config.parallel.
    config.aot = {
        "topology": "v5e:2x4",  # CHIP:SHAPE: v4, v5e, v5p or v6e, and chips along each axis
        "compilations": 6,  # that the search for a phase's largest batch may take; 0: none is looked for
    }
    config.measure_peak = False  # of a CPU, once: two seconds, for utilisation in the report
    # Transferability scores of target images along adaptation: see transferability/.
    config.score = {
        "every": 0,  # epochs between scores; 0: none, or every epoch where `select` names one
        "names": ("robustness",),  # of transferability/registry.py
        "task": "",  # whose development images; empty: the first task's
        "images": 256,  # of the sample, at most
        "budget": 0.02,  # share of the training FLOPs that scoring may take: the sample shrinks to fit
        "views": 2,  # jittered views of an image
        "level": 2,  # features of views and masks: 1 the encoder's last, 2 the deepest skip, ...
        "pooled": True,
        "distance": "cosine",  # cosine | l2 | inverse_pearson
        "margin": 0.5,
        "negatives": 1,  # 0: all other images
        "rule": "length_prior",  # best | patience | length_prior
        "patience": 3,
        "window": 1,
        "weight": 1.0,  # of length_prior: deviations of the score that the whole length is worth
        "downstream": False,  # measure every scored checkpoint on the target tasks, as an arm of its own
    }
    config.select = ""  # a score: adaptation stops by it, and hands over the checkpoint that it chooses
    config.budget = (
        0.0  # share of full DAPT's FLOPs that all strategies may take: successive halving by `select`; 0: none
    )
    config.checkpoint = {"every_s": 30.0}
    config.debug = {
        "nan": "halt",  # of a loss that is no number, save the batch and: halt | rollback (to the phase's start, once)
        "nan_factor": 0.1,  # rollback: what the rate is multiplied by from there
    }
    # Beside metrics.jsonl and status.json in the workdir.
    config.watch = {
        "tensorboard": False,  # event files in the workdir
        "wandb": "",  # name of a Weights & Biases project; WANDB_MODE=offline needs no account
        "prometheus": "",  # NAME.prom in the folder that node_exporter's textfile collector reads
    }
    config.profile = {"step": 0, "steps": 5}  # of the first run that comes there, from 1; 0: no trace
    config.report = {
        "metric": "auc",
        "protocol": "",
        "margin": MARGIN,  # of the metric: what is worse than full DAPT by less is called no worse; 0: no such claim
    }
    config.lock()
    for section in OPEN:
        config[section].unlock()
    return config


def _augment() -> dict[str, object]:
    """All off; data/augment.py says what each is. Masks go the way of their images."""
    return {
        "flip": "none",  # none | horizontal | dihedral
        "shift": 0.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "rotate": 0.0,  # degrees
        "scale": 0.0,
        "crop": 0.0,  # least share of the area of a random resized crop
        "elastic": 0.0,
        "grid": 0.0,
        "patch": 0,  # pixels
        "gamma": 0.0,
        "saturation": 0.0,
        "hue": 0.0,
        "erase": 0.0,  # probability
        "randaugment": 0,  # operations per image
        "magnitude": 9.0,  # of each, 0 to 30
    }


def _loss() -> dict[str, object]:
    """What losses/ says of each."""
    return {
        "loss": "auto",  # auto (ce, or bce of several labels) | ce | bce | focal | asymmetric | ordinal
        "label_smoothing": 0.0,
        "focal_gamma": 2.0,
        "focal_alpha": 0.0,  # share of the weight that positives have; 0: all alike
        "gamma_positive": 0.0,  # of the asymmetric loss
        "gamma_negative": 4.0,
        "margin": 0.05,
    }


def _mix() -> dict[str, object]:
    """Off; data/mix.py says what each is. Only where images are augmented, and never of cached activations."""
    return {
        "mixup": 0.0,  # both parameters of the beta distribution
        "cutmix": 0.0,
        "switch": 0.5,  # probability of CutMix where there are both
        "probability": 1.0,
    }


def _watched() -> dict[str, object]:
    return {
        "val_fraction": 0.0,  # of each fold's training images, by patient, that are watched instead of trained on
        "plateau": _plateau(),  # by the loss on them, or on what is trained on where there are none
        "early_stop": 0,  # epochs without a better watched loss that are let pass, then back to the best; 0: all epochs
    }


def _plateau() -> dict[str, object]:
    return {"factor": 0.5, "patience": 5, "threshold": 1e-4}


def _optimizer() -> dict[str, object]:
    return {
        "name": "adam",  # adam | adamw | sgd
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-7,
        "nesterov": False,
        "clip": 0.0,  # global norm of the trained leaves' gradient; 0: none
        "ema": 0.0,  # decay of averaged weights; 0: none
    }
