"""The jitted steps of one phase, with gradients for trainable parameters only."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, PyTree, Shaped

from dapt_jax import ops
from dapt_jax.data.augment import Augment, example_keys
from dapt_jax.data.mix import Mix
from dapt_jax.losses import Loss, SegmentationLoss
from dapt_jax.models.classifier import Classifier
from dapt_jax.models.network import Network
from dapt_jax.objectives import Objective, SelfDistillation
from dapt_jax.training import freezing, optim
from dapt_jax.training.freezing import TrainableSpec, Tree
from dapt_jax.training.phases import Phase
from dapt_jax.training.quantised import dequantised, in_float32

State = dict[str, Any]
"""State of a run: `params`, `batch_stats`, `opt_state`, `ema` (trained leaves, or empty), `step`, and the
sums of `loss` and `weight` over the epoch so far; under `SelfDistillation` also what the `objective` keeps."""

RngContext = dict[str, Any]
"""What random numbers follow from: `seed` of the run, the `view_seed` of its fixed views where that is another one,
index of the `view` (augmentation) and of the `other_view` of a pair, and of the `epoch` (uncertain labels); under
`SelfDistillation` also the `total_steps` of its schedules."""

Mixed = tuple[Array, Array]
"""Of a mixed batch: the row of each image's partner, and each image's own share in the mix."""

_FOR_LABELS = 48
"""Folded into an example's key for its label, so that it differs from those of the augmentation."""


