"""A study as an object: its settings, strategies, images, and arms, each a strategy with a seed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest, redact
from dapt_jax.models.classifier import Classifier
from dapt_jax.settings import StudySettings
from dapt_jax.study.runs import adaptation_run
from dapt_jax.study.scorer import Plan
from dapt_jax.study.strategies import Strategy
from dapt_jax.study.tasks import ArmKey, Task
from dapt_jax.training.run import TrainingRun
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import locate


@dataclasses.dataclass(frozen=True)
class Arm:
    """A strategy with a seed, or one of its checkpoints.

    Attributes:
        strategy: The strategy.
        seed: The seed.
        epochs: Epochs of adaptation after which a scored checkpoint ends; 0 for the arm itself.
    """

    strategy: Strategy
    seed: int
    epochs: int = 0

    @property
    def name(self) -> str:
        """Name in results and in the ledger: the strategy's, and `STRATEGY@EPOCHS` of a checkpoint."""
        return f"{self.strategy.name}@{self.epochs}" if self.epochs else self.strategy.name

    @property
    def title(self) -> str:
        """Name for people."""
        return f"{self.name} seed {self.seed}"

    @property
    def key(self) -> ArmKey:
        """First keys of its lines in `results.jsonl`."""
        weights = self.strategy.weights
        init = weights if weights in (locate.IMAGENET, locate.RANDOM) else Path(redact(weights)).name
        return ArmKey(self.name, self.seed, init, self.strategy.encoder.name)

    def folder(self, workdir: Path) -> Path:
        """Return the folder of its checkpoints."""
        folder = workdir / "checkpoints" / f"{self.strategy.name}-seed{self.seed}"
        return folder / self.name if self.epochs else folder


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that a study needs, read and checked before anything is trained: see `prepare.prepare`.

    Attributes:
        settings: Its settings.
        strategies: Its strategies, resolved against the model.
        corpora: In-domain images by name in `corpora`; the study's own corpus has the empty name.
        tasks: Target tasks.
        weights: Report of loaded, newly initialised and unused parameters, and every parameter.
        marks: By task and split, the leaking images or patients that the user allows: see `leakage`.
    """

    settings: StudySettings
    strategies: tuple[Strategy, ...] = ()
    corpora: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)
    tasks: tuple[Task, ...] = ()
    weights: str = ""
    marks: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    _runs: dict[tuple[str, int], TrainingRun[Classifier]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, seed by seed."""
        return tuple(arm for seed in self.settings.seeds for arm in self.arms_of(seed))

    def arms_of(self, seed: int) -> tuple[Arm, ...]:
        """Return the arms of one seed."""
        return tuple(Arm(strategy, seed) for strategy in self.strategies)

    def corpus_of(self, arm: Arm) -> Dataset | None:
        """Return the images that an arm is adapted to; None where it is not adapted."""
        return self.corpora.get(arm.strategy.corpus) if arm.strategy.phases else None

    def run_of(self, arm: Arm) -> TrainingRun[Classifier]:
        """Return the run that adapts an arm's encoder; the same object each time.

        Raises:
            UserError: The arm is not adapted, or its corpus does not exist.
        """
        key = arm.strategy.name, arm.seed
        if key not in self._runs:
            corpus = self.corpus_of(arm)
            if corpus is None:
                raise UserError(f"strategy {arm.strategy.name!r} is not adapted, so it has no training run")
            self._runs[key] = adaptation_run(self.settings, arm.strategy, arm.seed, corpus)
        return self._runs[key]

    @property
    def scores(self) -> Settings | None:
        """Plan of checkpoint scoring along adaptation; None where nothing is scored."""
        return self.settings.scores

    @property
    def scored_images(self) -> Dataset | None:
        """The development images that are scored along adaptation; None where nothing is scored.

        Raises:
            UserError: `checkpoint_scoring.task` is not one of the tasks.
        """
        if self.scores is None:
            return None
        by_name = {task.name: task.development for task in self.tasks}
        name = self.scores.task or self.tasks[0].name
        if name not in by_name:
            raise UserError(
                f"checkpoint_scoring.task {name!r} is not one of the tasks; {nearest(name, by_name)}"
            )
        return by_name[name]

    def scoring_plan(self, arm: Arm) -> Plan | None:
        """Return the scoring plan of an arm; None where it is not scored.

        Raises:
            UserError: The budget of the scores does not suffice, or the encoder lacks the level.
        """
        images = self.scored_images
        if self.scores is None or images is None or self.corpus_of(arm) is None:
            return None
        return Plan.of(self.scores, self.run_of(arm), len(images))

    def intensities(self) -> dict[str, list[dict[str, Any]]]:
        """Return how the images of each set got their range, by the name of the set."""
        sets: dict[str, Dataset] = {name or "corpus": corpus for name, corpus in self.corpora.items()}
        sets |= {f"{task.name} {split}": data for task in self.tasks for split, data in task.datasets.items()}
        return {name: data.intensity_summary() for name, data in sets.items()}

    def fingerprints(self) -> dict[str, str]:
        """Return what identifies the images of the study."""
        found = {
            f"{task.name}/{split}": data.fingerprint()
            for task in self.tasks
            for split, data in task.datasets.items()
        }
        return found | {name or "corpus": corpus.fingerprint() for name, corpus in self.corpora.items()}
