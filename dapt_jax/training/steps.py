"""The jitted steps of one phase: gradients for what trains, and nothing computed for what is frozen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, Shaped

from dapt_jax.data.augment import Augment
from dapt_jax.models.classifier import Classifier
from dapt_jax.objectives import Objective
from dapt_jax.training import freezing, optim
from dapt_jax.training.freezing import Mask, Tree
from dapt_jax.training.phases import Phase

State = dict[str, Any]
"""`params`, `stats`, `opt`, `ema` (trained leaves, or empty), `step`, and `loss`/`weight` summed over the epoch so far."""


@dataclasses.dataclass(frozen=True)
class PhaseProgram:
    """Everything static about one phase, and the functions that jax compiles for it.

    Attributes:
        model: the network.
        phase: what is trained, and how.
        mask: the phase resolved against the model.
        first_step: steps of the run before the phase.
        steps_per_epoch: of the run.
        tx: the phase's optimizer transformation.
        optimizer: what made it.
        objective: the loss.
        augment: of images; the identity when the phase sees them as they are.
        seed: of the run.
    """

    model: Classifier
    phase: Phase
    mask: Mask
    first_step: int
    steps_per_epoch: int
    tx: optax.GradientTransformation
    optimizer: optim.Optimizer
    objective: Objective
    augment: Augment
    seed: int

    def view(self, epoch: Int[Array, ""] | int) -> Any:
        """Number of the augmented view that an epoch sees."""
        return epoch % self.phase.views if self.phase.views else epoch

    def inputs(
        self, params: Tree, stats: Tree, images: Num[Array, "b h w 3"], view: Any, index: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """Images to the activations at the phase's boundary, augmented."""
        images = self.augment(images, self.seed, view, index)
        return self.model.prefix(params, stats, images, self.mask.boundary)

    def update(
        self,
        state: State,
        x: Float[Array, "b ..."],
        labels: Shaped[Array, "b ..."],
        weights: Float[Array, " b"],
        scale: Float[Array, ""],
    ) -> State:
        """One step of the optimizer on activations at the boundary.

        Args:
            state: before the step.
            x: activations at the boundary.
            labels: of the examples.
            weights: 0 for examples that only fill the batch up.
            scale: factor on the learning rate.
        """
        train, rest = freezing.partition(state["params"], self.mask.trainable)

        def loss_of(train: Tree) -> tuple[Array, tuple[Tree, Array]]:
            params = freezing.combine(train, rest)
            logits, stats = self.model.suffix(params, state["stats"], x, self.mask.boundary, self.mask.norm_modes)
            total = jnp.sum(self.objective(logits, labels) * weights)
            return total / jnp.maximum(weights.sum(), 1.0), (stats, total)

        (_, (stats, total)), gradients = jax.value_and_grad(loss_of, has_aux=True)(train)
        if self.optimizer.clip:
            clip = optax.clip_by_global_norm(self.optimizer.clip)
            gradients, _ = clip.update(gradients, clip.init(train))
        directions, opt = self.tx.update(gradients, state["opt"], train)
        rate = scale * optim.learning_rate(self.phase, state["step"] - self.first_step, self.steps_per_epoch)
        train = optax.apply_updates(train, jax.tree.map(lambda direction: -rate * direction, directions))
        ema = state["ema"]
        if self.optimizer.ema:
            decay = self.optimizer.ema
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, train)
        return {
            "params": freezing.combine(train, rest),
            "stats": stats,
            "opt": opt,
            "ema": ema,
            "step": state["step"] + 1,
            "loss": state["loss"] + total,
            "weight": state["weight"] + weights.sum(),
        }

    def train_step(self, state: State, batch: dict[str, Array], scale: Float[Array, ""]) -> State:
        """One step from images."""
        view = self.view(batch["epoch"])
        x = self.inputs(state["params"], state["stats"], batch["image"], view, batch["index"])
        return self.update(state, x, batch["label"], batch["weight"], scale)

    def cached_step(self, state: State, cache: dict[str, Array], batch: dict[str, Array], scale: Array) -> State:
        """One step from cached activations: `cache` holds `x` [views, n, ...] and `label` [n]."""
        view = self.view(batch["epoch"]) % cache["x"].shape[0]
        x = cache["x"][view, batch["index"]]
        return self.update(state, x, cache["label"][batch["index"]], batch["weight"], scale)

    def cached_epoch(self, state: State, cache: dict[str, Array], batches: dict[str, Array], scale: Array) -> State:
        """Many steps in one program: as `cached_step` over `index` and `weight` [steps, b]; `epoch` is one number."""

        def body(state: State, batch: dict[str, Array]) -> tuple[State, None]:
            return self.cached_step(state, cache, {**batch, "epoch": batches["epoch"]}, scale), None

        return jax.lax.scan(body, state, {name: batches[name] for name in ("index", "weight")})[0]

    def fresh_state(self, params: Tree, stats: Tree, step: int = 0) -> State:
        """The state at the start of a run, or of a phase before moments are carried over."""
        train, _ = freezing.partition(params, self.mask.trainable)
        return {
            "params": params,
            "stats": stats,
            "opt": self.tx.init(params),
            "ema": train if self.optimizer.ema else {},
            "step": np.int32(step),
            "loss": np.float32(0),
            "weight": np.float32(0),
        }

    def switch(self, state: State) -> State:
        """The state of the phase before, laid out for this one: leaves that go on training keep their moments."""
        averaged = evaluation_params(state)
        going_on, _ = freezing.partition(state["params"], self.mask.trainable)
        averages, stopped = freezing.partition(averaged, self.mask.trainable)
        # A leaf that stops training keeps its average, if one was kept: nothing would average it from here on.
        fresh = self.fresh_state(freezing.combine(going_on, stopped), state["stats"])
        return {
            **fresh,
            "opt": optim.carry(state["opt"], fresh["opt"]),
            "ema": averages if self.optimizer.ema else {},
            "step": state["step"],
        }


def evaluation_params(state: State) -> Tree:
    """The parameters to evaluate and hand on: averaged ones where an average is kept."""
    if not state["ema"]:
        return state["params"]
    return jax.tree.map(
        lambda mean, last: last if mean is None else mean,
        state["ema"],
        state["params"],
        is_leaf=lambda leaf: leaf is None,
    )


def programs(
    model: Classifier,
    phases: tuple[Phase, ...],
    optimizer: optim.Optimizer,
    objective: Objective,
    augment: Augment,
    seed: int,
    steps_per_epoch: int,
) -> list[PhaseProgram]:
    """One program per phase of a run."""
    shapes, _ = model.abstract()
    masks = [freezing.resolve(phase, model.groups, freezing.paths(shapes)) for phase in phases]
    result, first = [], 0
    for number, (phase, mask) in enumerate(zip(phases, masks, strict=True)):
        tx = optim.transformation(optimizer, shapes, masks, number)
        seen = augment if phase.augment else Augment()
        result.append(PhaseProgram(model, phase, mask, first, steps_per_epoch, tx, optimizer, objective, seen, seed))
        first += phase.epochs * steps_per_epoch
    return result
