"""Transferability scores of a fixed target sample along a run, for checkpoint selection.

The scorer is a callback of the training loop: after every few epochs in which the encoder has changed it
computes the scores, enters them into the ledger as a stage of their own, saves the weights, and decides
whether training stops.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError
from dapt_jax.losses import ClassificationLoss
from dapt_jax.models.classifier import HEAD, Classifier, pool
from dapt_jax.models.encoder import TAP, Encoder, Tree
from dapt_jax.objectives.network import Pretext
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes
from dapt_jax.training import accounting
from dapt_jax.training.callbacks import Callback
from dapt_jax.training.context import RunContext
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram
from dapt_jax.transferability import registry
from dapt_jax.transferability.inputs import masks_at
from dapt_jax.transferability.robustness import jitter
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import export, locate

BATCH = 32
SEED = 0
"""Of the sample and of the views: the same for all arms and seeds, so that their scores compare."""


def level_group(encoder: Encoder, level: int, setting: str = "checkpoint_scoring.level") -> int:
    """Return the index of the group with the `level`-th feature map from the end, one per resolution.

    Raises:
        UserError: The encoder lacks the level.
    """
    if not 0 < level <= len(encoder.pyramid_levels):
        raise UserError(f"{setting} is {level}; {encoder.name} has 1 to {len(encoder.pyramid_levels)}")
    return encoder.index(encoder.pyramid_levels[-level].name.removesuffix(f"/{TAP}"))


@functools.cache
def _prefix(model: Classifier, start: int) -> Callable[..., Any]:
    return jax.jit(lambda params, batch_stats, images: model.prefix(params, batch_stats, images, start))


@functools.cache
def _rest(model: Classifier, start: int, level: int) -> Callable[..., Any]:
    """Return the function from activations at a boundary to the map at a level and the pooled features."""

    def rest(params: Tree, batch_stats: Tree, x: PyTree[Array]) -> PyTree[Array]:
        at_level, _ = model.encoder.apply(params, batch_stats, x, start=start, stop=level + 1)
        last, _ = model.encoder.apply(params, batch_stats, at_level, start=level + 1)
        return model.encoder.as_map(at_level), pool(last)

    return jax.jit(rest)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Planned epochs and cost of scoring a run.

    Attributes:
        epochs: Epochs of the run after which scores are computed, and the share of the encoder's training
            that is done by then.
        images: Images of the sample.
        first: FLOPs of the frozen prefix on the sample, by phase: paid once.
        each: FLOPs of one scoring pass, by phase.
    """

    epochs: dict[int, float]
    images: int
    first: tuple[int, ...]
    each: tuple[int, ...]

    @classmethod
    def of(cls, settings: Settings, run: TrainingRun, available: int, kept: Collection[int] = ()) -> "Plan":
        """Plan the scores of a run with the largest sample that settings, images and budget allow.

        Args:
            settings: What is scored.
            run: The run.
            available: Number of images of the target task.
            kept: Numbers of epochs that are scored besides, since their encoders are kept.

        Raises:
            UserError: The budget does not suffice for the smallest sample, or the score that chooses sees
                nothing that the run trains.
        """
        timeline, encoder = run.timeline, run.programs[0].model.encoder
        level = level_group(encoder, settings.level)
        moving = [
            epoch
            for number, program in enumerate(run.programs)
            if changes_encoder(program)
            for epoch in range(timeline.first_epoch(number), timeline.first_epoch(number + 1))
        ]
        due = {
            epoch: (place + 1) / len(moving)
            for place, epoch in enumerate(moving)
            if (place + 1) % settings.every == 0 or place + 1 == len(moving) or epoch + 1 in kept
        }
        phase_of = {epoch: timeline.position(epoch * timeline.steps_per_epoch).phase for epoch in due}
        _refuse_blind_choice(settings, run, [run.programs[phase] for phase in phase_of.values()], level)
        size, passes = run.dataset.images.size, settings.jittered + settings.plain
        whole = accounting.forward(run.programs[0].model, size, len(encoder.groups)).model
        first, each = [], []
        for program in run.programs:
            before = accounting.forward(program.model, size, _start(program, level)).model
            first.append(passes * before)
            each.append(passes * (whole - before))
        per_image = sum(each[phase] for phase in phase_of.values()) + sum(
            first[p] for p in set(phase_of.values())
        )
        affordable = int(settings.budget * run.flops() / per_image) if per_image else settings.images
        images = min(settings.images, available, affordable)
        least = max(2, settings.negatives + 1)
        if due and images < least:
            if available < least:
                raise UserError(f"{available} target images to score; expected {least} or more")
            raise UserError(
                f"{run.title}: checkpoint_scoring.budget of {settings.budget:g} pays for {affordable} images "
                "at "
                f"{len(due)} epochs; "
                f"expected {least} or more: raise checkpoint_scoring.every or the budget"
            )
        return cls(due, images, tuple(images * f for f in first), tuple(images * f for f in each))

    def until(self, run: TrainingRun, epochs: int) -> int:
        """Return FLOPs of the scores within a number of epochs of the run."""
        phases = [
            run.timeline.position(epoch * run.timeline.steps_per_epoch).phase
            for epoch in self.epochs
            if epoch < epochs
        ]
        return sum(self.each[phase] for phase in phases) + sum(self.first[phase] for phase in set(phases))


