"""How the library is built, in figures: size, types, parameter lists, rooms and the imports between them, docstrings.

    python -m benchmarks.shell_measures [--root CHECKOUT] [--frames] [--no-imports] [--places MEASURE] [--json
    FILE]

Reads the syntax trees of `dapt_jax` in any checkout of this project, of whatever layout, and runs nothing of
it but for two
measures: `import dapt_jax` in fresh processes (median of 5), and with `--frames` a tiny study whose gradient
is wrapped, to count the frames of the library between `main` and the gradient. `--places` lists where a
measure finds what it counts, by the beginning of its name.

- Rooms, and the imports between them, are those of benchmarks/rooms.py.
- The *order* of the rooms is, if there is one, a tuple `ROOMS` in a file of tests/ (strings, or tuples of
  rooms of one level), else the map in CONTRIBUTING.md, a line a level, else that of benchmarks/rooms.py. An
  import *runs up* if what it imports is on an earlier level. A *circle* is a set of rooms each of which
  reaches all others.
- Parameters are counted without `self`, `cls`, `*args` and `**kwargs`.
- *Public* is what neither a leading underscore nor its module, class or enclosing function hides.
- An argument's text that *begins with a preposition* takes the argument's name for its noun ("seed: of the
  run.").
"""

import argparse
import ast
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.rooms import PACKAGE, Function, Module, circles, floors, imports, modules, order

