"""Definition of one training run: model, data and options, from which the rest is derived."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from dapt_jax.cost.flops import Flops
from dapt_jax.data import file_crops, near_duplicates
from dapt_jax.data.augment import Augment
from dapt_jax.data.dataset import Dataset
from dapt_jax.data.decode import ImageStore
from dapt_jax.data.mix import Mix
from dapt_jax.data.pipeline import Order
from dapt_jax.errors import UserError
from dapt_jax.losses import Loss, SegmentationLoss
from dapt_jax.models.network import Network
from dapt_jax.models.tokens import visible_count
from dapt_jax.objectives import Objective
from dapt_jax.training import accounting, label_free, steps, targets
from dapt_jax.training.cache.policy import CacheDecision, Caching, Tier, choose_cache
from dapt_jax.training.cache.store import Prefix
from dapt_jax.training.freezing import Tree
from dapt_jax.training.optim import Optimizer, Plateau
from dapt_jax.training.phases import Phase, Timeline, check_names
from dapt_jax.training.steps import PhaseProgram

ModelT = TypeVar("ModelT", bound=Network)

LARGEST_SEED = 2**32 - 1
"""JAX's random keys are made from 32 bits."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainData:
    """The images of a run.

    >>> from dapt_jax.data.sources import load
    >>> data = load({"kind": "phantoms", "name": "corpus", "n": 12}, data_dir=None, image_size=32)
    >>> TrainData(data, train_rows=range(8), val_rows=range(8, 12)).val_rows
    array([ 8,  9, 10, 11])

    Attributes:
        dataset: Data set that holds all rows.
        train_rows: Row numbers that are trained on, int [n].
        val_rows: Row numbers on which the validation loss is computed after every epoch, int [v]; may be
            empty.
        weights: Weight of every training row in the loss, in the order of `train_rows`; empty for 1 each.
        clusters: Cluster of every training row, all of which are sampled equally often; empty for none.
    """

    dataset: Dataset
    train_rows: np.ndarray
    val_rows: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(0))
    weights: tuple[float, ...] = ()
    clusters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Turn sequences of rows into arrays.

        Raises:
            UserError: A row is not in the data set, there is no training row, a weight is not positive, or weights
                or clusters do not match the rows.
        """
        for name in ("train_rows", "val_rows"):
            rows = np.asarray(getattr(self, name))
            if rows.size and (rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer)):
                raise UserError(
                    f"{self.dataset.name}: {name} is an array {list(rows.shape)} of {rows.dtype}; expected numbers of "
                    "rows, int [n], which numpy.flatnonzero returns for a mask"
                )
            rows = rows.astype(int).reshape(-1)
            outside = rows[(rows < 0) | (rows >= len(self.dataset))]
            if len(outside):
                last = len(self.dataset) - 1
                raise UserError(
                    f"{self.dataset.name}: {name} holds {outside[0]}; expected rows from 0 to {last}"
                )
            object.__setattr__(self, name, rows)
        if not len(self.train_rows):
            raise UserError(f"{self.dataset.name}: no rows to train on; expected 1 or more")
        for name in ("weights", "clusters"):
            if len(given := getattr(self, name)) not in (0, len(self.train_rows)):
                raise UserError(
                    f"{self.dataset.name}: {len(given)} {name} for {len(self.train_rows)} training rows; "
                    "expected one for each, or none"
                )
        for row, weight in zip(self.train_rows, self.weights, strict=False):
            if not 0 < weight < math.inf:
                raise UserError(
                    f"{self.dataset.name}: the weight of row {row} is {weight}; expected a positive number: a row that "
                    "must not count is left out of train_rows"
                )


@dataclasses.dataclass(frozen=True)
class RunTag:
    """Names of a run in the ledger and in the display.

    Attributes:
        strategy: Name of the strategy.
        stage: Stage of the ledger: "dapt" or "transfer".
        label: Text before the names of the phases in the ledger, such as "task/finetune/fold0/".
    """

    strategy: str = "run"
    stage: str = "dapt"
    label: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRun(Generic[ModelT]):
    """Phases of one model on one data set.

    >>> from dapt_jax import losses
    >>> from dapt_jax.data.sources import load
    >>> from dapt_jax.models.classifier import Classifier
    >>> from dapt_jax.models.registry import build
    >>> data = load({"kind": "phantoms", "name": "corpus", "n": 12}, data_dir=None, image_size=32)
    >>> phases = (Phase("head", 1, trainable=("head",), lr=1e-3), Phase("full", 1, trainable=("*",), lr=1e-4))
    >>> model, loss = Classifier(build("resnet18"), outputs=3), losses.make(classes=3)
    >>> run = TrainingRun(model, phases, TrainData(data, range(12)), loss, batch_size=4)
    >>> run.steps_per_epoch, run.timeline.steps
    (3, 6)

    Attributes:
        model: Network, its head included.
        phases: Phases of training in order, with unique names.
        data: Images and rows.
        loss: Loss of labels to minimise, or label-free objective.
        optimizer: Update rule of the trained parameters.
        augment: Augmentation of the images, in phases that augment.
        mix: Mixing of the images of a batch with one another, in phases that augment.
        plateau: Settings of the schedule `plateau`.
        caching: Caching options of frozen prefixes.
        batch_size: Images per step, over all devices.
        grad_accum_steps: Parts into which a batch is cut; their gradients are summed before the update.
        batch_norm_groups: Number of equal groups of examples with separate batch statistics in trained batch
            norm; 1 for statistics over all examples.
        seed: Seed of data order, augmentation and new weights.
        view_seed: Seed of the augmentation of fixed views instead; negative for `seed`.
        tag: Names of the run.
        teacher_weights: Function that returns parameters and batch-norm statistics of the teacher of a
            label-free objective; None where that is the network itself before training, or there is none.
    """

    model: ModelT
    phases: tuple[Phase, ...]
    data: TrainData
    loss: Loss | Objective
    _: dataclasses.KW_ONLY
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    augment: Augment = dataclasses.field(default_factory=Augment)
    mix: Mix = dataclasses.field(default_factory=Mix)
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    caching: Caching = dataclasses.field(default_factory=Caching)
    batch_size: int = 32
    grad_accum_steps: int = 1
    batch_norm_groups: int = 1
    seed: int = 0
    view_seed: int = -1
    tag: RunTag = dataclasses.field(default_factory=RunTag)
    teacher_weights: Callable[[], tuple[Tree, Tree]] | None = None

    def __post_init__(self) -> None:
        """Validate the run.

        Raises:
            UserError: There is no phase, two phases share a name, a phase trains nothing or names a part that
                the model lacks, a number of images is not positive or does not divide, a seed is not one of
                JAX's, the loss cannot be computed in parts of a batch, or the images cannot have the size that a
                phase names.
        """
        whole = self.dataset.images.size
        phases = (
            dataclasses.replace(each, image_size=0) if each.image_size == whole else each
            for each in self.phases
        )
        object.__setattr__(self, "phases", tuple(phases))
        if not self.phases:
            raise UserError("a training run without phases; expected 1 or more")
        check_names(self.phases)
        for name in ("batch_size", "grad_accum_steps", "batch_norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name, least in (("seed", 0), ("view_seed", -1)):
            if not least <= (seed := getattr(self, name)) <= LARGEST_SEED:
                raise UserError(f"{name} is {seed}; expected {least} to {LARGEST_SEED}")
        if self.grad_accum_steps > 1 and self.loss.compares_images:
            what = "objective" if isinstance(self.loss, Objective) else "loss"
            other = ", or batchwise=False" if isinstance(self.loss, SegmentationLoss) else ""
            raise UserError(
                f"{what} {self.loss.name!r} takes all images of a batch together, but grad_accum_steps="
                f"{self.grad_accum_steps} computes it in parts; expected grad_accum_steps=1{other}"
            )
        if any(program.augment.crop_from for program in self.programs):
            file_crops.check(self.dataset.images, bool(self.dataset.segments), self.dataset.name)
        self._check_batch_norm_groups()
        for program in self.programs:  # resolved against the model
            if program.phase.image_size:
                self._check_size(program)
            self._check_patches(program)
        if isinstance(self.loss, Objective):
            label_free.check(self.programs, self.dataset, self.train_rows, self.labels)

    def _check_batch_norm_groups(self) -> None:
        """Refuse groups of unequal numbers of examples, where batch norm computes statistics."""
        part, groups = self.batch_size // self.grad_accum_steps, self.batch_norm_groups
        if part % groups and any(program.mask.batch_norm for program in self.programs):
            fitting = max(number for number in range(1, groups) if part % number == 0)
            of_parts = f" in each of {self.grad_accum_steps} parts" if self.grad_accum_steps > 1 else ""
            raise UserError(
                f"batch_norm_groups is {groups}, which does not divide the {part} images of a batch{of_parts}; "
                f"{fitting} does"
            )

    def _check_size(self, program: PhaseProgram) -> None:
        """Refuse a phase whose images cannot have the size that it names."""
        phase, data = program.phase, self.dataset
        try:
            if data.segments:
                raise UserError(f"{data.name} has masks, whose size is that of the data set; expected 0")
            if program.augment.crop_from and program.augment.patch:
                raise UserError(
                    f"its random crops are cut from the files at augment.patch={program.augment.patch} pixels, "
                    "whatever the size of the images; expected 0, or augment.crop_from=0"
                )
            self.images_of(program)
            accounting.boundary_shapes(program.model, program.side(data.images.size))
        except UserError as error:
            raise UserError(f"phase {phase.name!r}: image_size is {phase.image_size}: {error}") from error

    def _check_patches(self, program: PhaseProgram) -> None:
        """Refuse patch dropout that leaves no patch."""
        encoder = program.model.encoder
        if not (share := encoder.options.patch_dropout):
            return
        side = program.side(self.dataset.images.size)
        patches = (side // encoder.token_patch) ** 2
        if patches and not visible_count(patches, share):
            raise UserError(
                f"model.patch_dropout is {share:g}, which leaves 0 of the {patches} patches of {side} x {side} "
                f"pixels in phase {program.phase.name!r}; expected at most {_rounded_down(1 - 1 / patches):g}"
            )

    def images_of(self, program: PhaseProgram) -> ImageStore:
        """Return the images that a phase trains on, of the size that it names."""
        size = program.phase.image_size
        return self.dataset.images.at_size(size) if size else self.dataset.images

    @property
    def dataset(self) -> Dataset:
        """Data set that holds all rows."""
        return self.data.dataset

    @property
    def train_rows(self) -> np.ndarray:
        """Rows that are trained on."""
        return self.data.train_rows

    @property
    def val_rows(self) -> np.ndarray:
        """Rows of the validation loss."""
        return self.data.val_rows

    @property
    def padded_val_rows(self) -> np.ndarray:
        """The validation rows, repeated up to a whole quarter of the data set.

        Seeds hold out a few patients more or fewer; with padded shapes they share compiled programs.
        """
        return np.resize(self.val_rows, _padded(len(self.val_rows), len(self.dataset)))

    @property
    def padded_steps(self) -> int:
        """Batches per epoch of training rows that are padded as the validation rows are."""
        return -(-_padded(len(self.train_rows), len(self.dataset)) // self.batch_size)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """What the loss compares outputs with besides a teacher's targets, by row of the data set.

        Targets of a loss of labels; int32 numbers of patients, look-alikes merged, for an objective that
        compares images; else zeros.
        """
        if not isinstance(self.loss, Objective):
            return self.dataset.targets
        if not self.loss.compares_images:
            return np.zeros(len(self.dataset), np.int32)
        groups = near_duplicates.merged(self.dataset).groups
        return np.unique(groups, return_inverse=True)[1].astype(np.int32)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - two epochs at once, in the threads that read ahead
    def partners(self, epoch: int) -> np.ndarray:
        """Return, by row of the data set, the row whose view is compared with it in an epoch, int32 [n].

        The row itself, or another image of the same patient where the objective asks for one.
        """
        partner = np.arange(len(self.dataset), dtype=np.int32)
        if not (isinstance(self.loss, Objective) and self.loss.pairs_patients):
            return partner
        rng = np.random.default_rng([self.seed, epoch, 1])
        groups = np.asarray(self.dataset.groups)[self.train_rows]
        for name in np.unique(groups):
            rows = self.train_rows[groups == name]
            if len(rows) > 1:
                order = rng.permutation(rows)
                partner[order] = np.roll(order, 1)
        return partner

    @functools.cached_property
    def order(self) -> Order:
        """The order in which the rows are seen."""
        rows = tuple(int(row) for row in self.data.train_rows)
        return Order(rows, self.batch_size, self.seed, self.data.weights, self.data.clusters)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last batch is filled up with rows of weight 0."""
        return self.order.steps_per_epoch

    @functools.cached_property
    def timeline(self) -> Timeline:
        """The phases along the steps."""
        return Timeline(self.phases, self.steps_per_epoch)

    @functools.cached_property
    def programs(self) -> tuple[PhaseProgram, ...]:
        """Program of each phase."""
        return steps.programs(
            self.model,
            self.phases,
            optimizer=self.optimizer,
            loss=self.loss,
            augment=self.augment,
            mix=self.mix,
            seed=self.seed,
            fixed_view_seed=self.view_seed,
            steps_per_epoch=self.steps_per_epoch,
            grad_accum_steps=self.grad_accum_steps,
            batch_norm_groups=self.batch_norm_groups,
            batch_size=self.batch_size,
        )

    @property
    def title(self) -> str:
        """The run's name on the screen."""
        label = self.tag.label.rstrip("/")
        return f"{self.tag.strategy} seed {self.seed}" + (f" {label}" if label else "")

    def row_key(self, number: int) -> tuple[str, int, str, str]:
        """Return the key of a phase's row in the ledger."""
        tag = self.tag
        return tag.strategy, self.seed, tag.stage, tag.label + self.phases[number].name

    def cache_decision(self, program: PhaseProgram) -> CacheDecision:
        """Return whether a phase trains on cached activations, and why."""
        return choose_cache(program, len(self.dataset), self.dataset.images.size, self.caching)

    def target_decision(self, program: PhaseProgram) -> CacheDecision:
        """Return whether a phase trains on a teacher's cached outputs, and why."""
        prefix = self.cache_decision(program)
        size = self.dataset.images.size
        return targets.choose_target_cache(program, len(self.dataset), size, self.caching, prefix)

    def check_cache(self) -> None:
        """Decide for every phase whether it trains on cached activations and targets.

        Raises:
            UserError: The settings require caching where it is impossible, or the network does not accept
                this image size.
        """
        for program in self.programs:
            self.target_decision(program)

    def flops_per_image(self, number: int) -> int:
        """Return model FLOPs of one image in one step of a phase; what is cached is left out."""
        program = self.programs[number]
        cost = accounting.image_cost(program, self.dataset.images.size)
        prefix = 0 if self.cache_decision(program).cached else cost.prefix.model
        return cost.suffix.model + prefix + self.online_target_cost(number).model

    def online_target_cost(self, number: int, is_cached: bool | None = None) -> Flops:
        """Return FLOPs of the teacher on one image in one step; none where its outputs are cached.

        Of `SelfDistillation`, whose teacher changes with every step, those above the boundary.

        Args:
            number: Index of the phase.
            is_cached: Whether the outputs are cached; None for what is planned.
        """
        program = self.programs[number]
        if program.self_distillation:
            return accounting.image_cost(program, self.dataset.images.size).targets
        if self.target_decision(program).cached if is_cached is None else is_cached:
            return Flops()
        return targets.forward_cost(program, self.dataset.images.size)

    def target_flops(self, number: int) -> int:
        """Return model FLOPs of a phase for targets, cached or not: part of `flops`."""
        online = self.online_target_cost(number).model * self.phases[number].epochs * len(self.train_rows)
        return online + self.target_fill_flops(number)

    def flops(self, epochs: int | None = None) -> int:
        """Return model FLOPs of the run, or of its first epochs."""
        total, left = 0, self.timeline.epochs if epochs is None else epochs
        for number, phase in enumerate(self.phases):
            done = min(left, phase.epochs)
            if not done:
                break
            total += self.flops_per_image(number) * len(self.train_rows) * done
            total += self.fill_flops(number) + self.target_fill_flops(number)
            left -= done
        return total

    def flops_until(self, step: int) -> float:
        """Return model FLOPs of the run's first steps without cache fills, for the display."""
        total = 0.0
        for number in range(len(self.phases)):
            first, end = self.timeline.first_step(number), self.timeline.first_step(number + 1)
            if step > first:
                total += self.flops_per_step(number) * (min(step, end) - first)
        return total

    def flops_per_step(self, number: int) -> float:
        """Return model FLOPs of one step of a phase, the mean over an epoch.

        A batch that rows do not fill counts what it holds: all steps together are what `flops` plans.
        """
        return self.flops_per_image(number) * len(self.train_rows) / self.steps_per_epoch

    def prefixes_to_compute(self, number: int) -> list[tuple[Prefix, Tier]]:
        """Return the frozen prefixes that a phase needs, lowest boundary first and its own last.

        Other phases train on the lower ones: if an earlier phase has cached them, the prefix of this phase is
        computed from there; if a later phase needs them, computing them on the way adds no cost. From rounded
        activations nothing is computed: what is cached at a boundary would depend on what was cached before.
        """
        first = self.programs[number]
        decision = self.cache_decision(first)
        if not decision.cached:
            return []
        own = Prefix.of(first, decision.views)
        chosen = {own.boundary: (own, decision)}
        for other_number, program in enumerate(self.programs):
            other = self.cache_decision(program)
            lower = Prefix.of(program, other.views)
            # Below the last group, an encoder with and without its pooling are the same computation.
            is_same = own == dataclasses.replace(lower, model=own.model, boundary=own.boundary)
            is_base = is_same and other.cached and lower.boundary < own.boundary and self._is_exact(lower)
            between = self.programs[min(number, other_number) : max(number, other_number)]
            is_unchanged = all(each.mask.boundary >= lower.boundary for each in between)
            fits = self._fit([*(each for _, each in chosen.values()), other])
            if is_base and is_unchanged and fits:
                chosen[lower.boundary] = lower, other
        return [(prefix, each.tier) for _, (prefix, each) in sorted(chosen.items())]

    def _is_exact(self, prefix: Prefix) -> bool:
        """Return whether activations are cached as they are computed."""
        return not prefix.is_rounded(self.dataset.images.size, self.caching.dtype)

    def _fit(self, decisions: Sequence[CacheDecision]) -> bool:
        """Return whether entries are within the budgets together."""
        budgets = {"memory": self.caching.memory_bytes, "disk": self.caching.disk_bytes}
        return all(
            sum(each.bytes for each in decisions if each.tier == tier) <= budget
            for tier, budget in budgets.items()
        )

    def targets_to_compute(self, number: int) -> tuple[Prefix, Tier] | None:
        """Return the computation of a phase's targets, and their tier; None where none are cached."""
        program = self.programs[number]
        teacher, decision = targets.teacher_of(program), self.target_decision(program)
        if teacher is None or not decision.cached:
            return None
        return targets.target_prefix(program, teacher), decision.tier

    def extends_prefix(self, number: int) -> bool:
        """Return whether a phase's targets are computed from its cached activations.

        They are where the teacher is the network itself, of which nothing has trained yet, and these are not
        rounded.
        """
        is_own = isinstance(self.loss, Objective) and self.loss.has_own_teacher
        if not is_own or number:
            return False
        first, decision = self.programs[0], self.cache_decision(self.programs[0])
        return decision.cached and self._is_exact(Prefix.of(first, decision.views))

    def target_fill_flops(self, number: int) -> int:
        """Return model FLOPs of the targets that a phase computes beyond those of earlier phases."""
        wanted = self.targets_to_compute(number)
        if wanted is None or wanted in [self.targets_to_compute(earlier) for earlier in range(number)]:
            return 0
        prefix, size = wanted[0], self.dataset.images.size
        each = prefix.flops(size)
        if self.extends_prefix(number):
            each -= dataclasses.replace(prefix, boundary=self.programs[number].mask.boundary).flops(size)
        return each * len(self.dataset) * prefix.views

    def fill_flops(self, number: int) -> int:
        """Return model FLOPs of the frozen prefixes that a phase computes beyond those of earlier phases."""
        cached: set[Prefix] = set()
        cost = 0
        for index in range(number + 1):
            cost = below = 0
            for prefix, _ in self.prefixes_to_compute(index):
                total = prefix.flops(self.dataset.images.size) * len(self.dataset) * prefix.views
                cost, below = cost + (0 if prefix in cached else total - below), total
                cached.add(prefix)
            # Training invalidates all activations above the boundary of the phase.
            cached = {prefix for prefix in cached if prefix.boundary <= self.programs[index].mask.boundary}
        return cost


def _rounded_down(share: float) -> float:
    """Return a share below 1 with four digits, rounded down.

    >>> _rounded_down(1 - 1 / 196)
    0.9948
    """
    return math.floor(share * 1e4) / 1e4


def _padded(rows: int, total: int) -> int:
    """Return a number of rows, rounded up to a whole quarter of `total`."""
    quarter = -(-total // 4)
    return min(-(-rows // quarter) * quarter, max(rows, total))
