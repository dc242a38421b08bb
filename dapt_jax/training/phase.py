"""One phase of a run: [compile], per epoch [steps, evaluate, save], then its row of the ledger."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from dapt_jax.data.decode import ImageStore
from dapt_jax.monitoring.metric_writer import Epoch
from dapt_jax.records.ledger import Row
from dapt_jax.runtime import processes, sharding
from dapt_jax.training import accounting, checkpoint, freezing, optim
from dapt_jax.training.cache.policy import Tier
from dapt_jax.training.cache.store import Activations, Prefix
from dapt_jax.training.evaluate import Evaluator
from dapt_jax.training.freezing import Tree
from dapt_jax.training.meter import Meter
from dapt_jax.training.recovery import Diverged
from dapt_jax.training.run import Run, RunContext
from dapt_jax.training.step_runners import Epochs, Feed, OnDevice, Streamed
from dapt_jax.training.steps import PhaseProgram, State, evaluation_params


class PhaseLoop:
    """One phase of a run."""

    def __init__(
        self, run: Run, number: int, meta: dict[str, Any], rolled: dict[str, Any], context: RunContext,
        saver: checkpoint.Checkpoints | None,
    ):  # fmt: skip
        self.run_, self.number, self.context, self.saver, self.rolled = run, number, context, saver, rolled
        self.program: PhaseProgram = run.programs[number]
        is_second_try = rolled.get("phase") == number
        if is_second_try and not meta:
            meta = {
                **rolled["spent"],
                "plateau": dataclasses.asdict(dataclasses.replace(run.plateau, scale=rolled["factor"])),
            }
        self.lost: int = rolled["steps"] if is_second_try else 0
        self.meter = Meter(context.hardware, meta.get("meter"))
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
            self.work_of_step = float(self.run_.flops_per_image(self.number) * self.run_.batch_size)
        epoch = timeline.position(int(state["step"])).epoch
        with self.context.preemption_handler.deferred():
            while epoch < end and not (self.context.hook and self.context.hook.ends):
                if isinstance(feed, Epochs):
                    state, count = self._many_epochs(state, epoch, end, feed, evaluator)
                else:
                    state, count = self._one_epoch(state, epoch, feed, evaluator), 1
                epoch += count
                if epoch < end:
                    self._save_if_due(state, feed)
            self._finish(state, feed)
        return state

    def replay(self, state: State) -> Iterator[State]:
        """The state after each step from here on; nothing is saved, and nobody is told."""
        steps, first = self.run_.timeline.steps_per_epoch, self.run_.timeline.position(int(state["step"])).epoch
        feed, evaluator = self._feed(state, stepwise=True)
        assert not isinstance(feed, Epochs)
        for epoch in range(first, self.run_.timeline.first_epoch(self.number + 1)):
            for stepped, _ in feed.epoch(
                state, epoch, int(state["step"]) - epoch * steps, self.plateau.scale, each=True
            ):
                state = stepped
                yield state
            if self.program.phase.schedule == "plateau":
                self.plateau.update(evaluator(state).get("val_loss", float(state["loss"]) / float(state["weight"])))
            state = self._zeroed(state)

    def _one_epoch(self, state: State, epoch: int, feed: Feed, evaluator: Evaluator) -> State:
        """The batches of an epoch that are left, then its evaluation."""
        steps = self.run_.timeline.steps_per_epoch
        began = since = time.monotonic()
        first_batch = int(state["step"]) - epoch * steps
        for stepped, done in feed.epoch(state, epoch, first_batch, self.plateau.scale):
            state = stepped
            self._check(float(state["loss"]), float(state["weight"]), int(state["step"]))
            self._tell(epoch, int(state["step"]), done, time.monotonic() - since)
            # An epoch's end is saved after its evaluation, so that no epoch is evaluated twice or never.
            if int(state["step"]) < (epoch + 1) * steps:
                self._save_if_due(state, feed)
            since = time.monotonic()
        sums = float(state["loss"]), float(state["weight"])
        trained_s = time.monotonic() - began
        with self.meter.clock.span("eval"):
            scores = evaluator(state)
        self._end_epoch(epoch, *sums, scores, (steps - first_batch) * self.run_.batch_size / max(trained_s, 1e-9))
        if self.context.hook:
            with self.meter.clock.span("eval"):
                params, batch_stats = evaluation_params(state), state["batch_stats"]
                if processes.is_multi_process() or self.context.mesh.shape[sharding.FSDP] > 1:
                    params, batch_stats = sharding.gather_to_host(
                        (params, batch_stats)
                    )  # a hook looks at them in this process alone
                self.context.hook.after_epoch(self.number, epoch, params, batch_stats, scores)
        return self._zeroed(state)

    def _zeroed(self, state: State) -> State:
        """The state at the start of an epoch."""
        return {**state, **sharding.replicate({"loss": np.float32(0), "weight": np.float32(0)}, self.context.mesh)}

    def _many_epochs(self, state: State, epoch: int, end: int, feed: Epochs, evaluator: Evaluator) -> tuple[State, int]:
        """Epochs that run as one program, and how many they were; a plateau decides on the rate after each."""
        most = 1 if self.program.phase.schedule == "plateau" else end - epoch
        since = time.monotonic()
        state, sums, logits = feed.epochs(state, epoch, most, self.plateau.scale)
        steps, seconds = self.run_.timeline.steps_per_epoch, time.monotonic() - since
        batches = len(sums) * steps
        self._tell(epoch + len(sums) - 1, int(state["step"]), batches, seconds)
        for number, ((loss, weight), watched) in enumerate(zip(sums, logits, strict=True), start=epoch):
            self._check(float(loss), float(weight), (number + 1) * steps)
            with self.meter.clock.span("eval"):
                scores = evaluator.scores(watched)
            speed = batches * self.run_.batch_size / max(seconds, 1e-9)
            self._end_epoch(number, float(loss), float(weight), scores, speed)
        return state, len(sums)

    def _tell(self, epoch: int, step: int, batches: int, seconds: float) -> None:
        """Shows what was done since the last time."""
        run, phase = self.run_, self.program.phase
        local = epoch - run.timeline.first_epoch(self.number) + 1
        doing = f"{run.title}  {phase.name} epoch {local}/{phase.epochs}"
        speed = batches * run.batch_size / max(seconds, 1e-9)
        self.context.reporter.advance(batches * self.work_of_step, doing, speed)
        at = {
            "phase": run.label + phase.name, "epoch": local, "epochs": phase.epochs, "step": step,
            "steps": run.timeline.steps,
        }  # fmt: skip
        done = (step - run.timeline.first_step(self.number)) * self.work_of_step + self.filled.get("flops", 0)
        key = [run.strategy, run.seed, run.stage, run.label + phase.name]
        self.context.heartbeat.at(at, {"key": key, "model_flops": done, **self.meter.spent()})

    def _feed(self, state: State, stepwise: bool = False) -> tuple[Feed | Epochs, Evaluator]:
        """Where the inputs come from; `stepwise` asks for steps that are each a program of their own."""
        run, program, context, clock = self.run_, self.program, self.context, self.meter.clock
        prefixes_to_compute = run.prefixes_to_compute(self.number)
        if prefixes_to_compute:
            context.reporter.advance(0, f"{run.title}  {program.phase.name}: computing the frozen prefix once")
            inputs = state["params"], state["batch_stats"], run.dataset.images
            with clock.span("cache"):
                activations, ran = self._compute_prefixes(prefixes_to_compute, *inputs)
                clean = activations
                prefix, place = prefixes_to_compute[-1]
                if activations and len(run.val_rows) and prefix != prefix.plain:
                    clean = context.store.get(prefix.plain, *inputs, place, clock=clock)
            if activations and clean:
                context.reporter.advance(ran, f"{run.title}  {program.phase.name}")
                if not self.filled:
                    alone = run.fill_flops(self.number)
                    spent = min(ran, alone)  # what a kill made run once more is not counted twice
                    self.filled = {
                        "cached": "filled" if spent else "reused",
                        "flops": spent,
                        "reused_flops": alone - spent,
                        "reused_s": activations.seconds if alone and not spent else 0.0,
                    }
                evaluator = Evaluator(run, program, clean, context.mesh)
                if not stepwise and Epochs.serve(program, activations):
                    return Epochs(run, program, context, clock, state, activations, clean), evaluator
                if activations.file is None:
                    return OnDevice(run, program, context, clock, state, activations), evaluator
                return Streamed(run, program, context, clock, state, self.position, activations), evaluator
        return Streamed(run, program, context, clock, state, self.position), Evaluator(run, program, None, context.mesh)

    def _compute_prefixes(
        self, prefixes_to_compute: list[tuple[Prefix, Tier]], params: Tree, batch_stats: Tree, images: ImageStore
    ) -> tuple[Activations | None, int]:
        """Computes what is missing of the frozen prefixes, each from the one below it.

        Returns:
            The activations that the phase trains on, None where they cannot be kept; and the FLOPs that were run.
        """
        base: tuple[int, Activations] | None = None
        found, ran = None, 0
        for prefix, place in prefixes_to_compute:
            found = self.context.store.get(prefix, params, batch_stats, images, place, base, self.meter.clock)
            if found:
                base, ran = (prefix.boundary, found), ran + found.ran
        return found, ran

    def _check(self, loss: float, weight: float, step: int) -> None:
        """Refuses to go on from a loss that is no number."""
        if not math.isfinite(loss):
            raise Diverged(step, loss / weight)

    def _end_epoch(self, epoch: int, loss: float, weight: float, scores: dict[str, float], speed: float) -> None:
        """Enters an epoch into the curve."""
        last_step = (epoch + 1) * self.run_.timeline.steps_per_epoch - 1
        rate = self.plateau.scale * self.program.rate(last_step)
        values = {"loss": loss / weight, "lr": rate, **scores}
        fell = {"rolled_back_from": self.rolled["step"]} if self.lost and not self.curve else {}
        self.curve.append({"epoch": epoch, **values, **fell})
        run, phase = self.run_, self.run_.label + self.program.phase.name
        told = {**values, "images_per_s": speed}
        self.context.heartbeat.epoch(Epoch(run.strategy, run.seed, run.stage, phase, epoch, last_step + 1, told))
        if self.program.phase.schedule == "plateau":
            self.plateau.update(scores.get("val_loss", loss / weight))

    def _save_if_due(self, state: State, feed: Feed | Epochs) -> None:
        given, is_due = processes.all_reduce_max(
            self.context.preemption_handler.signal_received, time.monotonic() - self.saved > self.context.every_s
        )
        if self.saver and (given or is_due):
            self._save(state, feed)
        self.context.preemption_handler.check(given)

    def _save(self, state: State, feed: Feed | Epochs) -> None:
        assert self.saver is not None
        self._check_state(state)
        with self.meter.clock.span("checkpoint"):
            part = checkpoint.saved_part(state, list(self.run_.programs), self.number)
            meta = {
                "position": feed.position(),
                "seed": self.run_.seed,
                "plateau": dataclasses.asdict(self.plateau),
                "curve": list(self.curve),  # written in the background, while epochs are added to the curve
                "filled": self.filled,
                "meter": self.meter.state(),
                "hook": self.context.hook.state() if self.context.hook else {},
                "rolled": self.rolled,
            }
            self.saver.save(int(state["step"]), part, meta)
        self.saved = time.monotonic()

    def _check_state(self, state: State) -> None:
        """Lets nothing but numbers into a checkpoint, or out of a phase: the last step's update has no loss yet."""
        if not sharding.all_finite(freezing.partition(state["params"], self.program.mask.trainable)[0]):
            raise Diverged(int(state["step"]), math.nan)

    def _finish(self, state: State, feed: Feed | Epochs) -> None:
        """Enters the phase into the ledger; a kill between entry and checkpoint replaces the entry by itself."""
        self._check_state(state)
        with self.meter.clock.span("checkpoint"):  # the ledger waits for the disk
            self.context.ledger.put(self._row(int(state["step"])))
        if self.saver:
            self._save(state, feed)
            with self.meter.clock.span("checkpoint"):
                self.saver.wait()
            self.context.ledger.put(self._row(int(state["step"])))

    def _row(self, step: int) -> Row:
        """What was run of the phase, all of it unless the hook ended it, up to a step of the run."""
        run, program = self.run_, self.program
        cost = accounting.image_cost(program, run.dataset.images.size)
        shapes, _ = program.model.abstract()
        # What was run before a rollback was run too, up to the step that made it necessary.
        own, per_epoch = step - run.timeline.first_step(self.number), run.timeline.steps_per_epoch
        steps = own + self.lost
        images = len(run.train_rows) * (own // per_epoch + self.lost // per_epoch)
        images += self.lost % per_epoch * run.batch_size
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
            peak_flops=self.context.hardware.peak_for(program.model.dtype),
            curve=self.curve,
        )
        return self.meter.row(row)
