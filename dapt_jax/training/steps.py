"""The jitted steps of one phase: gradients for what trains, and nothing computed for what is frozen."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, Shaped

from dapt_jax import ops
from dapt_jax.data.augment import Augment, example_keys
from dapt_jax.data.mix import Mix
from dapt_jax.losses import Loss, SegmentationLoss
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.network import Network
from dapt_jax.training import freezing, optim
from dapt_jax.training.freezing import TrainableSpec, Tree
from dapt_jax.training.phases import Phase

State = dict[str, Any]
"""`params`, `stats`, `opt`, `ema` (trained leaves, or empty), `step`, and `loss` and `weight` summed over the epoch."""

RngContext = dict[str, Any]
"""What is drawn from: `seed` of the run, number of the `view`, for augmentation, and of the `epoch`, for uncertain labels."""

Mixed = tuple[Array, Array]
"""Of a batch whose images are mixed: the row of each one's partner, and the share of itself that every image has kept."""

_FOR_LABELS = 48


@dataclasses.dataclass(frozen=True)
class PhaseProgram:
    """Everything static about one phase, and the functions that jax compiles for it.

    What changes between seeds, epochs and strategies of the same mask (the rate, the seed, the weights of the examples)
    is an argument of these functions, so that all of them share one executable: see `key`.

    Attributes:
        model: the network.
        phase: what is trained, and how.
        mask: the phase resolved against the model.
        labels: of every parameter, in tree order: which transformation updates it.
        optimizer: how.
        objective: the loss.
        augment: of images; the identity when the phase sees them as they are.
        mix: of the images of a batch with one another; the identity when the phase sees each by itself.
        first_step: steps of the run before the phase.
        steps_per_epoch: of the run.
        seed: of the run.
        parts: into which a batch is cut, one after the other, to keep the activations of one part at a time (gradient
            accumulation). The step is that of the whole batch, but that batch norm that trains sees a part at a time.
        norm_groups: into how many equal runs of examples what batch norm sees at a time is cut, each with statistics of its
            own; 1 for those of all examples, wherever they are.
    """

    model: Network
    phase: Phase
    mask: TrainableSpec
    labels: tuple[str, ...]
    optimizer: optim.Optimizer
    objective: Loss
    augment: Augment
    mix: Mix
    first_step: int
    steps_per_epoch: int
    seed: int
    parts: int = 1
    norm_groups: int = 1

    @property
    def key(self) -> Hashable:
        """What the compiled functions depend on, beside the shapes of their arguments."""
        return (
            self.model, self.mask, self.labels, self.optimizer, self.objective, self.augment, self.mix, self.parts,
            self.norm_groups,
        )  # fmt: skip

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The phase's optimizer transformation, over the whole parameter tree."""
        return optim.transformation(self.optimizer, self.model.abstract()[0], self.labels)

    def rate(self, step: int) -> float:
        """Learning rate of a step of the run, before what a plateau has taken off."""
        return optim.learning_rate(self.phase, step - self.first_step, self.steps_per_epoch)

    def view(self, epoch: int) -> int:
        """Number of the augmented view that an epoch sees."""
        return epoch % self.phase.views if self.phase.views else epoch

    def inputs(
        self, state: State, images: Num[Array, "b h w 3"], draw: RngContext, index: Int[Array, " b"]
    ) -> tuple[Any, Mixed | None]:
        """Images to the activations at the phase's boundary, augmented and mixed.

        Returns:
            An array or a pytree of arrays [b, ...]; and with whom each image is mixed, None where none is.
        """
        images, mixed = self.augment(images, draw["seed"], draw["view"], index), None
        if not self.mix.is_identity:
            images, partner, kept = self.mix(images, draw["seed"], state["step"])
            mixed = partner, kept
        return self.model.prefix(state["params"], state["batch_stats"], images, self.mask.boundary), mixed

    def targets(
        self, labels: Shaped[Array, "b ..."], draw: RngContext, index: Int[Array, " b"]
    ) -> Shaped[Array, "b ..."]:
        """Labels of augmented images: masks go the way of their images; for an uncertain label a target is drawn."""
        if isinstance(self.objective, SegmentationLoss):
            return self.augment.masks(labels, draw["seed"], draw["view"], index)
        if self.objective.uncertain is None:
            return labels
        keys = example_keys(draw["seed"], draw["epoch"], index)
        return self.objective.sample_targets(labels, jax.vmap(lambda key: jax.random.fold_in(key, _FOR_LABELS))(keys))

    def update(
        self,
        state: State,
        x: Any,
        labels: Shaped[Array, "b ..."],
        weights: Float[Array, " b"],
        rate: Float[Array, ""],
        rng: Array | None = None,
        mixed: Mixed | None = None,
    ) -> State:
        """One step of the optimizer on activations at the boundary.

        Args:
            state: before the step.
            x: activations at the boundary, an array or a pytree of arrays [b, ...].
            labels: of the examples.
            weights: of the examples in the loss, which is their weighted mean.
            rate: learning rate.
            rng: of what is dropped at random; None to drop nothing.
            mixed: whose labels an image has besides its own, and how much of these; each label keeps its own weight.
        """
        train, rest = freezing.partition(state["params"], self.mask.trainable)
        batch = {"x": x, "label": labels, "weight": weights}
        if mixed is not None:
            partner, kept = mixed
            batch |= {"weight": kept * weights, "other": labels[partner], "other_weight": (1 - kept) * weights[partner]}
        weight = jnp.maximum(weights.sum(), 1e-9)

        def loss_of(
            train: Tree, batch_stats: Tree, part: dict[str, Any], rng: Array | None
        ) -> tuple[Array, tuple[Tree, Array]]:
            params = freezing.combine(train, rest)
            with ops.batch_norm_groups(self.norm_groups):
                logits, batch_stats = self.model.suffix(
                    params, batch_stats, part["x"], self.mask.boundary, self.mask.batch_norm_modes, rng
                )
            total = self.objective.total(logits, part["label"], part["weight"])
            if mixed is not None:
                total += self.objective.total(logits, part["other"], part["other_weight"])
            return total / weight, (batch_stats, total)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if self.parts == 1:
            (_, (batch_stats, total)), gradients = gradient(train, state["batch_stats"], batch, rng)
        else:
            batch_stats, total, gradients = self._accumulated(gradient, train, state["batch_stats"], batch, rng)
        if self.optimizer.clip:
            clip = optax.clip_by_global_norm(self.optimizer.clip)
            gradients, _ = clip.update(gradients, clip.init(train))
        directions, opt = self.tx.update(gradients, state["opt_state"], train)
        train = optax.apply_updates(train, optim.scaled(directions, rate, self.mask))
        ema = state["ema"]
        if self.optimizer.ema:
            decay = self.optimizer.ema
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, train)
        return {
            "params": freezing.combine(train, rest),
            "batch_stats": batch_stats,
            "opt_state": opt,
            "ema": ema,
            "step": state["step"] + 1,
            "loss": state["loss"] + total,
            "weight": state["weight"] + weights.sum(),
        }

    def _accumulated(
        self, gradient: Any, train: Tree, batch_stats: Tree, batch: dict[str, Any], rng: Array | None
    ) -> tuple[Tree, Array, Tree]:
        """Statistics, summed loss and summed gradient of a batch, part after part."""

        def cut(leaf: Array) -> Array:
            # Every device's run of examples is cut by itself, so that no example changes its device.
            return leaf.reshape(-1, self.parts, *leaf.shape[1:]).swapaxes(0, 1)

        def add(carry: Any, numbered: Any) -> tuple[Any, None]:
            batch_stats, total, summed = carry
            number, part = numbered
            key = None if rng is None else jax.random.fold_in(rng, number)
            (_, (batch_stats, more)), gradients = gradient(train, batch_stats, part, key)
            return (batch_stats, total + more, jax.tree.map(jnp.add, summed, gradients)), None

        nothing = jax.tree.map(jnp.zeros_like, train)
        numbered = jnp.arange(self.parts), jax.tree.map(cut, batch)
        return jax.lax.scan(add, (batch_stats, jnp.float32(0), nothing), numbered)[0]

    def train_step(self, state: State, batch: dict[str, Array], draw: RngContext, rate: Float[Array, ""]) -> State:
        """One step from a batch of `image`, `label`, `weight` and `index`."""
        labels = self.targets(batch["label"], draw, batch["index"])
        x, mixed = self.inputs(state, batch["image"], draw, batch["index"])
        return self.update(state, x, labels, batch["weight"], rate, self._rng(state, draw), mixed)

    def _rng(self, state: State, draw: RngContext) -> Array | None:
        """What a step drops follows from (seed, step) alone; a network that drops nothing is compiled without a key."""
        if not self.model.encoder.is_stochastic:
            return None
        return jax.random.fold_in(jax.random.key(draw["seed"]), state["step"])

    def activation_step(self, state: State, batch: dict[str, Any], draw: RngContext, rate: Float[Array, ""]) -> State:
        """One step from a batch of `x`, the activations at the boundary as they are kept, `label`, `weight`, `index`."""
        labels = self.targets(batch["label"], draw, batch["index"])
        return self.update(
            state, self.to_compute_dtype(batch["x"]), labels, batch["weight"], rate, self._rng(state, draw)
        )

    def cached_step(
        self, state: State, cache: dict[str, Any], batch: dict[str, Array], draw: RngContext, rate: Float[Array, ""]
    ) -> State:
        """One step from cached activations: `cache` holds `x`, leaves [views, n, ...], and `label` [n]."""
        x = jax.tree.map(lambda leaf: leaf[draw["view"], batch["index"]], cache["x"])
        labels = self.targets(cache["label"][batch["index"]], draw, batch["index"])
        return self.update(state, self.to_compute_dtype(x), labels, batch["weight"], rate, self._rng(state, draw))

    def cached_epochs(
        self, state: State, cache: dict[str, Any], work: dict[str, Array]
    ) -> tuple[State, Float[Array, "most 2"], Float[Array, "most v outputs"]]:
        """Many epochs in one program, each followed by the logits of the rows that are watched.

        Args:
            state: before them.
            cache: as in `cached_step`, and `watched`, the activations of the watched rows, leaves [v, ...].
            work: `epochs` to run, `seed` of the run, number of the `first` epoch, and for `most` epochs, of which the first
                ones are run: `index` and `weight` [most, steps, b], `view` [most], `rate` [most, steps].

        Returns:
            The state after them; per epoch the sums of loss and weight; per epoch the logits of the watched rows.
        """
        most = work["view"].shape[0]
        watched = self.to_compute_dtype(cache["watched"])

        def logits_of(state: State) -> Array:
            params = evaluation_params(state)
            return self.model.suffix(params, state["batch_stats"], watched, self.mask.boundary)[0]

        def step(draw: RngContext, state: State, one: tuple[dict[str, Array], Array]) -> tuple[State, None]:
            batch, rate = one
            return self.cached_step(state, cache, batch, draw, rate), None

        def epoch(number: Array, carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
            state, sums, logits = carry
            rates = work["rate"][number]
            batches = {name: work[name][number] for name in ("index", "weight")}
            draw = {"seed": work["seed"], "view": work["view"][number], "epoch": work["first"] + number}
            state, _ = jax.lax.scan(functools.partial(step, draw), state, (batches, rates))
            sums = sums.at[number].set(jnp.stack([state["loss"], state["weight"]]))
            logits = logits.at[number].set(logits_of(state))
            return {**state, "loss": jnp.float32(0), "weight": jnp.float32(0)}, sums, logits

        empty = jnp.zeros((most, *jax.eval_shape(logits_of, state).shape), jnp.float32)
        return jax.lax.fori_loop(0, work["epochs"], epoch, (state, jnp.zeros((most, 2), jnp.float32), empty))

    def to_compute_dtype(self, x: Any) -> Any:
        """Activations in the dtype that the network computes in, whichever they were kept in."""
        return jax.tree.map(lambda leaf: leaf.astype(self.model.dtype), x)

    def init_state(self, params: Tree, batch_stats: Tree, step: int = 0) -> State:
        """The state at the start of a run, or of a phase before moments are carried over."""
        train, _ = freezing.partition(params, self.mask.trainable)
        return {
            "params": params,
            "batch_stats": batch_stats,
            "opt_state": self.tx.init(params),
            "ema": _copy(train) if self.optimizer.ema else {},
            "step": np.int32(step),
            "loss": np.float32(0),
            "weight": np.float32(0),
        }

    def transition_from(self, state: State) -> State:
        """The state of the phase before, laid out for this one: leaves that go on training keep their moments."""
        averaged = evaluation_params(state)
        going_on, _ = freezing.partition(state["params"], self.mask.trainable)
        averages, stopped = freezing.partition(averaged, self.mask.trainable)
        # A leaf that stops training keeps its average, if one was kept: nothing would average it from here on.
        fresh = self.init_state(freezing.combine(going_on, stopped), state["batch_stats"])
        return {
            **fresh,
            "opt_state": optim.carry(state["opt_state"], fresh["opt_state"]),
            "ema": _copy(averages) if self.optimizer.ema else {},
            "step": state["step"],
        }


def _copy(tree: Tree) -> Tree:
    """Buffers of its own: a step gives all of its state away, and one buffer cannot be given twice."""
    return jax.tree.map(lambda leaf: leaf + 0, tree)


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


def eval_transform(model: Network, augment: Augment) -> Augment:
    """What is done to images that are not augmented: a classifier that trains on patches sees the patch in the middle."""
    return Augment(patch=augment.patch, centre=True) if augment.patch and isinstance(model, Classifier) else Augment()


def programs(
    model: Network,
    phases: tuple[Phase, ...],
    optimizer: optim.Optimizer,
    objective: Loss,
    augment: Augment,
    seed: int,
    steps_per_epoch: int,
    mix: Mix | None = None,
    parts: int = 1,
    norm_groups: int = 1,
) -> list[PhaseProgram]:
    """One program per phase of a run; phases that do not augment their images do not mix them either."""
    shapes, _ = model.abstract()
    masks = [freezing.resolve_trainable(phase, model.groups, model.kinds) for phase in phases]
    result, first = [], 0
    for number, (phase, mask) in enumerate(zip(phases, masks, strict=True)):
        labels = optim.labels(freezing.paths(shapes), model.kinds, masks, number)
        seen = augment if phase.augment else eval_transform(model, augment)
        mixed = mix if mix and phase.augment else Mix()
        result.append(
            PhaseProgram(
                model,
                phase,
                mask,
                labels,
                optimizer,
                objective,
                seen,
                mixed,
                first,
                steps_per_epoch,
                seed,
                parts,
                norm_groups,
            )
        )
        first += phase.epochs * steps_per_epoch
    return result
