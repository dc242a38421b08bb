"""Sections about training, common to adaptation and target tasks or specific to one."""

import dataclasses
from collections.abc import Callable

from dapt_jax.data.augment import Augment
from dapt_jax.data.mix import Mix
from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import SettingError, check_fields, section, setting, with_default
from dapt_jax.metrics.registry import MASKS, SURFACES, names_of
from dapt_jax.models.decoders import BUILDERS as DECODERS
from dapt_jax.models.lora import LoraSettings
from dapt_jax.models.row_changes import RowSettings
from dapt_jax.objectives import (
    OBJECTIVES,
    SUPERVISED,
    DinoSettings,
    DistilSettings,
    MaeSettings,
    ReconstructSettings,
    TwoViewsSettings,
)
from dapt_jax.parameters import BATCH_NORM_MODES, LAYER_NORM_MODES, BatchNormMode, LayerNormMode
from dapt_jax.settings.losses import LossSettings, classification_loss, segmentation_loss
from dapt_jax.training.head_sweep import HIDDEN
from dapt_jax.training.linear_head import LINEAR
from dapt_jax.training.optim import Optimizer, Plateau
from dapt_jax.training.phases import SCHEDULES

FROZEN, FINETUNE = "frozen", "finetune"
PROTOCOLS = (LINEAR, *HIDDEN, FINETUNE)
"""Ways to use an encoder for a task of classes: heads on its features, or fine-tuning."""

