"""The training loop, one page: per phase [compile], per epoch [steps, evaluate, save], then the ledger."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from dapt_jax import parallel
from dapt_jax.cost.ledger import Row
from dapt_jax.data.decode import ImageStore
from dapt_jax.errors import UserError
from dapt_jax.training import accounting, checkpoint, freezing, optim
from dapt_jax.training.caching import Place
from dapt_jax.training.evaluate import Evaluator
from dapt_jax.training.features import Activations, Prefix
from dapt_jax.training.feeds import Epochs, Feed, OnDevice, Streamed
from dapt_jax.training.freezing import Tree
from dapt_jax.training.meter import Meter
from dapt_jax.training.run import Run, Tools
from dapt_jax.training.steps import PhaseProgram, State, evaluation_params


def train(run: Run, params: Tree, stats: Tree, tools: Tools) -> tuple[Tree, Tree]:
    """Runs all phases, or what is left of them after the newest checkpoint.

    Args:
        run: what to train, on what, how.
        params: source weights, with every layer that is new drawn from the seed.
        stats: source statistics.
        tools: checkpoints, ledger, cache, devices, display.

    Returns:
        Parameters (averaged ones where an average is kept) and statistics, on the host; those of where `tools.hook`
        ended the run, if it did.

    Raises:
        UserError: the loss is no longer a number.
    """
    saver = checkpoint.Checkpoints(tools.folder) if tools.folder else None
    try:
        state, meta = _start(run, params, stats, saver, tools)
        timeline = run.timeline
        step = int(state["step"])
        if tools.hook:
            tools.hook.restore(meta.get("hook", {}))
        first = timeline.position(step).phase if step < timeline.steps else len(run.programs)
        for number in range(first, len(run.programs)):
            if tools.hook and tools.hook.ends:
                break
            is_fresh = int(state["step"]) == timeline.first_step(number)
            if is_fresh and number:
                state = run.programs[number].switch(state)
            state = _PhaseLoop(run, number, {} if is_fresh else meta, tools, saver).run(state)
    finally:
        if saver:
            saver.close()
    return jax.device_get(evaluation_params(state)), jax.device_get(state["stats"])


def _start(
    run: Run, params: Tree, stats: Tree, saver: checkpoint.Checkpoints | None, tools: Tools
) -> tuple[State, dict[str, Any]]:
    """The state to go on from: the newest checkpoint laid over the source weights, or a fresh one."""
    programs = list(run.programs)
    state, meta = programs[0].fresh_state(params, stats), dict[str, Any]()

    def layout(step: int) -> State:
        phase = run.timeline.phase_of_state(step)
        fresh = jax.eval_shape(programs[phase].fresh_state, params, stats)
        return checkpoint.saved_part(fresh, programs, phase)

    found = saver.restore(layout) if saver else None
    if found:
        step, part, meta = found
        full_stats = freezing.overlay(stats, part["stats"])
        state = {**part, "params": freezing.overlay(params, part["params"]), "stats": full_stats}
        done = sum(
            _work(run, number, min(step, run.timeline.first_step(number + 1)) - run.timeline.first_step(number))
            for number in range(len(programs))
            if step > run.timeline.first_step(number)
        )
        tools.reporter.skip(done)
        tools.reporter.say(f"{run.title}: goes on from step {step} of {run.timeline.steps}")
    return parallel.replicate(state, tools.mesh), meta


def _work(run: Run, number: int, steps: int) -> float:
    """Model FLOPs of some steps of a phase, for the display."""
    program = run.programs[number]
    cost = accounting.image_cost(program, run.dataset.images.size)
    prefix = 0 if run.cache_decision(program).cached else cost.prefix.model
    return float((prefix + cost.suffix.model) * steps * run.batch_size)


class _PhaseLoop:
    """One phase of a run."""

    def __init__(self, run: Run, number: int, meta: dict[str, Any], tools: Tools, saver: checkpoint.Checkpoints | None):
        self.run_, self.number, self.tools, self.saver = run, number, tools, saver
        self.program: PhaseProgram = run.programs[number]
        self.meter = Meter(tools.hardware, meta.get("meter"))
        self.curve: list[dict[str, Any]] = list(meta.get("curve", []))
        self.plateau = optim.Plateau(**meta["plateau"]) if meta else dataclasses.replace(run.plateau)
        self.position: dict[str, Any] = meta.get("position", {})
        self.filled: dict[str, Any] = meta.get("filled", {})
        self.saved = time.monotonic()
        self.work_of_step = 0.0

    def run(self, state: State) -> State:
        """Runs the phase from where the state is to its end; what no part of it claims of the time is training."""
        with self.meter.clock.span("train"):
            return self._run(state)

    def _run(self, state: State) -> State:
        timeline = self.run_.timeline
        end = timeline.first_epoch(self.number + 1)
        with self.meter.clock.span("compile"):  # what caching, compiling and reading take inside is theirs
            feed, evaluator = self._feed(state)
            self.work_of_step = _work(self.run_, self.number, 1)
        epoch = timeline.position(int(state["step"])).epoch
        while epoch < end and not (self.tools.hook and self.tools.hook.ends):
            if isinstance(feed, Epochs):
                state, count = self._many_epochs(state, epoch, end, feed, evaluator)
            else:
                state, count = self._one_epoch(state, epoch, feed, evaluator), 1
            epoch += count
            if epoch < end:
                self._save_if_due(state, feed)
        self._finish(state, feed)
        return state

    def _one_epoch(self, state: State, epoch: int, feed: Feed, evaluator: Evaluator) -> State:
        """The batches of an epoch that are left, then its evaluation."""
        steps = self.run_.timeline.steps_per_epoch
        since = time.monotonic()
        for stepped, done in feed.epoch(state, epoch, int(state["step"]) - epoch * steps, self.plateau.scale):
            state = stepped
            self._tell(epoch, done, time.monotonic() - since)
            # An epoch's end is saved after its evaluation, so that no epoch is evaluated twice or never.
            if int(state["step"]) < (epoch + 1) * steps:
                self._save_if_due(state, feed)
            since = time.monotonic()
        sums = float(state["loss"]), float(state["weight"])
        self._check(epoch, *sums)
        with self.meter.clock.span("eval"):
            scores = evaluator(state)
        self._end_epoch(epoch, *sums, scores)
        if self.tools.hook:
            with self.meter.clock.span("eval"):
                params, stats = evaluation_params(state), state["stats"]
                self.tools.hook.after_epoch(self.number, epoch, params, stats, scores)
        zero = parallel.replicate({"loss": np.float32(0), "weight": np.float32(0)}, self.tools.mesh)
        return {**state, **zero}

    def _many_epochs(self, state: State, epoch: int, end: int, feed: Epochs, evaluator: Evaluator) -> tuple[State, int]:
        """Epochs that run as one program, and how many they were; a plateau decides on the rate after each."""
        most = 1 if self.program.phase.schedule == "plateau" else end - epoch
        since = time.monotonic()
        state, sums, logits = feed.epochs(state, epoch, most, self.plateau.scale)
        self._tell(epoch + len(sums) - 1, len(sums) * self.run_.timeline.steps_per_epoch, time.monotonic() - since)
        for number, ((loss, weight), watched) in enumerate(zip(sums, logits, strict=True), start=epoch):
            self._check(number, float(loss), float(weight))
            with self.meter.clock.span("eval"):
                scores = evaluator.scores(watched)
            self._end_epoch(number, float(loss), float(weight), scores)
        return state, len(sums)

    def _tell(self, epoch: int, batches: int, seconds: float) -> None:
        """Shows what was done since the last time."""
        run, phase = self.run_, self.program.phase
        local = epoch - run.timeline.first_epoch(self.number) + 1
        doing = f"{run.title}  {phase.name} epoch {local}/{phase.epochs}"
        speed = batches * run.batch_size / max(seconds, 1e-9)
        self.tools.reporter.advance(batches * self.work_of_step, doing, speed)

    def _feed(self, state: State) -> tuple[Feed | Epochs, Evaluator]:
        run, program, tools, clock = self.run_, self.program, self.tools, self.meter.clock
        fills = run.fills(self.number)
        if fills:
            tools.reporter.advance(0, f"{run.title}  {program.phase.name}: computing the frozen prefix once")
            inputs = state["params"], state["stats"], run.dataset.images
            with clock.span("cache"):
                activations, ran = self._climb(fills, *inputs)
                clean = activations
                prefix, place = fills[-1]
                if activations and len(run.val_rows) and prefix != prefix.plain:
                    clean = tools.store.get(prefix.plain, *inputs, place, clock=clock)
            if activations and clean:
                tools.reporter.advance(ran, f"{run.title}  {program.phase.name}")
                if not self.filled:
                    alone = run.fill_flops(self.number)
                    spent = min(ran, alone)  # what a kill made run once more is not counted twice
                    self.filled = {
                        "cached": "filled" if spent else "reused",
                        "flops": spent,
                        "reused_flops": alone - spent,
                        "reused_s": activations.seconds if alone and not spent else 0.0,
                    }
                evaluator = Evaluator(run, program, clean)
                if Epochs.serve(program, activations):
                    return Epochs(run, program, tools, clock, state, activations, clean), evaluator
                if activations.file is None:
                    return OnDevice(run, program, tools, clock, state, activations), evaluator
                return Streamed(run, program, tools, clock, state, self.position, activations), evaluator
        return Streamed(run, program, tools, clock, state, self.position), Evaluator(run, program, None)

    def _climb(
        self, fills: list[tuple[Prefix, Place]], params: Tree, stats: Tree, images: ImageStore
    ) -> tuple[Activations | None, int]:
        """Computes what is missing of the frozen prefixes, each from the one below it.

        Returns:
            The activations that the phase trains on, None where they cannot be kept; and the FLOPs that were run.
        """
        base: tuple[int, Activations] | None = None
        found, ran = None, 0
        for prefix, place in fills:
            found = self.tools.store.get(prefix, params, stats, images, place, base, self.meter.clock)
            if found:
                base, ran = (prefix.boundary, found), ran + found.ran
        return found, ran

    def _check(self, epoch: int, loss: float, weight: float) -> None:
        """Refuses to go on from a loss that is no number."""
        if not math.isfinite(loss / weight):
            raise UserError(
                f"{self.run_.title}: the training loss is {loss / weight} in epoch {epoch + 1} of phase "
                f"{self.program.phase.name!r}; expected a number: lower its lr, or clip the gradient"
            )

    def _end_epoch(self, epoch: int, loss: float, weight: float, scores: dict[str, float]) -> None:
        """Enters an epoch into the curve."""
        last_step = (epoch + 1) * self.run_.timeline.steps_per_epoch - 1
        rate = self.plateau.scale * self.program.rate(last_step)
        self.curve.append({"epoch": epoch, "loss": loss / weight, "lr": rate, **scores})
        if self.program.phase.schedule == "plateau":
            self.plateau.update(scores.get("val_loss", loss / weight))

    def _save_if_due(self, state: State, feed: Feed | Epochs) -> None:
        if self.saver and time.monotonic() - self.saved > self.tools.every_s:
            self._save(state, feed)

    def _save(self, state: State, feed: Feed | Epochs) -> None:
        assert self.saver is not None
        with self.meter.clock.span("checkpoint"):
            part = checkpoint.saved_part(state, list(self.run_.programs), self.number)
            meta = {
                "position": feed.position(),
                "seed": self.run_.seed,
                "plateau": dataclasses.asdict(self.plateau),
                "curve": list(self.curve),  # written in the background, while epochs are added to the curve
                "filled": self.filled,
                "meter": self.meter.state(),
                "hook": self.tools.hook.state() if self.tools.hook else {},
            }
            self.saver.save(int(state["step"]), part, meta)
        self.saved = time.monotonic()

    def _finish(self, state: State, feed: Feed | Epochs) -> None:
        """Enters the phase into the ledger; a kill between entry and checkpoint replaces the entry by itself."""
        with self.meter.clock.span("checkpoint"):  # the ledger waits for the disk
            self.tools.ledger.put(self._row(int(state["step"])))
        if self.saver:
            self._save(state, feed)
            with self.meter.clock.span("checkpoint"):
                self.saver.wait()
            self.tools.ledger.put(self._row(int(state["step"])))

    def _row(self, step: int) -> Row:
        """What was run of the phase, all of it unless the hook ended it, up to a step of the run."""
        run, program = self.run_, self.program
        cost = accounting.image_cost(program, run.dataset.images.size)
        shapes, _ = program.model.abstract()
        steps = step - run.timeline.first_step(self.number)
        images = len(run.train_rows) * (steps // run.timeline.steps_per_epoch)
        cached = self.filled.get("cached", "off")
        per_image = cost.suffix if cached != "off" else cost.prefix + cost.suffix
        fill = self.filled.get("flops", 0)
        row = Row(
            strategy=run.strategy,
            seed=run.seed,
            stage=run.stage,
            phase=run.label + program.phase.name,
            steps=steps,
            images=images,
            model_flops=per_image.model * images + fill,
            hardware_flops=per_image.hardware * steps * run.batch_size + fill,
            trainable_params=freezing.count(shapes, program.mask.trainable),
            total_params=freezing.count(shapes),
            cached=cached,
            reused_flops=self.filled.get("reused_flops", 0),
            reused_s=self.filled.get("reused_s", 0.0),
            peak_flops=self.tools.hardware.peak_for(program.model.dtype),
            curve=self.curve,
        )
        return self.meter.row(row)