def changes_encoder(program: PhaseProgram) -> bool:
    """Return whether a phase changes the encoder: it trains more than the head, or updates statistics."""
    return bool(program.mask.batch_norm_modes) or any(
        not path.startswith(f"{HEAD}/") for path in program.mask.trainable
    )


def _refuse_blind_choice(
    settings: Settings, run: TrainingRun, scored: Sequence[PhaseProgram], level: int
) -> None:
    """Refuse to choose a checkpoint by features that no scored phase changes: all would be equal."""
    if not settings.select or registry.entry(settings.select).needs not in ("views", "masks"):
        return
    boundaries = [program.mask.boundary for program in scored]
    if boundaries and min(boundaries) > level:
        groups = run.model.encoder.groups
        raise UserError(
            f"{run.title}: {settings.select} sees the output of {groups[level]!r} "
            f"(checkpoint_scoring.level={settings.level}), and nothing up to there is trained, so that it is the "
            f"same after every epoch; expected a smaller level, a strategy that trains from {groups[level]!r} or "
            f"below, or a score of other features"
        )


def _start(program: PhaseProgram, level: int) -> int:
    """Return the boundary at which the sample's activations are cached through a phase."""
    return min(program.mask.boundary, level + 1, len(program.model.encoder.groups) - 1)