WIDTH = 110
MANY = 7
PREPOSITIONS = re.compile(
    "(about|above|across|after|against|along|around|as|at|before|behind|below|beside|besides|between|by|during|for|from|in|"
    "into|of|on|over|past|per|since|through|to|under|until|with|within|without)\\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure and where it comes from.

    Attributes:
        name: What is measured.
        value: The figure, as it is shown.
        places: `file:line: what` of everything that was counted, where that is asked for.
    """

    name: str
    value: str
    places: Sequence[str] = ()


# ---- size, types, parameters
# ----------------------------------------------------------------------------------------


def sizes(library: Sequence[Module]) -> Iterator[Measure]:
    """Measure files and lines."""
    lines = {module.path: len(module.text.splitlines()) for module in library}
    longest = sorted(lines, key=lambda path: -lines[path])
    root = [module for module in library if len(module.path.parts) == 2 and module.room]
    yield Measure("library files", str(len(library)))
    yield Measure("lines", f"{sum(lines.values()):,}")
    yield Measure(
        "lines of a file, median / max",
        f"{statistics.median(lines.values()):.0f} / {max(lines.values())}",
        [f"{path}: {lines[path]} lines" for path in longest],
    )
    yield Measure("modules in the package root", str(len(root)), [str(module.path) for module in root])
    long = [
        f"{module.path}:{number}: {len(line)} columns"
        for module in library
        for number, line in enumerate(module.text.splitlines(), start=1)
        if len(line) > WIDTH
    ]
    full = sum(bool(line.strip()) for module in library for line in module.text.splitlines())
    yield Measure(
        f"lines over {WIDTH} columns", f"{len(long):,} ({len(long) / full:.1%} of non-blank lines)", long
    )


def signatures(library: Sequence[Module]) -> Iterator[Measure]:
    """Measure parameters and their types."""
    total, functions = 0, 0
    bare, long = [], []
    for module in library:
        for function, is_method, _ in module.functions:
            functions += 1
            named = _parameters(function, is_method)
            total += len(named)
            untyped = [parameter.arg for parameter in named if _is_any(parameter.annotation)]
            bare += [module.at(function, f"{function.name}({name}: Any)") for name in untyped]
            if len(named) >= MANY:
                long.append(module.at(function, f"{function.name}: {len(named)} parameters"))
    yield Measure("functions", f"{functions:,}")
    yield Measure("parameters typed bare `Any`", f"{len(bare)} of {total:,} ({len(bare) / total:.1%})", bare)
    yield Measure(
        f"functions with {MANY} or more parameters", f"{len(long)} ({len(long) / functions:.1%})", long
    )


def _parameters(function: Function, is_method: bool) -> list[ast.arg]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    is_static = any(
        isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list
    )
    if is_method and not is_static:
        named = named[1:]
    return named


def _is_any(annotation: ast.expr | None) -> bool:
    text = ast.unparse(annotation).strip("'\"") if annotation else ""
    return text in ("Any", "typing.Any")


# ---- rooms and imports
# ----------------------------------------------------------------------------------------------


def architecture(root: Path, library: Sequence[Module]) -> Iterator[Measure]:
    """Measure rooms, edges between them, imports that run up, circles."""
    edges = imports(library)
    rooms = {module.room for module in library if module.room}
    inner = {edge: places for edge, places in edges.items() if all(edge)}
    levels, source = order(root, rooms)
    unplaced = sorted(rooms - set(levels))
    up = {
        (above, below): places
        for (above, below), places in sorted(inner.items())
        if above in levels and below in levels and levels[above] > levels[below]
    }
    found = circles(inner)
    yield Measure("rooms", f"{len(rooms)} on {floors(rooms, inner)} floors" if not found else str(len(rooms)))
    yield Measure("order of the rooms", f"{len(set(levels.values()))} levels in {source}")
    yield Measure("rooms without a level", f"{len(unplaced)} {' '.join(unplaced)}".strip(), unplaced)
    shown = [f"{above} -> {below}" for above, below in sorted(inner)]
    yield Measure("import edges between rooms", str(len(inner)), shown)
    rising = [place for places in up.values() for place in places]
    yield Measure("edges that run up", f"{len(up)} ({len(rising)} imports)", rising)
    yield Measure("circles of rooms", str(len(found)), [" <-> ".join(circle) for circle in found])


# ---- docstrings
# -----------------------------------------------------------------------------------------------------


def documentation(library: Sequence[Module]) -> Iterator[Measure]:
    """Measure docstrings: whether there are any, their examples, how their arguments are described."""
    public, bare, examples, described, fragments = 0, [], [], 0, []
    for module in library:
        is_public_module = not any(
            part.startswith("_") and part != "__init__.py" for part in module.path.parts
        )
        for function, _, is_public in module.functions:
            if is_public and is_public_module:
                public += 1
                if not ast.get_docstring(function):
                    bare.append(module.at(function, function.name))
        for node in ast.walk(module.tree):
            if not isinstance(node, Function | ast.ClassDef | ast.Module) or not (
                text := ast.get_docstring(node)
            ):
                continue
            if ">>>" in text:
                examples.append(module.at(node, getattr(node, "name", "the module")))
            for name, said in _described(text):
                described += 1
                if PREPOSITIONS.match(said):
                    fragments.append(module.at(node, f"{name}: {said}"))
    with_one = public - len(bare)
    yield Measure(
        "public functions with a docstring", f"{with_one:,} of {public:,} ({with_one / public:.0%})", bare
    )
    yield Measure("docstrings with an example", str(len(examples)), examples)
    share = f"{len(fragments)} of {described:,} ({len(fragments) / max(described, 1):.0%})"
    yield Measure("argument docs that begin with a preposition", share, fragments)


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """The names under `Args:` and `Attributes:` of a docstring, each with its text."""
    inside = False
    for line in docstring.splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            inside = line in ("Args:", "Attributes:")
        elif line.strip() and not line.startswith(" "):
            inside = False
        elif inside and (entry := re.match(r"    (\*{0,2}\w+)(?: \(.*?\))?: (.+)", line)):
            yield entry[1], entry[2]


# ---- what has to be run
# ---------------------------------------------------------------------------------------------

IMPORT = "import time; began = time.perf_counter(); import {name}; print(time.perf_counter() - began)"

FRAMES = """
import json, os, sys, traceback, jax

def wrap(transform):
    def made(*given, **more):
        function = transform(*given, **more)
        def called(*arguments, **others):
            stack = traceback.extract_stack()[:-1]
            if not any(frame.name.startswith("make_jaxpr") for frame in stack):  # that is the FLOP count, not the training
                own = [f for f in stack if os.sep + "dapt_jax" + os.sep in f.filename and "site-packages" not in f.filename]
                frames = [f"{f.filename.rpartition('dapt_jax' + os.sep)[2]}:{f.name}" for f in own]
                print("FRAMES " + json.dumps(frames), flush=True)
                os._exit(0)
            return function(*arguments, **others)
        return called
    return made

jax.value_and_grad, jax.grad = wrap(jax.value_and_grad), wrap(jax.grad)
from dapt_jax.main import main
sys.exit(main(sys.argv))
"""
SETTINGS = "strategies=full adapt.head_epochs=0 adapt.epochs=1 transfer.baseline="
"""Settings of the study of which frames are counted: the first gradient is that of a step from images."""


def import_seconds(root: Path, name: str, rounds: int = 5) -> Measure:
    """Time an import in fresh processes."""
    command = [sys.executable, "-c", IMPORT.format(name=name)]
    taken = [
        float(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)
        for _ in range(rounds)
    ]
    return Measure(f"seconds of `import {name}`, median of {rounds}", f"{statistics.median(taken):.3f}")


def frames(root: Path, settings: str) -> Measure:
    """Count the frames of the library from `main` to the gradient of a training step, those that compile it included."""
    flags = [f"--config.{each}" for each in settings.split()]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-c",
            FRAMES,
            "--config=tests/configs/tiny_study.py",
            f"--workdir={folder}/run",
            *flags,
        ]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    line = next((line for line in ended.stdout.splitlines() if line.startswith("FRAMES ")), None)
    if line is None:
        raise SystemExit(f"no gradient was taken: {ended.stderr[-600:]}")
    stack = json.loads(line.removeprefix("FRAMES "))
    files = {frame.partition(":")[0] for frame in stack}
    return Measure("frames from main to the gradient", f"{len(stack)} in {len(files)} files", stack)


def main(arguments: list[str] | None = None) -> None:
    """Measure a checkout and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shell_measures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument(
        "--frames", action="store_true", help="run a tiny study and count frames to the gradient"
    )
    parser.add_argument("--frames-flags", default=SETTINGS, help="its settings")
    parser.add_argument("--no-imports", action="store_true", help="do not time imports")
    parser.add_argument(
        "--places", default="", help="also list what a measure counts; the beginning of its name"
    )
    parser.add_argument("--json", type=Path, help="file for the figures and all places")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    library = modules(root)
    if not library:
        raise SystemExit(f"no {PACKAGE}/ in {root}")
    measures = [*sizes(library), *signatures(library), *architecture(root, library), *documentation(library)]
    if not options.no_imports:
        measures += [import_seconds(root, name) for name in (PACKAGE, f"{PACKAGE}.main")]
    if options.frames:
        measures.append(frames(root, options.frames_flags))
    width = max(len(measure.name) for measure in measures)
    print(*(f"{measure.name:{width}}  {measure.value}" for measure in measures), sep="\n")
    for measure in measures:
        if options.places and measure.name.startswith(options.places):
            print("", f"{measure.name}:", *measure.places, sep="\n")
    if options.json:
        options.json.write_text(
            json.dumps([dataclasses.asdict(measure) for measure in measures], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