@dataclasses.dataclass(frozen=True)
class PhaseProgram:
    """Static configuration of one phase, and the functions that JAX compiles for it.

    What changes between seeds, epochs and strategies of the same mask (the learning rate, the seed, the
    weights of the examples) is an argument of these functions, so that all of them share one executable: see
    `key`.

    Attributes:
        model: Network.
        phase: Phase of training.
        mask: The phase resolved against the model.
        labels: Name of the transformation that updates each parameter, in tree order.
        optimizer: How trained parameters are updated.
        objective: Loss of labels, or label-free objective.
        augment: Augmentation of the images; the identity in a phase that does not augment.
        mix: Mixing of the images of a batch; the identity in a phase that sees each image by itself.
        first_step: Steps of the run before the phase.
        steps_per_epoch: Steps of an epoch of the run.
        seed: Seed of the run.
        grad_accum_steps: Parts into which a batch is cut, one after the other, so that the activations of one
            part at a time are in memory. The step is that of the whole batch, except that batch norm that
            trains sees one part at a time; that of a teacher of `SelfDistillation` sees all.
        batch_norm_groups: Number of equal groups of examples with separate batch statistics; 1 for statistics
            over all examples on all devices.
        batch_size: Images, over all devices, that are computed together, where the cost of an image depends on
            their number; else 1.
        total_steps: Steps of the run, over which schedules of `SelfDistillation` extend.
        fixed_view_seed: Seed of the augmentation in a phase of fixed views; negative for `seed`.
    """

    model: Network
    phase: Phase
    mask: TrainableSpec
    labels: tuple[str, ...]
    optimizer: optim.Optimizer
    objective: Loss | Objective
    augment: Augment
    mix: Mix
    first_step: int
    steps_per_epoch: int
    seed: int
    grad_accum_steps: int = 1
    batch_norm_groups: int = 1
    batch_size: int = 1
    total_steps: int = 0
    fixed_view_seed: int = -1

    @property
    def view_seed(self) -> int:
        """Seed of the augmentation."""
        return self.fixed_view_seed if self.phase.views and self.fixed_view_seed >= 0 else self.seed

    @property
    def self_distillation(self) -> SelfDistillation | None:
        """The objective, if its targets are outputs of the network's own moving average; else None."""
        return self.objective if isinstance(self.objective, SelfDistillation) else None

    @property
    def keeps_average(self) -> bool:
        """Whether the state holds a moving average of the trained leaves."""
        return bool(self.optimizer.ema) or self.self_distillation is not None

    @property
    def is_paired(self) -> bool:
        """Whether a step sees two views of every image."""
        return isinstance(self.objective, Objective) and self.objective.is_paired

    @property
    def is_corrupting(self) -> bool:
        """Whether a step corrupts the activations at the boundary."""
        return isinstance(self.objective, Objective) and self.objective.is_corrupting

    @property
    def key(self) -> Hashable:
        """Key of the compiled functions, besides the shapes of their arguments."""
        return (
            self.model,
            self.mask,
            self.labels,
            self.optimizer,
            self.objective,
            self.augment,
            self.mix,
            self.grad_accum_steps,
            self.batch_norm_groups,
            self.batch_size,
        )

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The phase's optimizer transformation, over the whole parameter tree."""
        return optim.transformation(self.optimizer, self.model.abstract()[0], self.labels)

    def side(self, image_size: int) -> int:
        """Return the side of the augmented images in pixels, given that of the data set's.

        Raises:
            UserError: The patch is larger than the images.
        """
        return self.augment.size(self.phase.image_size or image_size)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step of the run, before the factor of a plateau."""
        return optim.learning_rate(self.phase, step - self.first_step, self.steps_per_epoch)

    def view(self, epoch: int) -> int:
        """Return the index of the augmented view that an epoch sees."""
        return self.view_pair(epoch)[0]

    def view_pair(self, epoch: int) -> tuple[int, int]:
        """Return the indices of the view that an epoch sees, and of the one it is compared with.

        All ordered pairs of K fixed views follow one another; without fixed views both are new.
        """
        views = self.phase.views
        if not views:
            return (2 * epoch, 2 * epoch + 1) if self.is_paired else (epoch, epoch)
        view = epoch % views
        return view, (view + 1 + epoch // views % max(views - 1, 1)) % views

    def inputs(
        self, state: State, images: Num[Array, "b h w 3"], rng: RngContext, index: Int[Array, " b"]
    ) -> tuple[Any, Mixed | None]:
        """Augment and mix images, and run them through the prefix.

        Returns:
            Activations at the phase's boundary, an array or a pytree of arrays [b, ...]; and the mixing
            partner of each image, None without mixing.
        """
        images, mixed = self.augment(images, _view_seed(rng), rng["view"], index), None
        if not self.mix.is_identity:
            images, partner, own_share = self.mix(images, rng["seed"], state["step"])
            mixed = partner, own_share
        return self.model.prefix(state["params"], state["batch_stats"], images, self.mask.boundary), mixed

    def targets(
        self, labels: PyTree[Shaped[Array, "b ..."]], rng: RngContext, index: Int[Array, " b"]
    ) -> PyTree[Shaped[Array, "b ..."]]:
        """Return labels of augmented images: masks are transformed too, uncertain labels are sampled.

        A teacher's outputs are those of the augmented images already.
        """
        if isinstance(self.objective, Objective):
            return in_float32(labels)
        if isinstance(self.objective, SegmentationLoss):
            return self.augment.masks(labels, _view_seed(rng), rng["view"], index)
        if self.objective.uncertain is None:
            return labels
        keys = example_keys(rng["seed"], rng["epoch"], index)
        return self.objective.sample_targets(
            labels, jax.vmap(lambda key: jax.random.fold_in(key, _FOR_LABELS))(keys)
        )

    def own_targets(self, state: State, x: PyTree[Array]) -> PyTree[Float[Array, "b k"]]:
        """Return what the moving average of the network, which drops nothing, gives for both views.

        Args:
            state: State before a step.
            x: Pair of activations at the boundary.
        """
        params, modes = evaluation_params(state), self.mask.batch_norm_modes
        with ops.batch_norm_groups(self.batch_norm_groups):
            return self.model.suffix(params, state["batch_stats"], x, self.mask.boundary, modes)[0]

    def update(
        self,
        state: State,
        x: PyTree[Array],
        labels: PyTree[Shaped[Array, "b ..."]],
        weights: Float[Array, " b"],
        lr: Float[Array, ""],
        key: Array | None = None,
        mixed: Mixed | None = None,
        rng: RngContext | None = None,
    ) -> State:
        """Take one step of the optimizer on activations at the boundary.

        Args:
            state: State before the step.
            x: Activations at the boundary, an array or a pytree of arrays [b, ...]; of two views, a pair.
            labels: Labels of the examples, or a teacher's outputs for them.
            weights: Weights of the examples in the loss, which is their weighted mean.
            lr: Learning rate.
            key: Key of dropout, stochastic depth and patch dropout; None to drop nothing.
            mixed: Mixing partner of each image, and the fraction of its own label; each label keeps its
                example weight.
            rng: What the schedules of `SelfDistillation` follow from; its labels are the result of
                `own_targets`.

        Returns:
            The state after the step.
        """
        decay: Array | float = self.optimizer.ema
        kept = {}
        if objective := self.self_distillation:
            assert rng is not None
            decay = objective.momentum(state["step"], rng["total_steps"])
            kept = {"objective": objective.next_state(state["objective"], labels, weights)}
            labels = objective.targets(labels, state["objective"], rng["epoch"])
        train, rest = freezing.partition(state["params"], self.mask.trainable)
        batch = {"x": x, "label": labels, "weight": weights}
        if mixed is not None:
            partner, own_share = mixed
            batch |= {
                "weight": own_share * weights,
                "other": labels[partner],
                "other_weight": (1 - own_share) * weights[partner],
            }
        weight = jnp.maximum(weights.sum(), 1e-9)

        def loss_of(
            train: Tree, batch_stats: Tree, part: dict[str, Any], key: Array | None
        ) -> tuple[Array, tuple[Tree, Array]]:
            params = freezing.combine(train, rest)
            of_part = {"keeps_last": part["keeps_last"]} if "keeps_last" in part else {}
            with ops.batch_norm_groups(self.batch_norm_groups):
                logits, batch_stats = self.model.suffix(
                    params,
                    batch_stats,
                    part["x"],
                    self.mask.boundary,
                    self.mask.batch_norm_modes,
                    key,
                    **of_part,
                )
            total = self.objective.total(logits, part["label"], part["weight"])
            if mixed is not None:
                total += self.objective.total(logits, part["other"], part["other_weight"])
            return total / weight, (batch_stats, total)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if self.grad_accum_steps == 1:
            (_, (batch_stats, total)), gradients = gradient(train, state["batch_stats"], batch, key)
        else:
            batch_stats, total, gradients = self._accumulated(
                gradient, train, state["batch_stats"], batch, key
            )
        if self.optimizer.clip:
            clip = optax.clip_by_global_norm(self.optimizer.clip)
            gradients, _ = clip.update(gradients, clip.init(train))
        directions, opt = self.tx.update(gradients, state["opt_state"], train)
        train = optax.apply_updates(train, optim.scaled(directions, lr, self.mask))
        ema = state["ema"]
        if self.keeps_average:
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, train)
        return {
            "params": freezing.combine(train, rest),
            "batch_stats": batch_stats,
            "opt_state": opt,
            "ema": ema,
            "step": state["step"] + 1,
            "loss": state["loss"] + total,
            "weight": state["weight"] + weights.sum(),
            **kept,
        }

    def _accumulated(
        self,
        gradient: Callable[..., Any],
        train: Tree,
        batch_stats: Tree,
        batch: dict[str, Any],
        key: Array | None,
    ) -> tuple[Tree, Array, Tree]:
        """Return batch statistics, summed loss and summed gradient of a batch, part after part."""

        def cut(leaf: Array) -> Array:
            # Each device's examples are split separately, so that no example moves to another device.
            return leaf.reshape(-1, self.grad_accum_steps, *leaf.shape[1:]).swapaxes(0, 1)

        def add(carry: tuple[Tree, Array, Tree], numbered: tuple[Array, dict[str, Any]]) -> tuple[Any, None]:
            batch_stats, total, summed = carry
            number, part = numbered
            own_key = None if key is None else jax.random.fold_in(key, number)
            if self.is_corrupting:
                part = {**part, "keeps_last": number == self.grad_accum_steps - 1}
            (_, (batch_stats, more)), gradients = gradient(train, batch_stats, part, own_key)
            return (batch_stats, total + more, jax.tree.map(jnp.add, summed, gradients)), None

        nothing = jax.tree.map(jnp.zeros_like, train)
        numbered = jnp.arange(self.grad_accum_steps), jax.tree.map(cut, batch)
        return jax.lax.scan(add, (batch_stats, jnp.float32(0), nothing), numbered)[0]

    def train_step(
        self, state: State, batch: dict[str, Array], rng: RngContext, lr: Float[Array, ""]
    ) -> State:
        """Take one step from a batch of `image`, `label`, `weight` and `index`.

        For pairs it also holds `other_image` and `other`, the row of each.
        """
        labels = self.targets(batch["label"], rng, batch["index"])
        x, mixed = self.inputs(state, batch["image"], rng, batch["index"])
        if self.is_paired:
            of_other = {**rng, "view": rng["other_view"]}
            x = x, self.inputs(state, batch["other_image"], of_other, batch["other"])[0]
        labels = self.own_targets(state, x) if self.self_distillation else labels
        return self.update(state, x, labels, batch["weight"], lr, self._dropout_key(state, rng), mixed, rng)

    def _dropout_key(self, state: State, rng: RngContext) -> Array | None:
        """Return the key of (seed, step); none where neither dropout nor corruption needs one."""
        if not (self.model.is_stochastic or self.is_corrupting):
            return None
        return jax.random.fold_in(jax.random.key(rng["seed"]), state["step"])

    def activation_step(
        self, state: State, batch: dict[str, Any], rng: RngContext, lr: Float[Array, ""]
    ) -> State:
        """Take one step from a batch of `x` (cached activations), `label`, `weight` and `index`."""
        labels = self.targets(batch["label"], rng, batch["index"])
        x = self.to_compute_dtype(batch["x"])
        labels = self.own_targets(state, x) if self.self_distillation else labels
        return self.update(state, x, labels, batch["weight"], lr, self._dropout_key(state, rng), rng=rng)

    def cached_step(
        self,
        state: State,
        cache: dict[str, Any],
        batch: dict[str, Array],
        rng: RngContext,
        lr: Float[Array, ""],
    ) -> State:
        """Take one step from `cache`: `x`, leaves [views, n, ...] on the device, and `label` [n].

        A teacher's outputs are in `target` instead, leaves [views, n, ...].
        """
        x = _rows(cache["x"], rng["view"], batch["index"])
        if self.is_paired:
            x = x, _rows(cache["x"], rng["other_view"], batch["other"])
        if "target" in cache:
            labels = in_float32(_rows(cache["target"], rng["view"], batch["index"]))
        else:
            labels = self.targets(cache["label"][batch["index"]], rng, batch["index"])
        x = self.to_compute_dtype(x)
        labels = self.own_targets(state, x) if self.self_distillation else labels
        return self.update(state, x, labels, batch["weight"], lr, self._dropout_key(state, rng), rng=rng)

    def cached_epochs(
        self, state: State, cache: dict[str, Any], work: dict[str, Array]
    ) -> tuple[State, Float[Array, "most 2"], Float[Array, "most v outputs"]]:
        """Run many epochs in one program, each followed by the logits of the validation rows.

        Args:
            state: State before them.
            cache: The cache that `cached_step` takes, and `validation`, the activations of the validation
                rows, leaves [v, ...].
            work: `epochs` to run, `steps` of each, `seed` of the run, index of the `first` epoch, and for `most`
                epochs, of which the first ones are run: `index` and `weight` [most, s, b], `view` [most], `lr`
                [most, s], of whose s steps the first ones are taken.

        Returns:
            The state after the epochs; per epoch, the sums of loss and weight and the logits of the
            validation rows.
        """
        most = work["view"].shape[0]
        validation = self.to_compute_dtype(cache["validation"])
        # What changes from step to step is carried alone: a branch that skips a step may copy what it is given.
        _, frozen = freezing.partition(state["params"], self.mask.trainable)

        def changing(state: State) -> State:
            train, _ = freezing.partition(state["params"], self.mask.trainable)
            return {
                name: train if name == "params" else state[name] for name in state if name != "batch_stats"
            }

        def whole(carry: State) -> State:
            params = freezing.combine(carry["params"], frozen)
            return {**carry, "params": params, "batch_stats": state["batch_stats"]}

        def validation_logits(carry: State) -> Array:
            now = whole(carry)
            return self.model.suffix(
                evaluation_params(now), now["batch_stats"], validation, self.mask.boundary
            )[0]

        def step(
            rng: RngContext, carry: State, one: tuple[Array, dict[str, Array], Array]
        ) -> tuple[State, None]:
            number, batch, lr = one

            def take(carry: State) -> State:
                return changing(self.cached_step(whole(carry), cache, batch, rng, lr))

            return jax.lax.cond(number < work["steps"], take, lambda carry: carry, carry), None

        def epoch(number: Array, carried: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
            carry, sums, logits = carried
            batches = {name: work[name][number] for name in ("index", "weight")}
            seeds: RngContext = {name: work[name] for name in ("seed", "view_seed") if name in work}
            rng = {**seeds, "view": work["view"][number], "epoch": work["first"] + number}
            numbered = jnp.arange(work["lr"].shape[1]), batches, work["lr"][number]
            carry, _ = jax.lax.scan(functools.partial(step, rng), carry, numbered)
            sums = sums.at[number].set(jnp.stack([carry["loss"], carry["weight"]]))
            logits = logits.at[number].set(validation_logits(carry))
            return {**carry, "loss": jnp.float32(0), "weight": jnp.float32(0)}, sums, logits

        start = changing(state)
        empty = jnp.zeros((most, *jax.eval_shape(validation_logits, start).shape), jnp.float32)
        carry, sums, logits = jax.lax.fori_loop(
            0, work["epochs"], epoch, (start, jnp.zeros((most, 2), jnp.float32), empty)
        )
        return whole(carry), sums, logits

    def to_compute_dtype(self, x: PyTree[Array | np.ndarray]) -> PyTree[Array | np.ndarray]:
        """Return cached activations in the compute dtype of the network."""
        return dequantised(x, self.model.dtype)

    def init_state(self, params: Tree, batch_stats: Tree, step: int = 0) -> State:
        """Return the state at the start of a run, or of a phase before moments are carried over."""
        train, _ = freezing.partition(params, self.mask.trainable)
        # All moments and counts of optax's SGD and Adam start at zero; as JAX's zeros, each shape is compiled.
        opt_state = jax.eval_shape(self.tx.init, params)
        return {
            "params": params,
            "batch_stats": batch_stats,
            "opt_state": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), opt_state),
            "ema": _copy(train) if self.keeps_average else {},
            "step": np.int32(step),
            "loss": np.float32(0),
            "weight": np.float32(0),
            **({"objective": objective.init_state()} if (objective := self.self_distillation) else {}),
        }

    def transition_from(self, state: State) -> State:
        """Return the state of the previous phase in the layout of this one; moments are carried over."""
        averaged = evaluation_params(state)
        going_on, _ = freezing.partition(state["params"], self.mask.trainable)
        averages, stopped = freezing.partition(averaged, self.mask.trainable)
        # A leaf that stops training is set to its average, if there is one: its averaging ends here.
        fresh = self.init_state(freezing.combine(going_on, stopped), state["batch_stats"])
        opt_state = fresh["opt_state"]
        if self.optimizer.carry_state:
            opt_state = optim.carry(state["opt_state"], opt_state)
        return {
            **fresh,
            "opt_state": opt_state,
            "ema": _copy(averages) if self.keeps_average else {},
            "step": state["step"],
            **({"objective": state["objective"]} if self.self_distillation else {}),
        }


def _rows(cached: PyTree[Array], view: Array, index: Int[Array, " b"]) -> PyTree[Array]:
    """Return the rows of one view from leaves [views, n, ...]."""
    return jax.tree.map(lambda leaf: leaf[view, index], cached)


def _copy(tree: Tree) -> Tree:
    """Return copies of the buffers: a step donates its state, and no buffer can be donated twice."""
    return jax.tree.map(lambda leaf: leaf + 0, tree)


def evaluation_params(state: State) -> Tree:
    """Return the parameters for evaluation and export: averaged ones if there is an average."""
    if not state["ema"]:
        return state["params"]
    return jax.tree.map(
        lambda mean, last: last if mean is None else mean,
        state["ema"],
        state["params"],
        is_leaf=lambda leaf: leaf is None,
    )


def eval_transform(model: Network, augment: Augment) -> Augment:
    """Return the transform of images that are not augmented: the middle patch for patch classifiers."""
    return (
        Augment(patch=augment.patch, centre=True)
        if augment.patch and isinstance(model, Classifier)
        else Augment()
    )


def _views(model: Network, loss: Loss | Objective, augment: Augment) -> Augment:
    """Return the augmentation that draws the views of a network's loss."""
    return loss.views(augment, model.encoder) if isinstance(loss, Objective) else augment


