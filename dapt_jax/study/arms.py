"""A study as an object: its settings, strategies, images, and arms, each a strategy with a seed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapt_jax.data.dataset import Dataset
from dapt_jax.errors import UserError, nearest, redact
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.encoder import Tree
from dapt_jax.objectives import LABEL_FREE
from dapt_jax.settings import StudySettings
from dapt_jax.study import few_samples
from dapt_jax.study.cut_short import cut
from dapt_jax.study.runs import adaptation_run
from dapt_jax.study.scorer import Plan
from dapt_jax.study.strategies import Strategy, resolve
from dapt_jax.study.tasks import ArmKey, Task
from dapt_jax.training.run import TrainingRun
from dapt_jax.transferability.settings import Settings
from dapt_jax.weights import locate
from dapt_jax.weights.merge import MergeReport


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
        folder = workdir / "checkpoints" / f"{self.strategy.name}-seed{self.seed}" / self.strategy.part
        return folder / self.name if self.epochs else folder

    @property
    def before(self) -> "Arm | None":
        """The arm of the earlier phases on other corpora; None without any."""
        return dataclasses.replace(self, strategy=self.strategy.before) if self.strategy.before else None


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
        sources: Load reports of the source weights: the study's under the empty name, and those of each
            strategy that has its own.
    """

    settings: StudySettings
    strategies: tuple[Strategy, ...] = ()
    corpora: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)
    tasks: tuple[Task, ...] = ()
    weights: str = ""
    marks: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, MergeReport] = dataclasses.field(default_factory=dict)
    _runs: dict[tuple[str, str, int], TrainingRun[Classifier]] = dataclasses.field(
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

        Of a strategy with phases on several corpora it is the last one; see `runs_of`.

        Raises:
            UserError: The arm is not adapted, or its corpus does not exist.
        """
        arm = self.adapting(arm)
        key = arm.strategy.name, arm.strategy.part, arm.seed
        if key not in self._runs:
            corpus = self.corpus_of(arm)
            if corpus is None:
                raise UserError(f"strategy {arm.strategy.name!r} is not adapted, so it has no training run")
            run = adaptation_run(self.settings, arm.strategy, arm.seed, corpus)
            if share := arm.strategy.compute_budget:
                where = f"custom_strategies.{arm.name}.compute_budget {share:g}"
                run = cut(run, int(share * self.full_flops(arm.seed, where)), where)
            self._runs[key] = run
        return self._runs[key]

    def full_flops(self, seed: int, where: str = "compute_budget") -> int:
        """Return the model FLOPs of full DAPT on the study's corpus, whether or not it is an arm.

        Args:
            seed: Seed of the arm.
            where: Name of the setting that asks, for the error line.

        Raises:
            UserError: The study has no corpus, or full DAPT would learn from labels that no strategy reads.
        """
        if "" not in self.corpora:
            raise UserError(f"{where} is a share of full DAPT's FLOPs; expected config.corpus, or none of it")
        if not self.has_full_flops(seed):
            raise UserError(
                f"{where} is a share of full DAPT's FLOPs, which would learn from labels (adapt.objective), but no "
                f"strategy reads labels of config.corpus: expected adapt.objective of {', '.join(LABEL_FREE)}, or, of a "
                "labelled corpus, strategy 'full'"
            )
        return self.run_of(self._full(seed)).flops()

    def budget_flops(self, seed: int) -> int:
        """Return the model FLOPs that strategies share under the study's `compute_budget`."""
        return int(self.settings.compute_budget * self.full_flops(seed))

    def has_full_flops(self, seed: int) -> bool:
        """Return whether full DAPT on the study's corpus could run: it has a corpus, and labels where it needs them."""
        if (corpus := self.corpora.get("")) is None:
            return False
        return self._full(seed).strategy.is_label_free or corpus.is_labelled

    def _full(self, seed: int) -> Arm:
        return Arm(resolve("full", self.settings.model.encoder(), self.settings), seed)

    def load_weights(self, arm: Arm, classifier: Classifier) -> tuple[Tree, Tree, MergeReport]:
        """Return an arm's source weights for a classifier, and their report: see `locate.load`.

        Raises:
            UserError: The file has been replaced since the study was started.
        """
        strategy = arm.strategy
        params, batch_stats, report = locate.load(strategy.weights, classifier, seed=arm.seed)
        at_start = self.sources.get(strategy.name, self.sources.get(""))
        if at_start and report.source_sha256 != at_start.source_sha256:
            raise UserError(
                f"{arm.title}: {redact(strategy.weights)} was replaced while the study ran (sha256 "
                f"{at_start.source_sha256[:16]} at its start, {report.source_sha256[:16]} now); expected the "
                "file as it was, or another --workdir"
            )
        return params, batch_stats, report

    def adapting(self, arm: Arm) -> Arm:
        """Return the arm whose adaptation an arm uses: its own, or that of the shared `adapt.seed`."""
        return dataclasses.replace(arm, seed=self.settings.adapt.seed) if self._is_shared(arm) else arm

    def _is_shared(self, arm: Arm) -> bool:
        return bool(arm.strategy.phases) and self.settings.adapt.has_own_seed

    def runs_of(self, arm: Arm) -> tuple[TrainingRun[Classifier], ...]:
        """Return the runs that adapt an arm's encoder, one per part; empty where it is not adapted."""
        if self.corpus_of(arm) is None:
            return ()
        parts = (dataclasses.replace(arm, strategy=part) for part in arm.strategy.parts)
        return tuple(self.run_of(part) for part in parts)

    def kept_epochs(self, arm: Arm) -> frozenset[int]:
        """Return the numbers of epochs of an arm's last run after which its encoder is kept.

        Raises:
            UserError: The run is shorter than one of `adapt.checkpoints`.
        """
        epochs = self.run_of(arm).timeline.epochs
        kept = self.settings.adapt.kept_epochs(epochs)
        if kept and max(kept) > epochs:
            raise UserError(
                f"adapt.checkpoints holds {max(kept)}; strategy {arm.strategy.name!r} has {epochs} epochs, "
                f"expected 1 to {epochs}"
            )
        return kept

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
        if not by_name:
            raise UserError(
                "checkpoint_scoring and checkpoint_selection need images of a target task; expected "
                "tasks.NAME.development, or neither: --config.mode=score scores kept epochs afterwards"
            )
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
        return Plan.of(self.scores, self.run_of(arm), len(images), self.kept_epochs(arm))

    def intensities(self) -> dict[str, list[dict[str, Any]]]:
        """Return how the images of each set got their range, by the name of the set."""
        sets: dict[str, Dataset] = {name or "corpus": corpus for name, corpus in self.corpora.items()}
        sets |= {f"{task.name} {split}": data for task in self.tasks for split, data in task.parts.items()}
        return {name: data.intensity_summary() for name, data in sets.items()}

    def few_samples(self) -> dict[str, list[str]]:
        """Return by task what rests on few patients or folds, in lines."""
        found = {}
        for task in self.tasks:
            number = self.settings.transfer_of(task.name).folds
            folds = [task.folds(number, seed) for seed in self.settings.seeds]
            found[task.name] = few_samples.of_task(task.datasets, folds)
        return found

    def fingerprints(self) -> dict[str, str]:
        """Return what identified the images of a study in the `config.json` of earlier versions."""
        found = {
            f"{task.name}/{split}": data.fingerprint()
            for task in self.tasks
            for split, data in task.datasets.items()
        }
        return found | {name or "corpus": corpus.fingerprint() for name, corpus in self.corpora.items()}
