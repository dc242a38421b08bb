"""Settings of checkpoint scoring along adaptation, and of checkpoint selection."""

import dataclasses

from dapt_jax.errors import UserError
from dapt_jax.fields import check_fields, setting
from dapt_jax.transferability import registry
from dapt_jax.transferability.robustness import DISTANCES
from dapt_jax.transferability.select import RULES, CheckpointRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """Scores of target images along adaptation: the section `checkpoint_scoring`."""

    every: int = setting(
        0, at_least=0, doc="Epochs between scores; 0: none, or each epoch if one selects a checkpoint."
    )
    names: tuple[str, ...] = setting(("robustness",), doc="Scores of dapt_jax/transferability/registry.py.")
    task: str = setting("", doc="Task whose development images are scored; empty: the first.")
    images: int = setting(256, at_least=2, doc="Largest number of images in the sample.")
    budget: float = setting(
        0.02, above=0, below=1, doc="Share of the training FLOPs for scoring: the sample shrinks to fit."
    )
    views: int = setting(2, at_least=2, doc="Jittered views of an image, for scores of views.")
    level: int = setting(
        2,
        at_least=1,
        doc="Features that scores of views and masks see: 1 the encoder's last, 2 the deepest skip, ...",
    )
    pooled: bool = setting(True, doc="Whether scores of views compare spatial means.")
    distance: str = setting("cosine", choices=tuple(DISTANCES), doc="Distance of the robustness score.")
    margin: float = setting(0.5, at_least=0, doc="Margin of the robustness score's hinge.")
    negatives: int = setting(
        1, at_least=0, doc="Negatives per image of the robustness score; 0: all other images."
    )
    downstream: bool = setting(
        False, doc="Measure each scored checkpoint on the target tasks, as an arm of its own."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.names:
            registry.entry(name)
        if self.negatives >= self.images:
            raise UserError(
                f"checkpoint_scoring.negatives is {self.negatives} of a sample of {self.images} images; "
                "expected fewer than images"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """Choice of the checkpoint for the target tasks: the section `checkpoint_selection`."""

    score: str = setting(
        "", doc="Score by which adaptation stops and the checkpoint is chosen; empty: the last one."
    )
    rule: str = setting("length_prior", choices=RULES, doc="Rule by which the score chooses.")
    patience: int = setting(3, at_least=1, doc="Scores without improvement before the rule patience stops.")
    length_weight: float = setting(
        1.0,
        at_least=0,
        doc="Standard deviations of the score that the whole length is worth, for length_prior.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.score:
            registry.entry(self.score)

    def checkpoint_rule(self) -> CheckpointRule:
        """Return the rule as an object."""
        return CheckpointRule(self.rule, self.patience, weight=self.length_weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(ScoringSettings):
    """Plan of checkpoint scoring, from both sections.

    `names` holds every score that is computed, that which selects among them; `every` is 1 or more.
    """

    selection: SelectionSettings = SelectionSettings()

    @classmethod
    def of(cls, scoring: ScoringSettings, selection: SelectionSettings) -> "Settings | None":
        """Return the settings of a study, or None where it scores nothing."""
        if not (scoring.every or selection.score):
            return None
        chosen = [selection.score] if selection.score else []
        names = tuple(dict.fromkeys([*scoring.names, *chosen]))
        own = {**vars(scoring), "names": names, "every": max(scoring.every, 1)}
        return cls(**own, selection=selection)

    @property
    def select(self) -> str:
        """Score for selection; empty for the last checkpoint."""
        return self.selection.score

    @property
    def selects_by_labels(self) -> bool:
        """Whether the score for selection reads labels or masks of the images that it scores."""
        return bool(self.select) and registry.entry(self.select).reads_labels

    @property
    def rule(self) -> CheckpointRule:
        """Rule of selection."""
        return self.selection.checkpoint_rule()

    @property
    def keep(self) -> bool:
        """Whether the weights of every scored epoch are saved."""
        return self.downstream

    @property
    def _needs(self) -> set[str]:
        return {registry.entry(name).needs for name in self.names}

    @property
    def jittered(self) -> int:
        """Number of passes over jittered views."""
        return self.views if "views" in self._needs else 0

    @property
    def plain(self) -> int:
        """Number of passes over the images as they are: 0 or 1."""
        return int(bool(self._needs - {"views"}))

    @property
    def dense(self) -> bool:
        """Whether feature maps are needed."""
        return "masks" in self._needs