def _view_seed(rng: RngContext) -> Array:
    """Return the seed of the augmentation."""
    return rng["view_seed"] if "view_seed" in rng else rng["seed"]


def programs(
    model: Network,
    phases: Sequence[Phase],
    *,
    optimizer: optim.Optimizer,
    loss: Loss | Objective,
    augment: Augment,
    mix: Mix,
    seed: int,
    steps_per_epoch: int,
    grad_accum_steps: int = 1,
    batch_norm_groups: int = 1,
    batch_size: int = 1,
    fixed_view_seed: int = -1,
) -> tuple[PhaseProgram, ...]:
    """Return the program of each phase of a run; see `TrainingRun` for the arguments.

    A phase that does not augment its images does not mix them either.
    """
    if model.encoder.options.drop_path_subset:
        counted = batch_size // grad_accum_steps  # each part of a step draws its own subset
    else:
        counted = batch_size if isinstance(loss, Objective) and loss.compares_images else 1
    paths = freezing.paths(model.abstract()[0])
    masks = [freezing.resolve_trainable(phase, model.groups, model.kinds) for phase in phases]
    labels = optim.labels(paths, model.kinds, model.groups, masks, optimizer)
    first_epochs = itertools.accumulate((phase.epochs for phase in phases), initial=0)
    return tuple(
        PhaseProgram(
            model=model,
            phase=phase,
            mask=mask,
            labels=labels[number],
            optimizer=optimizer,
            objective=loss,
            augment=_views(model, loss, augment if phase.augment else eval_transform(model, augment)),
            mix=mix if phase.augment else Mix(),
            first_step=first_epoch * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            grad_accum_steps=grad_accum_steps,
            batch_norm_groups=batch_norm_groups,
            batch_size=counted,
            total_steps=sum(each.epochs for each in phases) * steps_per_epoch,
            fixed_view_seed=fixed_view_seed,
        )
        for number, (phase, mask, first_epoch) in enumerate(zip(phases, masks, first_epochs, strict=False))
    )
