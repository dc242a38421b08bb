"""Ahead-of-time compilation of a study's steps for a TPU topology: costs, and the largest batch that fits."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from dapt_jax import ops
from dapt_jax.aot import collectives, topology
from dapt_jax.aot.compile import Compiled, abstract_arguments, compile_phase, for_tpus, phase_function
from dapt_jax.cost import hardware
from dapt_jax.cost.hardware import Hardware
from dapt_jax.errors import UserError
from dapt_jax.formatting import number
from dapt_jax.runtime import atomic_files, sharding
from dapt_jax.settings import StudySettings
from dapt_jax.study import prepare
from dapt_jax.training import accounting, freezing
from dapt_jax.training.run import TrainingRun
from dapt_jax.training.steps import PhaseProgram

FILE = "aot.json"
"""Name of the file of figures in a workdir."""

MOST_IMAGES = 1 << 16
"""Images per step above which the search for larger batches stops."""


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that fits.

    Attributes:
        batch_size: Batch size over all chips; 0 where none was found that fits.
        refused: Smallest batch size found not to fit; 0 where all fitted.
        compilations: Number of compilations that the search took.
    """

    batch_size: int
    refused: int
    compilations: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a phase on one topology: see `Compiled`.

    Attributes:
        strategy: Name of the strategy.
        phase: Name of the phase.
        function: Function of `PhaseProgram` that is compiled; `cached_epochs` runs all steps of an epoch, and
            its figures here are per step.
        batch_size: Batch size over all chips.
        trainable: Bytes of trainable parameters.
        frozen: Bytes of frozen parameters.
        model_flops: Model FLOPs of a step, over all chips.
        hardware_flops: The same, including recomputation.
        compiled: Figures of the compiler.
        steps: Optimizer steps per run of the program, over which the compiler's figures extend.
        times: Lower bounds in seconds by resource: `arithmetic`, `memory`, `interconnect`; empty where the
            chip's figures are unknown or the step does not fit.
        largest: Largest batch that fits; None where it was not searched for.
    """

    strategy: str
    phase: str
    function: str
    batch_size: int
    trainable: int
    frozen: int
    model_flops: int
    hardware_flops: int
    compiled: Compiled
    steps: int
    times: dict[str, float]
    largest: Largest | None

    @property
    def bound(self) -> str:
        """Resource with the longest time."""
        return max(self.times, key=lambda name: self.times[name], default="")

    @property
    def roofline_s(self) -> float:
        """Lower bound on the seconds of a step."""
        return max(self.times.values(), default=0.0)

    @property
    def intensity(self) -> float:
        """FLOPs of the step per byte of memory traffic."""
        moved = self.compiled.traffic * self.compiled.devices / self.steps
        return self.hardware_flops / moved if moved else 0.0

    def totals(self) -> list[collectives.Total]:
        """Return the collectives of a run of the program by kind."""
        return collectives.totals(self.compiled.collectives)

    def as_json(self) -> dict[str, Any]:
        """Return every figure as plain JSON values: bytes and FLOPs as integers, times in seconds."""
        values = dataclasses.asdict(self)
        values["compiled"]["collectives"] = [dataclasses.asdict(each) for each in self.totals()]
        values["compiled"]["sent"] = sum(each.sent for each in self.compiled.collectives)
        return {
            **values, "fits": self.compiled.fits, "intensity": self.intensity, "bound": self.bound,
            "roofline_s": self.roofline_s,
        }  # fmt: skip


def largest_batch(
    measure: Callable[[int], Compiled], first: int, unit: int, capacity: int, compilations: int
) -> Largest:
    """Search for the largest batch that fits, with few compilations.

    Memory grows about linearly with the batch: a line through the two known batches nearest to the limit
    gives the next candidate. Once a batch that does not fit is known, every other candidate is a bisection
    instead, since near the limit a compiler trades work for memory, and the growth is no longer linear.

    Args:
        measure: Function that compiles for a batch size.
        first: Batch size that is compiled already, and therefore costs no compilation.
        unit: Batch sizes are multiples of this number.
        capacity: Bytes of memory; replaced by the compiler's figure as soon as it reports one.
        compilations: Maximum number of compilations.
    """
    known: dict[int, int] = {}
    low, high = 0, 0
    most = max(MOST_IMAGES // unit, 1) * unit
    place, looks_between = first, 0
    while True:
        compiled = measure(place)
        known[place] = compiled.needed
        capacity = compiled.available or capacity
        low, high = (max(low, place), high) if compiled.fits else (low, min(high or place, place))
        spent = len(known) - 1
        if spent >= compilations or low >= most or (high and high - low <= unit):
            return Largest(low, high, spent)
        looks_between += high > 0
        is_halving = looks_between > 0 and looks_between % 2 == 0
        looked = (low + high) / 2 if is_halving else _meeting(known, capacity, otherwise=4 * low or high / 4)
        place = min(max(int(looked) // unit * unit, low + unit), high - unit if high else most)


def _meeting(known: dict[int, int], capacity: int, otherwise: float) -> float:
    """Return where the line through the two known batches nearest to the limit reaches the limit."""
    told = sorted((abs(needed - capacity), batch) for batch, needed in known.items() if needed)
    if len(told) < 2:
        return otherwise
    one, other = sorted(batch for _, batch in told[:2])
    slope = (known[other] - known[one]) / (other - one)
    return one + (capacity - known[one]) / slope if slope > 0 else otherwise


def times(run: TrainingRun, flops: int, compiled: Compiled, steps: int, chips: Hardware) -> dict[str, float]:
    """Return lower bounds of a step's seconds, one per resource, each at its published peak and alone.

    Args:
        run: The run, which determines the dtype of arithmetic.
        flops: FLOPs of a step, over all chips.
        compiled: The compiled program.
        steps: Optimizer steps per run of the program.
        chips: Figures of the chips, all together.

    Returns:
        Seconds by resource; empty where the program does not fit or the chips' figures are unknown.
    """
    peak = chips.peak_for(run.programs[0].model.dtype)
    if not (compiled.fits and peak and chips.bandwidth and chips.interconnect):
        return {}
    return {
        "arithmetic": flops / peak,
        "memory": compiled.traffic / steps / chips.bandwidth,
        "interconnect": sum(each.sent for each in compiled.collectives) / steps / chips.interconnect,
    }


class Compiler:
    """Compiler of phases for a topology; identical phases share one compilation."""

    def __init__(
        self, mesh: Mesh, chips: Hardware, compilations: int, say: Callable[[str], None], norm_groups: int = 1
    ):
        """Start with nothing compiled.

        Args:
            mesh: Mesh of the topology's devices.
            chips: Figures of these devices.
            compilations: Maximum compilations in the search for a phase's largest batch; 0 for no search.
            say: Function that receives a line about each compilation.
            norm_groups: See `for_tpus`.
        """
        self._mesh, self._chips, self._compilations, self._say = mesh, chips, compilations, say
        self._norm_groups = norm_groups
        self._compiled: dict[Hashable, Compiled] = {}
        self._largest: dict[Hashable, Largest] = {}

    def steps(self, run: TrainingRun) -> Iterator[Step]:
        """Yield a step of each phase of a run."""
        run = for_tpus(run, self._norm_groups)
        for place, program in enumerate(run.programs):
            yield self._step(run, place, program)

    def _step(self, run: TrainingRun, place: int, program: PhaseProgram) -> Step:
        compiled = self._of(run, place)
        cost = accounting.image_cost(program, run.dataset.images.size)
        parts = cost.suffix if run.cache_decision(program).cached else cost.prefix + cost.suffix
        function = phase_function(run, place).__name__
        steps = run.padded_steps if function == "cached_epochs" else 1
        flops = parts.hardware * run.batch_size
        shapes, _ = program.model.abstract()
        train = freezing.count(shapes, program.mask.trainable)
        return Step(
            strategy=run.tag.strategy,
            phase=run.tag.label + program.phase.name,
            function=function,
            batch_size=run.batch_size,
            trainable=4 * train,
            frozen=4 * (freezing.count(shapes) - train),
            model_flops=parts.model * run.batch_size,
            hardware_flops=flops,
            compiled=compiled,
            steps=steps,
            times=times(run, flops, compiled, steps, self._chips),
            largest=self._largest_of(run, place) if self._compilations else None,
        )

    def _key(self, run: TrainingRun, place: int) -> Hashable:
        shapes = jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract_arguments(run, place, self._mesh)
        )
        return run.programs[place].key, phase_function(run, place).__name__, str(shapes)

    def _of(self, run: TrainingRun, place: int) -> Compiled:
        with ops.formulation("lax"):
            key = self._key(run, place)
        if key not in self._compiled:
            compiled = self._compiled[key] = compile_phase(run, place, self._mesh)
            name = f"{run.tag.strategy}/{run.tag.label}{run.programs[place].phase.name}"
            words = "fits" if compiled.fits else f"does not fit: {_mib(compiled.needed)} MiB"
            self._say(
                f"{name}, {run.batch_size} images a step: compiled in {compiled.seconds:.0f} s, {words}"
            )
        return self._compiled[key]

    def _largest_of(self, run: TrainingRun, place: int) -> Largest:
        key = (self._key(run, place), "largest")
        if key not in self._largest:

            def measure(batch: int) -> Compiled:
                return self._of(dataclasses.replace(run, batch_size=batch), place)

            unit = self._mesh.size * run.grad_accum_steps
            self._largest[key] = largest_batch(
                measure, run.batch_size, unit, self._chips.memory_bytes or 0, self._compilations
            )
        return self._largest[key]


def show(settings: StudySettings, workdir: Path | None) -> None:
    """Compile every strategy's phases, print a table of each, and write `aot.json` into the workdir, if any.

    Args:
        settings: Settings of the study.
        workdir: Folder of `aot.json`; None to write none.

    Raises:
        UserError: The topology does not exist, the batch does not divide among its chips, or no strategy
            adapts.
    """
    # JAX cannot read back its cached programs for devices that do not exist.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = topology.devices(settings.aot.topology)
    mesh = sharding.make_mesh(devices, settings.runtime.fsdp)
    chips = hardware.lookup(devices[0].device_kind, len(devices), "tpu")
    try:
        sharding.check_batch(settings.adapt.batch_size, settings.adapt.grad_accum_steps, len(devices))
    except UserError as error:
        raise UserError(f"adapt.{error}") from error
    # Settings for the topology alone are left out, so that the study can be read and checked on this machine.
    runtime = dataclasses.replace(settings.runtime, fsdp=1)
    study = prepare.prepare(dataclasses.replace(settings, runtime=runtime))
    console = Console(width=None if Console().is_terminal else 150, markup=False, emoji=False)
    groups = len(devices) if settings.model.batch_norm_statistics == "per_device" else 1
    compiler = Compiler(
        mesh, chips, settings.aot.compilations, lambda line: console.print(line, soft_wrap=True), groups
    )
    compiled: list[Step] = []
    for arm in study.arms_of(settings.seeds[0]):
        if study.corpus_of(arm):
            steps = [step for run in study.runs_of(arm) for step in compiler.steps(run)]
            compiled += steps
            console.print(_table(arm.name, steps, chips))
    if not compiled:
        raise UserError(
            f"strategies {', '.join(settings.strategies)}: none adapts, so there is no step; "
            "expected such as 'full'"
        )
    console.print(_footnote(settings.aot.topology, chips, compiled), soft_wrap=True)
    if workdir:
        figures = json.dumps(_figures(settings.aot.topology, mesh, chips, compiled), indent=1) + "\n"
        atomic_files.write_text(workdir / FILE, figures)
        console.print(f"figures: {workdir / FILE}", soft_wrap=True)


def _figures(name: str, mesh: Mesh, chips: Hardware, steps: list[Step]) -> dict[str, Any]:
    return {
        "topology": name,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "libtpu": topology.version(),
        "chip": {
            "kind": chips.kind,
            "peak_flops": chips.peak_flops,
            "bandwidth": chips.bandwidth,
            "memory_bytes": chips.memory_bytes,
            "interconnect": chips.interconnect,
            "sources": hardware.TPU_SOURCES,
        },
        "steps": [each.as_json() for each in steps],
    }


def _table(strategy: str, steps: list[Step], chips: Hardware) -> Table:
    table = Table(title=f"{strategy}: a step on {chips.count} x {chips.kind}", title_justify="left")
    table.add_column("phase")
    for column in (
        "images", "GFLOP", "XLA's", "HBM MiB", "state", "between", "collectives", "MiB", "FLOP/byte",
        "FLOP ms", "HBM ms", "links ms", "fits", "largest",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=column in ("collectives", "largest"))
    for each in steps:
        compiled, memory = each.compiled, each.compiled.memory
        totals = each.totals()
        table.add_row(
            f"{each.phase}\n{each.function}",
            f"{each.batch_size:,}",
            number(each.model_flops / 1e9),
            number(compiled.flops / 1e9) if memory else "-",
            _mib(compiled.needed),
            _mib(memory.arguments) if memory else "-",
            _mib(memory.temporaries) if memory else "-",
            "\n".join(f"{number(kind.count / each.steps)} {kind.kind}" for kind in totals) or "-",
            "\n".join(number(kind.bytes / each.steps / 2**20) for kind in totals) or "-",
            number(each.intensity) if memory else "-",
            *(_time(each, name) for name in ("arithmetic", "memory", "interconnect")),
            "yes" if compiled.fits else "no",
            _batch(each.largest),
        )
    return table


def _time(step: Step, name: str) -> str:
    """Return the milliseconds of one resource; an asterisk marks the slowest resource."""
    if name not in step.times:
        return "-"
    return number(step.times[name] * 1e3) + ("*" if name == step.bound else "")


def _batch(largest: Largest | None) -> str:
    if largest is None:
        return "-"
    if not largest.batch_size:
        return f"below {largest.refused:,}"
    above = f"\n< {largest.refused:,}" if largest.refused else "\nor more"
    return f"{largest.batch_size:,}{above}"


def _footnote(name: str, chips: Hardware, steps: list[Step]) -> str:
    """Return the explanation of the figures and their limits."""
    capacity = f"{_mib(chips.memory_bytes)} MiB of HBM" if chips.memory_bytes else "HBM of unknown size"
    lines = [
        f"{name}: {capacity} a chip, of which the compiler keeps a little for itself. GFLOP: of the step's "
        "matrix products over all chips, a multiply-accumulate is 2; XLA's: of all operations of one chip, "
        "the bodies of loops once. HBM of one chip: the state and what else a step is given, and what lives "
        "between. A step takes at least the time marked *: the longest of arithmetic, HBM and links between "
        "chips, each alone and at its published best. Largest: the largest batch over all chips that was "
        "compiled and fits; after < the smallest found that does not."
    ]
    if unknown := sorted({each.phase for each in steps if each.compiled.unknown_loops}):
        lines.append(
            f"Loops whose trips the compiler could not tell are counted once in {', '.join(unknown)}."
        )
    return " ".join(lines)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"