SEGMENTATION_PROTOCOLS = (FROZEN, FINETUNE)
"""Ways to use an encoder for a task of masks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings common to all kinds of training."""

    epochs: int = setting(4, at_least=1, doc="Epochs of the encoder's training.")
    lr: float = setting(1e-4, above=0, doc="Peak learning rate of it.")
    schedule: str = setting("cosine", choices=SCHEDULES, doc="Learning-rate schedule within each phase.")
    batch_norm: BatchNormMode = setting(
        "frozen",
        choices=BATCH_NORM_MODES,
        doc="Batch norm of layer groups that train: frozen, its scale and bias, its statistics, or all of it.",
    )
    layer_norm: LayerNormMode = setting(
        "train", choices=LAYER_NORM_MODES, doc="Scale and bias of layer norm, of layer groups that train."
    )
    batch_size: int = setting(32, at_least=1, doc="Images per step, over all devices.")
    grad_accum_steps: int = setting(
        1, at_least=1, doc="Parts of a batch that each device computes one after the other."
    )
    augment: Augment = section(Augment, "Augmentation.")
    optimizer: Optimizer = section(Optimizer, "Optimizer.")
    plateau: Plateau = section(Plateau, "The schedule plateau.")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierTrainSettings(TrainSettings):
    """Training of an encoder with a head for classes."""

    head_epochs: int = setting(
        10, at_least=0, doc="Epochs of the head alone, first; 0: all layers from the start."
    )
    head_lr: float = setting(1e-3, above=0, doc="Learning rate of the head alone.")
    loss: LossSettings = section(classification_loss, "Loss.")
    mix: Mix = section(Mix, "Mixup and CutMix.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings(ClassifierTrainSettings):
    """Domain-adaptive pre-training: the section `adapt`."""

    warmup: float = setting(0.0, doc="Epochs of linear warm-up in each phase.")
    partial_groups: int = setting(2, doc="Number of last layer groups that partial trains.")
    hybrid_epochs: int = setting(
        2,
        doc="Epochs of hybrid, of all its epochs, that are partial; of lora+full and the like those of the first.",
    )
    cut_after: str = setting("", doc="Last layer group that simplified and truncated keep.")
    peft_groups: int = setting(
        0,
        at_least=0,
        doc="Last layer groups in which bitfit, norm_tuning, attention_output, apla and lora train; 0: all.",
    )
    lora: LoraSettings = section(LoraSettings, "Low-rank updates.")
    rows: RowSettings = section(RowSettings, "Rows that apla and patterns with :rows train.")
    gradual_steps: int = setting(4, doc="Phases in which gradual unfreezes the encoder from the top.")
    num_fixed_views: int = setting(
        0, at_least=0, doc="Fixed augmented views per image; 0: new ones each epoch."
    )
    view_seed: int = setting(
        -1,
        at_least=-1,
        doc="Seed of fixed views, so that what is cached of them is computed once for all seeds of the study; -1: "
        "each seed has its own views.",
    )
    objective: str = setting(
        SUPERVISED,
        choices=OBJECTIVES,
        doc="What adaptation minimises: the loss of labels, or, without labels, reconstruct, distil, two_views, mae or dino.",
    )
    reconstruct: ReconstructSettings = section(ReconstructSettings, "The objective reconstruct.")
    distil: DistilSettings = section(DistilSettings, "The objective distil.")
    two_views: TwoViewsSettings = section(TwoViewsSettings, "The objective two_views.")
    mae: MaeSettings = section(MaeSettings, "The objective mae.")
    dino: DinoSettings = section(DinoSettings, "The objective dino, the riskiest.")
    early_stopping_patience: int = setting(
        0,
        at_least=0,
        doc="Epochs in a row of the last phase without a lower loss of the corpus' held-out images; after one more, "
        "back to the best; 0: train all epochs.",
    )
    balance_classes: bool = setting(True, doc="Weight classes by their inverse frequency.")
    balance_clusters: int = setting(
        0,
        at_least=0,
        doc="Clusters of the source weights' features that arms without labels sample equally often; 0: images.",
    )
    single_logit: bool = setting(False, doc="One sigmoid output for two classes.")
    seed: int = setting(
        -1,
        at_least=-1,
        doc="Seed of adaptation, run once for all seeds of the study; -1: each seed adapts anew.",
    )
    checkpoints: tuple[int, ...] = setting(
        (),
        doc="Epochs after which the encoder is kept in checkpoints/ARM/epochs, for run:WORKDIR@epoch=N; "
        "scored too where checkpoint_scoring scores.",
    )
    checkpoint_every: int = setting(
        0, at_least=0, doc="Epochs between further kept encoders, the last epoch included; 0: none."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for epochs in self.checkpoints:
            if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
                raise UserError(f"adapt.checkpoints holds {epochs!r}; expected numbers of epochs from 1")

    @property
    def has_own_seed(self) -> bool:
        """Whether all seeds of the study share one adaptation."""
        return self.seed >= 0

    def kept_epochs(self, epochs: int) -> frozenset[int]:
        """Return the numbers of epochs after which a run's encoder is kept.

        Args:
            epochs: Epochs of the run.
        """
        every = self.checkpoint_every
        regular = {*range(every, epochs + 1, every), epochs} if every else set()
        return frozenset({*self.checkpoints, *regular})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetTrainSettings(TrainSettings):
    """Training of a network on a target task."""

    folds: int = setting(1, at_least=1, doc="Folds that are run, of transfer.folds.")
    val_fraction: float = setting(
        0.0,
        at_least=0,
        below=1,
        doc="Share of a fold's training images, split by patient, held out for validation; of a task without val.",
    )
    early_stopping_patience: int = setting(
        0,
        at_least=0,
        doc="Epochs without a lower validation loss, then back to the best; 0: train all epochs.",
    )

    def check_validation(self, where: str) -> None:
        """Refuse early stopping without validation rows; `where` is the name of the section."""
        if self.early_stopping_patience and not self.val_fraction:
            raise UserError(
                f"{where}.early_stopping_patience needs rows to watch; expected {where}.val_fraction above "
                "0, such as 0.1, or a val split in every task"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(ClassifierTrainSettings, TargetTrainSettings):
    """Fine-tuning on a task of classes: the section `transfer.finetune`."""

    epochs: int = with_default(TrainSettings, "epochs", 8)
    batch_size: int = with_default(TrainSettings, "batch_size", 16)
    head_epochs: int = with_default(ClassifierTrainSettings, "head_epochs", 50)
    test_crops: int = setting(
        1, doc="Crops averaged at test time: 1, or 10 of the size of augment.patch, half of them mirrored."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_crops not in (1, 10):
            raise SettingError("test_crops", self.test_crops, "1 or 10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationSettings(TargetTrainSettings):
    """A decoder on the encoder, for a task of masks: the section `transfer.segmentation`."""

    protocols: tuple[str, ...] = setting(
        SEGMENTATION_PROTOCOLS, doc="frozen: the decoder alone trains; finetune: the encoder after it, too."
    )
    epochs: int = setting(
        15,
        at_least=1,
        doc="Epochs of all layers, after the decoder alone; of the protocol frozen, more of the decoder.",
    )
    batch_size: int = with_default(TrainSettings, "batch_size", 16)
    decoder: str = setting("unet", choices=tuple(DECODERS), doc="Decoder.")
    decoder_epochs: int = setting(5, at_least=0, doc="Epochs of the decoder alone, first.")
    decoder_lr: float = setting(1e-3, above=0, doc="Learning rate of the decoder for as long as it trains.")
    num_fixed_views: int = with_default(AdaptSettings, "num_fixed_views", 0)
    loss: LossSettings = section(segmentation_loss, "Loss.")
    metrics: tuple[str, ...] = setting(
        names_of(MASKS, SURFACES, default=True), doc="Metrics of masks that are computed."
    )
    frozen_batch_norm: str = setting(
        "frozen",
        choices=("frozen", "stats"),
        doc="Batch norm of the encoder under the protocol frozen: its own statistics, or each batch's.",
    )
    drop_path: float = setting(
        -1.0,
        at_least=-1,
        below=1,
        doc="Stochastic depth of the last residual branch on masks; -1: model.drop_path.",
    )
    overlap: float = setting(
        0.5,
        at_least=0,
        below=1,
        doc="Overlap of neighbouring windows, where augment.patch trains on parts of images.",
    )


DECAYS = (1e-4, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weight decays that `transfer.head.grid.nested` chooses among by itself. Decoupled decay acts through learning
rate and steps: at the default rate, 1 shrinks a kernel to a third within 3,700 steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Hyperparameter grid of perceptrons: the section `transfer.head.grid`."""

    lr: tuple[float, ...] = setting(
        (), doc="Learning rates to choose among by validation; empty: transfer.head.lr."
    )
    weight_decay: tuple[float, ...] = setting(
        (), doc="Weight decays to choose among; empty: transfer.head.weight_decay."
    )
    val_fraction: float = setting(
        0.2, at_least=0, below=1, doc="Share of a fold's training rows that choose, without nested."
    )
    nested: bool = setting(
        False,
        doc=f"Choose by inner folds, as strengths of linear heads are; without weight_decay, among {DECAYS}.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name, is_valid, expected in (
            ("lr", lambda value: value > 0, "numbers above 0"),
            ("weight_decay", lambda value: value >= 0, "numbers from 0"),
        ):
            check_numbers(f"transfer.head.grid.{name}", getattr(self, name), is_valid, expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Heads on frozen features: the section `transfer.head`.

    The protocol `linear` is logistic regression, with one of `strengths`; perceptrons are trained by gradients.
    """

    strengths: tuple[float, ...] = setting(
        (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5),
        doc="Strengths of the penalty of linear heads, per feature; inner folds choose among several.",
    )
    epochs: int = setting(100, at_least=1, doc="Epochs of perceptrons.")
    lr: float = setting(3e-4, above=0, doc="Learning rate of perceptrons.")
    batch_size: int = setting(64, at_least=1, doc="Images per step of perceptrons.")
    weight_decay: float = setting(1e-4, at_least=0, doc="Decoupled weight decay of perceptrons' kernels.")
    early_stopping: bool = setting(
        False, doc="Choose the epochs of perceptrons, from 1 to epochs, by inner folds of the training rows."
    )
    standardise: bool = setting(
        True, doc="Scale features to mean 0 and variance 1 over a fold's training rows."
    )
    score_every_epoch: bool = setting(
        False, doc="Score perceptrons after every epoch too: auc_epochs, its spread, and head_curves/*.csv."
    )
    loss: LossSettings = section(classification_loss, "Loss.")
    grid: GridSettings = section(GridSettings, "Hyperparameter search of perceptrons.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.strengths:
            raise UserError("transfer.head.strengths is empty; expected one or more numbers above 0")
        check_numbers("transfer.head.strengths", self.strengths, lambda value: value > 0, "numbers above 0")
        if self.early_stopping and self.score_every_epoch:
            raise UserError(
                "transfer.head.score_every_epoch scores heads after all of their epochs, which early_stopping does "
                "not reach; expected one of the two"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Evaluation of encoders on the target tasks: the section `transfer`."""

    protocols: tuple[str, ...] = setting(
        ("linear", "mlp_small", "mlp_large"), doc="Heads on frozen features, and finetune."
    )
    folds: int = setting(5, at_least=2, doc="Folds of each task's development images, split by patient.")
    split_seed: int = setting(
        -1,
        at_least=-1,
        doc="Seed of the folds and inner splits, the same for all seeds; -1: each seed's own.",
    )
    baseline: str = setting(
        "mean_gradient",
        choices=("", "mean_gradient"),
        doc="One feature per image, for comparison; empty: none.",
    )
    keep: str = setting(
        "best",
        choices=("best", "all", "none"),
        affects_results=False,
        doc="Target models that stay in models/ of the workdir: of the best strategy, all, or none.",
    )
    head: HeadSettings = section(HeadSettings, "Heads on frozen features.")
    finetune: FinetuneSettings = section(FinetuneSettings, "Fine-tuning.")
    segmentation: SegmentationSettings = section(SegmentationSettings, "Tasks of masks.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name, run in (("finetune", self.finetune), ("segmentation", self.segmentation)):
            if run.folds > self.folds:
                raise SettingError(f"{name}.folds", run.folds, f"1 to transfer.folds, {self.folds}")
        check_names("transfer.protocols", self.protocols)
        check_names("transfer.segmentation.protocols", self.segmentation.protocols)
        check_names("transfer.segmentation.metrics", self.segmentation.metrics)
        of_masks = names_of(MASKS, SURFACES)
        for name in self.segmentation.metrics:
            if name not in of_masks:
                raise UserError(f"unknown transfer.segmentation.metrics {name!r}; {nearest(name, of_masks)}")
        for where, protocols, known in (
            ("transfer", self.protocols, PROTOCOLS),
            ("transfer.segmentation", self.segmentation.protocols, SEGMENTATION_PROTOCOLS),
        ):
            for protocol in protocols:
                if protocol not in known:
                    raise UserError(f"unknown {where} protocol {protocol!r}; {nearest(protocol, known)}")

    def check_validation(self, where: str) -> None:
        """Refuse early stopping without validation rows; `where` is the name of the section."""
        self.finetune.check_validation(f"{where}.finetune")
        self.segmentation.check_validation(f"{where}.segmentation")


def check_numbers(
    name: str, values: tuple[float, ...], is_valid: Callable[[float], bool], expected: str
) -> None:
    """Refuse a setting that holds anything but numbers of a range.

    Args:
        name: Name of the setting.
        values: Its values.
        is_valid: Whether a number is in the range.
        expected: The range in words.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
            raise UserError(f"{name} holds {value!r}; expected {expected}")


def check_names(name: str, values: tuple[str, ...]) -> None:
    """Refuse a setting that is not a list of unique names; `check_fields` refuses what is no text.

    Args:
        name: Name of the setting.
        values: Its values.
    """
    if not values or len(set(values)) < len(values):
        raise UserError(f"{name} is {values}; expected one or more, each once")
