"""A grid of studies: `--config=FILE:grid`, one workdir for each point, run one after the other.

`FILE` has a function `get_grid(workdir)` that returns the argument of `get_config` by name of the point. What
has finished is not run again, and a point that fails does not stop the others.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.formatting import number
from dapt_jax.records import typed
from dapt_jax.report import compare
from dapt_jax.runtime import atomic_files, home, preemption
from dapt_jax.settings import StudySettings, flags
from dapt_jax.settings.sources import StrategySpec
from dapt_jax.study import plan, prepare
from dapt_jax.weights import locate
from dapt_jax.weights.run_reference import ALL, SCHEME, RunReference

FILE = "grid.json"
"""Name of the file, in the grid's workdir, that says how each point ended."""

CACHE, COMPARED = "cache", "compared"
"""Folders of the grid itself in its workdir: the activations that points share, and the report over all of them."""
OWN = (FILE, CACHE, COMPARED)

STOPPED = (preemption.RESTART_CODE, 130)
"""Exit codes of a study that was told to stop."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A study of the grid.

    Attributes:
        name: Name of its workdir in that of the grid.
        arguments: Its command line: config, workdir and the flags of the grid.
    """

    name: str
    arguments: tuple[str, ...]


def points(grid: flags.Grid, workdir: Path) -> list[Point]:
    """Return the points of a grid that this shard runs, in the order of the file, pre-trainings first.

    A point belongs to shard 1 + (sha256 of its name mod n), so that it stays there when the grid grows; one
    whose argument names the workdir of another point belongs to that one's, and comes after it.

    Args:
        grid: The grid.
        workdir: Folder of the grid.

    Raises:
        UserError: The shard or a name is invalid, or no point belongs to the shard.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", grid.shard or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard={grid.shard}; expected I/N with I from 1 to N, such as 1/4")
    own, shards = int(match[1]) - 1, int(match[2])
    found = []
    families = _families(grid, workdir)
    for name in sorted(grid.choices, key=lambda name: families[name][0]):
        choice = grid.choices[name]
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"{grid.file}: a point is named {name!r}; expected letters, digits and . _ + -")
        if not name.strip(".") or name in OWN:
            raise UserError(
                f"{grid.file}: a point is named {name!r}, and its workdir would be {workdir / name}; expected another "
                f"name than {', '.join(OWN)} and dots alone, which are the grid's own"
            )
        if int.from_bytes(hashlib.sha256(families[name][1].encode()).digest()[:8]) % shards == own:
            shared = () if any(flag.startswith("--config.cache.dir") for flag in grid.flags) else (
                f"--config.cache.dir={workdir / CACHE}",
            )  # fmt: skip
            config = f"--config={grid.file}:{choice}"
            found.append(Point(name, (config, f"--workdir={workdir / name}", *shared, *grid.flags)))
    if not found:
        raise UserError(f"--shard={grid.shard}: none of {len(grid.choices)} points belongs to it")
    return found


def _families(grid: flags.Grid, workdir: Path) -> dict[str, tuple[int, str]]:
    """Return by point how many others come before it, each taking weights of the one before, and its family.

    A point takes weights of those whose workdirs its argument names. A family is all points that are so
    connected, and is called by the first name of those that take no weights.
    """
    makers = {name: _makers(grid, workdir, name) for name in grid.choices}
    depths = dict.fromkeys(makers, 0)
    families = {name: {name} for name in makers}
    for _ in makers:  # as many rounds as the longest chain could need
        before = dict(depths)
        for name, named in makers.items():
            depths[name] = max((depths[maker] + 1 for maker in named), default=0)
            for maker in named:
                families[name] |= families[maker]
                for each in families[name]:
                    families[each] = families[name]
        if depths == before:
            break
    roots = {name: [each for each in families[name] if not makers[each]] or families[name] for name in makers}
    return {name: (depths[name], min(roots[name])) for name in makers}


def _makers(grid: flags.Grid, workdir: Path, name: str) -> list[str]:
    """Return the points whose workdirs the argument of a point names."""
    choice = grid.choices[name]
    return [
        each
        for each in grid.choices
        if each != name and re.search(rf"(?<![\w.+/-]){re.escape(str(workdir / each))}(?![\w.+-])", choice)
    ]


def show(grid: flags.Grid, workdir: Path) -> int:
    """Print what each point costs and whether it has finished, and the sum; return the exit code.

    A point that takes weights of another one that has not run is planned with random weights in their place.
    """
    table = Table()
    for column in ("study", "arms", "adaptations", "TFLOP", "state"):
        table.add_column(column, justify="left" if column in ("study", "state") else "right")
    ended, total, adapting_flops, adaptations, unknown, waiting = _ended(workdir), 0, 0, 0, 0, 0
    makers = {(workdir / point.name).resolve(): point for point in points(_whole(grid), workdir)}
    costs: dict[str, _Cost] = {}
    for point in points(grid, workdir):
        state = _state(ended.get(point.name), point)
        try:
            planned = dataclasses.replace(_settings(point), mode="plan")
            settings, awaited = _with_stand_ins(planned, makers)
            state += f", after {', '.join(awaited)}" if awaited else ""
            key = _what_costs(settings)
            if key not in costs:
                costs[key] = _cost(settings)
        except UserError as error:
            unknown += 1
            table.add_row(point.name, "-", "-", "-", f"{state}: {error}")
            continue
        cost = costs[key]
        flops = cost.adapting + cost.transfer
        adapting_flops, waiting = adapting_flops + cost.adapting, waiting + bool(awaited)
        total, adaptations = total + flops, adaptations + cost.adaptations
        table.add_row(point.name, str(cost.arms), str(cost.adaptations), number(flops / 1e12), state)
    console = Console(width=None if Console().is_terminal else 150)
    shard = f", shard {grid.shard}" if grid.shard else ""
    console.print(f"{grid.file}: {len(grid.choices)} studies{shard}", soft_wrap=True, markup=False)
    console.print(table)
    line = f"grid: {adaptations} adaptations of {number(adapting_flops / 1e12)} TFLOP, "
    line += f"{number(total / 1e12)} TFLOP in all"
    line += f"; {waiting} studies take the weights of another" if waiting else ""
    if unknown:
        line += f"; {unknown} studies cannot be planned yet, see their lines"
    console.print(line, soft_wrap=True)
    return 0


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Cost of a study of the grid.

    Attributes:
        arms: Number of its arms.
        adaptations: Number of runs that adapt an encoder.
        adapting: Model FLOPs of these.
        transfer: Model FLOPs of the target tasks.
    """

    arms: int
    adaptations: int
    adapting: int
    transfer: int


