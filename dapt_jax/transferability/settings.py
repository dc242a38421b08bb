"""What a study scores along adaptation, from its config."""

import dataclasses
from typing import Any

from dapt_jax.errors import UserError, nearest
from dapt_jax.transferability import registry
from dapt_jax.transferability.robustness import DISTANCES
from dapt_jax.transferability.select import CheckpointRule


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is scored, and how: `config.score` and `config.select`.

    Attributes:
        every: epochs between scores.
        names: scores of `registry.SCORES`.
        images: of the sample, at most.
        budget: share of the training run's FLOPs that scoring may take; the sample shrinks to fit.
        views: of each image, for scores of views.
        level: whose features the scores of views and of masks see: 1 the encoder's last, 2 the deepest skip (the last
            before the final reduction), and so on.
        pooled: whether scores of views compare spatial means.
        distance: of the robustness score.
        margin: of its hinge.
        negatives: per image.
        select: the score that chooses; empty to keep the last checkpoint.
        rule: how it chooses.
        keep: whether the weights of every scored epoch are kept.
    """

    every: int
    names: tuple[str, ...]
    images: int
    budget: float
    views: int
    level: int
    pooled: bool
    distance: str
    margin: float
    negatives: int
    select: str
    rule: CheckpointRule
    keep: bool

    @classmethod
    def of(cls, config: Any) -> "Settings | None":
        """The settings of a study, or None where it scores nothing.

        Raises:
            UserError: an unknown score, distance or rule.
        """
        score, select = config.score, str(config.select)
        if not (score.every or select):
            return None
        names = tuple(dict.fromkeys([*score.names, *([select] if select else [])]))
        for name in names:
            registry.entry(name)
        if score.distance not in DISTANCES:
            raise UserError(f"unknown score.distance {score.distance!r}; {nearest(score.distance, DISTANCES)}")
        rule = CheckpointRule(score.rule, score.patience, score.window, score.weight)
        if score.negatives >= score.images:
            raise UserError(
                f"score.negatives is {score.negatives} of a sample of {score.images} images; expected fewer than images"
            )
        return cls(
            every=max(score.every, 1), names=names, images=score.images, budget=score.budget, views=score.views,
            level=score.level, pooled=score.pooled, distance=score.distance, margin=score.margin,
            negatives=score.negatives, select=select, rule=rule, keep=score.downstream,
        )  # fmt: skip

    @property
    def _needs(self) -> set[str]:
        return {registry.entry(name).needs for name in self.names}

    @property
    def jittered(self) -> int:
        """Passes over jittered views."""
        return self.views if "views" in self._needs else 0

    @property
    def plain(self) -> int:
        """Passes over the images as they are: 0 or 1."""
        return int(bool(self._needs - {"views"}))

    @property
    def dense(self) -> bool:
        """Whether feature maps are needed."""
        return "masks" in self._needs