class Scorer(Callback):
    """The scores of one run: see the module."""

    def __init__(
        self,
        settings: Settings,
        run: TrainingRun[Classifier],
        target: Dataset,
        folder: Path,
        context: RunContext,
        until: int = 0,
        kept: Collection[int] = (),
    ):
        """Draw the sample.

        Args:
            settings: What is scored.
            run: The run.
            target: Development images of the target task.
            folder: Folder for the weights of scored epochs.
            context: Ledger and hardware.
            until: Epochs of the run after which it pauses; 0 for none.
            kept: Numbers of epochs that are scored besides.

        Raises:
            UserError: The budget does not suffice (see `Plan.of`), or an image lacks a mask that a score
                needs.
        """
        self.settings, self.run, self.folder, self.context, self.until = settings, run, folder, context, until
        self.plan = Plan.of(settings, run, len(target), kept)
        rows = np.sort(np.random.default_rng(SEED).permutation(len(target))[: self.plan.images])
        self.sample = target.take(rows)
        self._masks = self.sample.load_masks() if settings.dense and target.masks is not None else None
        self.model, self.level = run.model, level_group(run.model.encoder, settings.level)
        self.points: list[dict[str, Any]] = []
        self.filled: list[int] = []
        self.flops = 0
        self.stopped = False
        self.done = 0
        self._activations_of: tuple[int, list[Any]] | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as plain JSON values."""
        return {
            "points": list(self.points),
            "filled": list(self.filled),
            "flops": self.flops,
            "stopped": self.stopped,
            "done": self.done,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Restore the result of `state`, and return whether the run has stopped there."""
        for name, value in state.items():
            setattr(self, name, value)
        return self._is_ended()

    def _is_ended(self) -> bool:
        """Return whether the run stops here, finally or temporarily."""
        return self.stopped or (bool(self.until) and self.done >= self.until)

    def after_epoch(
        self, phase: int, epoch: int, params: Tree, batch_stats: Tree, metrics: Mapping[str, float]
    ) -> bool:
        """Score the network when due, and return whether the run stops: see `Callback`."""
        del metrics  # the scores of the sample are what counts here
        if epoch in self.plan.epochs:
            self._score(phase, epoch, params, batch_stats)
            self.context.ledger.put(self.row())
        self.done = epoch + 1
        return self._is_ended()

    def _score(self, number: int, epoch: int, params: Tree, batch_stats: Tree) -> None:
        material = self.material(number, params, batch_stats)
        found = processes.broadcast_from_primary(
            lambda: registry.evaluate(self.settings.names, material, robustness=self._robustness_settings())
        )
        self.flops += self.plan.each[number]
        values = {
            name: outcome.value if math.isfinite(outcome.value) else None for name, outcome in found.items()
        }
        reasons = {name: outcome.reason for name, outcome in found.items() if outcome.reason}
        entries = {name: registry.entry(name) for name in values}
        point: dict[str, Any] = {
            "epoch": epoch,
            "share": self.plan.epochs[epoch],
            "scores": values,
            # So that a report needs no code of the scores.
            "higher_is_better": {name: each.higher_is_better for name, each in entries.items()},
            "reads_labels": {name: each.reads_labels for name, each in entries.items()},
        }
        self.points.append({**point, **({"reasons": reasons} if reasons else {})})
        if self.settings.select or self.settings.keep:
            plain = self.model.encoder.merged(jax.device_get(params))
            export.write(self.file(epoch), plain, jax.device_get(batch_stats))
        if self.settings.select:
            index, self.stopped = self._choice()
            for place, each in enumerate(self.points):
                each["chosen"] = place == index

    def _robustness_settings(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in ("distance", "margin", "negatives", "pooled")}

    def _choice(self) -> tuple[int, bool]:
        name = self.settings.select
        values = [point["scores"][name] for point in self.points]
        return self.settings.rule.choose(
            [math.nan if value is None else value for value in values],
            [point["share"] for point in self.points],
            registry.entry(name).higher_is_better,
        )

    def material(self, number: int, params: Tree, batch_stats: Tree) -> registry.Sample:
        """Return the inputs of the scores on the sample, from the current network."""
        program, settings = self.run.programs[number], self.settings
        passes = [
            self._encode(program, x, params, batch_stats)
            for x in self._activations(number, params, batch_stats)
        ]
        jittered, plain = passes[: settings.jittered], passes[settings.jittered :]
        at_level, last = plain[0] if plain else jittered[0]
        labels = None if self.sample.multi_label else self.sample.labels
        maps = masks = source = None
        if self._masks is not None:
            maps, masks = (at_level,), (masks_at(self._masks, at_level.shape[1]),)
        objective = program.objective
        if HEAD in params and isinstance(objective, ClassificationLoss) and not objective.multi_label:
            head = params[HEAD]
            source = np.asarray(objective.probabilities(jnp.asarray(last @ head["kernel"] + head["bias"])))
        views = np.stack([level for level, _ in jittered]) if jittered else None
        return registry.Sample(last, labels, views, source, maps, masks)

    def _activations(self, number: int, params: Tree, batch_stats: Tree) -> list[np.ndarray]:
        """Return activations of the sample's views, then of its images, at the phase's frozen boundary."""
        if self._activations_of is not None and self._activations_of[0] == number:
            return self._activations_of[1]
        program = self.run.programs[number]
        forward = _prefix(program.model, _start(program, self.level))
        rows = np.arange(len(self.sample), dtype=np.int32)
        images = self.sample.images.batch(rows)
        seen = [np.asarray(jitter(images, SEED, view, rows)) for view in range(self.settings.jittered)]
        seen += [images] * self.settings.plain
        computed = [np.concatenate(list(_in_batches(forward, params, batch_stats, view))) for view in seen]
        if number not in self.filled:  # after a restart the prefix is computed again, and not charged again
            self.filled.append(number)
            self.flops += self.plan.first[number]
        self._activations_of = number, computed
        return computed

    def _encode(
        self, program: PhaseProgram, x: np.ndarray, params: Tree, batch_stats: Tree
    ) -> tuple[np.ndarray, np.ndarray]:
        forward = _rest(program.model, _start(program, self.level), self.level)
        parts = list(_in_batches(forward, params, batch_stats, x))
        at_level, last = (np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True))
        return at_level, last

    def file(self, epoch: int) -> Path:
        """Return the file of a scored epoch's weights."""
        return self.folder / f"epoch{epoch + 1:04d}.safetensors"

    def chosen_epochs(self, done: int) -> int:
        """Return the number of epochs of the weights that `chosen` returns, of a run with `done` epochs."""
        return self.points[self._choice()[0]]["epoch"] + 1 if self.settings.select and self.points else done

    def chosen(self, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
        """Return the weights that the rule chooses; the given ones if it is the last, or without scores.

        A line says so where the score that chooses was undefined at every epoch, so that it chose nothing.
        """
        if not self.settings.select or not self.points:
            return params, batch_stats
        if all(point["scores"][self.settings.select] is None for point in self.points):
            self.context.reporter.say(
                f"warning: {self.run.title}: checkpoint_selection.score={self.settings.select} is undefined at every "
                f"scored epoch ({self.points[-1]['reasons'][self.settings.select]}); the last checkpoint is kept"
            )
        point = self.points[self._choice()[0]]
        if point is self.points[-1]:
            return params, batch_stats
        processes.sync_file(self.file(point["epoch"]))
        model = Classifier(self.model.base.encoder, 1) if isinstance(self.model, Pretext) else self.model.base
        chosen, chosen_stats, _ = locate.load(str(self.file(point["epoch"])), model, seed=0)
        return chosen, chosen_stats

    def row(self) -> Row:
        """Return the row of the ledger: FLOPs of the encoder's passes, and the scores as its curve."""
        passes = self.settings.jittered + self.settings.plain
        return Row(
            strategy=self.run.tag.strategy, seed=self.run.seed, stage="score", phase="scores",
            images=self.plan.images * passes * len(self.points), model_flops=self.flops,
            hardware_flops=self.flops, device=self.context.hardware.kind,
            devices=self.context.hardware.count, curve=list(self.points),
        )  # fmt: skip


def _in_batches(forward: Callable[..., Any], params: Tree, batch_stats: Tree, x: np.ndarray) -> Sequence[Any]:
    """Return a jitted function's results for all rows, in batches of one shape."""
    found = []
    for start in range(0, len(x), BATCH):
        part = x[start : start + BATCH]
        filled = np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), axis=0)])
        out = jax.device_get(forward(params, batch_stats, filled))
        found.append(tuple(leaf[: len(part)] for leaf in out) if isinstance(out, tuple) else out[: len(part)])
    return found