def _what_costs(settings: StudySettings) -> str:
    """Return all that the cost of a study depends on: its settings, but of weights that are not read the input.

    A plan reads no weights that would have to be downloaded. All that is known of these is the normalisation
    of the images and where the encoder is cut, so that studies that differ in nothing else are planned once.

    Raises:
        UserError: Weights cannot be named so.
    """
    encoder = settings.model.encoder()

    def anonymous(weights: str) -> str:
        if not weights or (weights != locate.RANDOM and locate.is_here(weights, encoder.name)):
            return weights
        return repr(locate.fitted(weights, encoder, settings.model.preprocess, may_read=False).preprocess)

    specs = {
        name: dataclasses.replace(spec, weights=anonymous(spec.weights))
        for name, spec in settings.custom_strategies.items()
    }
    return repr(
        dataclasses.replace(
            settings, name="", title="", weights=anonymous(settings.weights), custom_strategies=specs
        )
    )


def _cost(settings: StudySettings) -> _Cost:
    """Return the cost of a study that is yet to be prepared.

    Raises:
        UserError: The study cannot be planned.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what the plan of this study alone says
        study = prepare.prepare(settings)
    adapting = [arm for arm in study.arms_of(study.settings.seeds[0]) if study.corpus_of(arm) is not None]
    seeds = len(study.settings.adaptation_seeds)
    if study.settings.compute_budget:
        of_budgets = sum(map(study.budget_flops, study.settings.seeds))
        of_tasks = plan.work_of(study, study.arms) - of_budgets
        return _Cost(len(study.arms), len(adapting) * seeds, of_budgets, of_tasks)
    transfer = sum(plan.checkpoint_flops(study, arm) for arm in study.arms)
    for task in study.tasks:
        # Arms of one encoder and split train on the same rows of a task at the same cost.
        kinds = [(arm.strategy.encoder, arm.seed if task.split_seed is None else -1) for arm in study.arms]
        one = dict(zip(kinds, study.arms, strict=True))
        transfer += sum(
            number_of * sum(plan.transfer_flops(study, one[kind], task).values())
            for kind, number_of in Counter(kinds).items()
        )
    return _Cost(
        arms=len(study.arms),
        adaptations=len(adapting) * seeds,
        adapting=sum(plan.adaptation_flops(study, arm) for arm in adapting) * seeds,
        transfer=transfer,
    )


def run(grid: flags.Grid, workdir: Path, run_study: Callable[[Sequence[str]], int]) -> int:
    """Run the points that have not finished, and write one report over all that have results.

    Args:
        grid: The grid.
        workdir: Folder of the grid.
        run_study: Function from the arguments of a study to its exit code.

    Returns:
        0; 2 where a point failed; the code of a study that was told to stop, where the grid stops too.
    """
    own = points(grid, workdir)
    for place, point in enumerate(own, start=1):
        if _state(_ended(workdir).get(point.name), point) == "finished":
            continue
        print(f"grid: {point.name}, {place} of {len(own)}", flush=True)
        try:
            code = run_study(point.arguments)
        except Exception:  # a defect in one study must not end the others
            traceback.print_exc()
            code = 1
        if code in STOPPED:
            return code
        ended = {**_ended(workdir), point.name: {"code": code, "arguments": list(point.arguments)}}
        atomic_files.write_text(workdir / FILE, json.dumps(ended, indent=1) + "\n")
    ended = _ended(workdir)
    states = {point.name: _state(ended.get(point.name), point) for point in own}
    table = Table()
    table.add_column("study")
    table.add_column("state")
    for name, state in states.items():
        table.add_row(name, state)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    finished = sum(state == "finished" for state in states.values())
    console.print(f"{grid.file}: {finished} of {len(own)} finished", soft_wrap=True, markup=False)
    _report(grid, workdir)
    return 0 if all(state == "finished" for state in states.values()) else EXIT_CODE


def _report(grid: flags.Grid, workdir: Path) -> None:
    """Write one report over the studies with results; print why not where they cannot be compared."""
    files = [workdir / name / "results.jsonl" for name in grid.choices]
    # A pre-training without target tasks has none.
    having = [str(file.parent) for file in files if file.exists() and file.stat().st_size]
    if len(having) < 2:
        return
    try:
        compare.build(having, workdir / COMPARED)
        print(f"report: {workdir / COMPARED / 'report.html'}")
    except UserError as error:
        print(f"no report over all studies: {error}")


def _whole(grid: flags.Grid) -> flags.Grid:
    """Return the grid without its division into shards."""
    return dataclasses.replace(grid, shard="")


def _with_stand_ins(settings: StudySettings, makers: Mapping[Path, Point]) -> tuple[StudySettings, list[str]]:
    """Return settings with random weights in place of those that a point of the grid has yet to make.

    Costs do not depend on the weights. `epoch=all` becomes as many strategies as that point will keep epochs.

    Args:
        settings: Settings of a point.
        makers: Points by their workdirs.

    Returns:
        The settings, and the names of the points that have to run first.
    """
    awaited: list[str] = []

    def maker(weights: str) -> Point | None:
        if not weights.startswith(SCHEME):
            return None
        reference = RunReference.of(weights)
        point = makers.get(home.expanded(reference.workdir).resolve())
        if point is None or any((home.expanded(reference.workdir) / "checkpoints").glob("*-seed*/*")):
            return None
        awaited.append(point.name)
        return point

    specs: dict[str, StrategySpec] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name, spec in settings.custom_strategies.items():
        point = maker(spec.weights)
        if point is None:
            specs[name] = spec
            continue
        stand_in = dataclasses.replace(spec, weights=locate.RANDOM)
        is_all = RunReference.of(spec.weights).epoch == ALL
        kept = _kept_epochs(_settings(point)) if is_all else ()
        names[name] = tuple(f"{name}-epoch{number}" for number in kept) or (name,)
        specs |= dict.fromkeys(names[name], stand_in)
    listed = tuple(each for name in settings.strategies for each in names.get(name, (name,)))
    weights = settings.weights if maker(settings.weights) is None else locate.RANDOM
    changed = dataclasses.replace(settings, weights=weights, strategies=listed, custom_strategies=specs)
    return changed if awaited else settings, list(dict.fromkeys(awaited))


def _kept_epochs(settings: StudySettings) -> tuple[int, ...]:
    """Return the epochs that the first strategy of a pre-training will keep."""
    spec = settings.custom_strategies.get(settings.strategies[0])
    epochs = sum(phase.epochs for phase in spec.phases) if spec and spec.phases else settings.adapt.epochs
    return tuple(sorted(number for number in settings.adapt.kept_epochs(epochs) if number <= epochs))


def _settings(point: Point) -> StudySettings:
    return flags.parse(point.arguments)[0]


def _ended(workdir: Path) -> dict[str, Any]:
    return typed.read_object(workdir / FILE) if (workdir / FILE).exists() else {}


def _state(ended: Mapping[str, Any] | None, point: Point) -> str:
    """Return how a point ended, as a word; of other arguments it has not run yet."""
    if ended is None or ended.get("arguments") != list(point.arguments):
        return "to run"
    return "finished" if ended.get("code") == 0 else f"failed (exit code {ended.get('code')})"
