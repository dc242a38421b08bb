"""Command-line parsing: flags override the settings of the config file."""

import ast
import dataclasses
import inspect
import itertools
import linecache
import re
import runpy
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from dapt_jax.errors import UserError, nearest
from dapt_jax.fields import Constraint
from dapt_jax.records.renamed import RENAMED
from dapt_jax.runtime import home
from dapt_jax.settings import names
from dapt_jax.settings.defaults import OPEN, declared, default, flat, resolve, several_names, to_dict
from dapt_jax.settings.schema import StudySettings

NEED_NO_FILE = (
    "--config.mode=models",
    "--config.mode=status",
    "--config.mode=report",
    "--config.mode=compare",
    "--config.mode=predict",
)
NAMES_A_MODEL = "--config.predict.model="
"""A flag with which `mode=export` needs no file either: target models say themselves what they are."""
_LINE = 110
_COMMA = re.compile(r",(?!(?:strategy|seed|epoch)=)")
"""Between values; the commas of one `run:WORKDIR@strategy=full,seed=0` are not."""
USAGE = """\
python -m dapt_jax.main --config=FILE[:CHOICE] --workdir=FOLDER [--config.SETTING=VALUE ...]

  --config=FILE           a Python file with get_config(), such as configs/quickstart.py; CHOICE is passed to it
  --workdir=FOLDER        where the study's results are, or will be; the same command goes on where it stopped;
                          gs://, s3:// and whatever fsspec opens too
  --config.mode=data      what it reads, set by set, and what it would warn of or refuse, without training;
                          with pictures in the workdir's data.html
  --config.mode=plan      what the study would cost, without running it
  --config.mode=score     transferability scores of any checkpoints on the target sets, without training
  --config.mode=aot       what its steps would take of a TPU topology, compiled ahead of time (docs/aot.md;
                          needs no workdir)
  --config.mode=models    the models: parameters, FLOPs, layer groups, known weights (needs no FILE)
  --config.mode=status    how far the study in the workdir is, from another terminal (needs no FILE)
  --config.mode=report    tables and figures again from results.jsonl and ledger.jsonl (needs no FILE)
  --config.mode=compare   one report over the workdirs of --config.compare=A,B or NAME=A,NAME=B (needs no FILE)
  --config.mode=export    the adapted encoders for PyTorch, orbax and StableHLO, each with its card
                          (with --config.predict.model=MODELS: target models as StableHLO and for timm)
  --config.mode=predict   target models on new images: probabilities or masks, streamed, in the workdir's predict/
                          (needs no FILE and none of the study's data; docs/predict.md)
  --config.SETTING=VALUE  any setting of the config; several values are joined by commas (--config.seeds=0,1,2)

  --config=FILE:grid      the studies of get_grid(workdir) in FILE, run or planned one after the other, in folders of
                          --workdir; --shard=1/4 takes a quarter of them

In the environment:

  DAPT_JAX_ALLOCATOR=off          starts no second process with glibc's memory settings for XLA:CPU
  JAX_COMPILATION_CACHE_DIR=DIR   where compiled programs are kept (else in the user's cache folder)
"""


def usage() -> str:
    """Return the text of `--help`: the flags, and every setting with its default and description."""
    constraints = declared()
    settings = [
        _described(name, value, constraints.get(name))
        for name, value in flat(to_dict(StudySettings())).items()
    ]
    open_ones = [_described(name, "...", constraints[name]) for name in OPEN if name in constraints]
    title = "Settings, their defaults, and what they do (docs/data_sets.md says what corpus and tasks take):"
    return "\n".join([USAGE, title, "", *settings, *open_ones])


def _described(name: str, value: object, constraint: Constraint | None) -> str:
    """Return a setting's lines in `--help`."""
    line = f"  --config.{name}={_shown(value)}"
    if constraint is None:
        return line
    valid = " | ".join(each or "''" for each in constraint.choices) or constraint.range
    words = f"{constraint.doc} ({valid})" if valid else constraint.doc
    return "\n".join([line, *textwrap.wrap(words, _LINE, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(arguments: Sequence[str]) -> tuple[StudySettings, str | None]:
    """Parse a command line.

    Args:
        arguments: Command-line arguments, without the program's name.

    Returns:
        The settings, and the workdir, a path or a URL, if given.

    Raises:
        UserError: The arguments or the config file are invalid.
    """
    spec, rest = _take_config(arguments)
    config = read(spec) if spec else default()
    known = flat(config)
    _check_names(rest, known)
    rest = [_quoted(argument, known) for argument in _joined(rest, known)]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", *rest])
        workdir = flags.DEFINE_string("workdir", None, "Folder of the study's results.", flag_values=values)
        strays = values(["", *rest])[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_value(str(error), known)) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_one_line(error)) from error
    if strays:
        raise UserError(
            f"unexpected argument {strays[0]!r}; expected --workdir=FOLDER or --config.SETTING=VALUE"
        )
    flag: Any = values["config"]
    for name, value in flag.override_values.items():
        if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
            parts = tuple(part.strip() for each in value for part in _COMMA.split(each) if part.strip())
            flag.value.update_from_flattened_dict({name: parts})
    return resolve(flag.value), workdir.value or None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of studies of one config file.

    Attributes:
        file: The config file.
        choices: Argument of its `get_config` by name of the study.
        flags: Further flags, which every study gets.
        shard: Part of the studies that is run, `I/N`; empty for all.
    """

    file: str
    choices: dict[str, str]
    flags: tuple[str, ...]
    shard: str


def grid(arguments: Sequence[str], workdir: str | None) -> Grid | None:
    """Return the grid of `--config=FILE:grid`; None where the choice is another, or the file has no grid.

    Args:
        arguments: Command-line arguments, without the program's name.
        workdir: Folder of the grid.

    Raises:
        UserError: The file cannot be read, or its grid is no mapping of names to choices.
    """
    specs = [each.partition("=")[2] for each in arguments if each.startswith(("--config=", "-config="))]
    path, _, choice = specs[0].partition(":") if len(specs) == 1 else ("", "", "")
    if choice != "grid" or not Path(path).is_file():
        return None
    try:
        get_grid = runpy.run_path(path).get("get_grid")
        if not callable(get_grid):
            raise UserError(
                f"{path}: no function get_grid(workdir); expected one that returns choices by name"
            )
        choices = get_grid(home.expanded(workdir or "runs"))
    except UserError:
        raise
    except Exception as error:  # a config file is the user's code and may raise anything
        raise UserError(_failure(path, error)) from error
    if not isinstance(choices, dict) or not all(isinstance(e, str) for pair in choices.items() for e in pair):
        raise UserError(f"{path}: get_grid() returned {choices!r:.80}; expected choices by name, both text")
    own = ("--config=", "-config=", "--workdir", "--shard=", "--config.mode=")
    rest = tuple(each for each in arguments if not each.startswith(own))
    shard = next((each.partition("=")[2] for each in arguments if each.startswith("--shard=")), "")
    return Grid(path, choices, rest, shard)


def read(spec: str) -> config_dict.ConfigDict:
    """Return the config of a file.

    Args:
        spec: `FILE` or `FILE:CHOICE`; the choice is the argument of its `get_config`.

    Raises:
        UserError: The file does not exist, or it raises an error; names the line.
    """
    path, colon, choice = spec.partition(":")
    if not Path(path).is_file():
        folder = Path(path).parent if any(Path(path).parent.glob("*.py")) else Path("configs")
        known = sorted(file.name for file in folder.glob("*.py"))
        hint = nearest(Path(path).name, known, folder=folder) if known else "expected a Python file"
        raise UserError(f"no config file {path!r}; {hint}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise UserError(f"{path}: no function get_config(); expected one that returns the study's config")
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(
                f"{path}: its get_config() takes no choice, so not {choice!r}; expected --config={path}"
            )
        config = get_config(*([choice] if colon else []))
    except UserError:
        raise
    except Exception as error:  # a config file is the user's code and may raise anything
        raise UserError(_failure(path, error)) from error
    try:
        resolve(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _failure(path: str, error: Exception) -> str:
    """Return the location of an error in a config file, and its message."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 0 for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError):
        return (
            f"{path}:{error.lineno}: not Python ({error.msg}); expected a file such as configs/quickstart.py"
        )
    place = f"{path}:{lines[-1]}" if lines else path
    if isinstance(error, AttributeError | KeyError | TypeError) and (line := _former(path, lines)):
        return f"{place}: {line}"
    if isinstance(error, AttributeError) and (missing := re.fullmatch(r"\W*'(\w+)'\W*", str(error))):
        return f"{place}: {names.no_setting(missing[1], flat(default()))}"
    if unknown := re.search(r'Key "(.+?)" does not exist and cannot be added', str(error)):
        return f"{place}: {names.no_setting(unknown[1], flat(default()))}"
    if isinstance(error, ModuleNotFoundError) and error.name in _MOVED:
        return f"{place}: no module {error.name}; expected {_MOVED[error.name]}"
    if wrong := re.search(
        r"override field '(.+?)' \(reference\)\. (.*) is of original type <class '(.+)'> "
        r".* to type <class '(.+)'>",
        str(error),
    ):
        name, value, *types = wrong.groups()
        given, wanted = (type_.rpartition(".")[2] for type_ in types)
        return f"{place}: {name} is {value} ({given}); expected {_TYPES.get(wanted, wanted)}"
    return f"{place}: {type(error).__name__}: {_one_line(error)}"


def _former(path: str, lines: Sequence[int]) -> str:
    """Return the error line for a former setting named by a config line; empty where it names none."""
    text = linecache.getline(path, lines[-1]) if lines else ""
    for old in sorted(RENAMED, key=len, reverse=True):
        end = r"\b" if old == "phases" else r"(?![\w.])"
        if re.search(rf"\bconfig\.{re.escape(old)}{end}", text):
            return names.former(old)
    return ""


_MOVED = {
    "dapt_jax.config": "from dapt_jax.settings import default",
    "dapt_jax.checks": "from dapt_jax.settings import resolve",
}
_TYPES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "tuple": "a tuple",
    "ConfigDict": "settings (a dict)",
}


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def _take_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the config file ("" where none is needed) and the remaining arguments."""
    files, rest = [], []
    pending = iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            files.append(value if equals else next(pending, ""))
        else:
            rest.append(argument)
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times: {', '.join(files)}; expected one file")
    if not files and any(each in NEED_NO_FILE or each.startswith(NAMES_A_MODEL) for each in rest):
        return "", rest
    if not files or not files[0]:
        raise UserError("no config; expected --config=FILE, such as --config=configs/quickstart.py")
    return files[0], rest


def _check_names(arguments: Sequence[str], known: dict[str, Any]) -> None:
    """Refuse flags and settings that do not exist."""
    sections = {
        ".".join(parts[:end]) for parts in (name.split(".") for name in known) for end in range(1, len(parts))
    }
    for argument, following in itertools.pairwise([*arguments, "--"]):
        flag = re.match(r"--?([A-Za-z][^=]*)", argument)
        if not flag or flag[1] == "workdir":
            continue
        name = flag[1].removeprefix("config.")
        if name == flag[1] and not name.startswith("noconfig."):
            hint = names.hint(f"--{name}", ["--workdir", "--config", *(f"--config.{each}" for each in known)])
            raise UserError(f"no flag {argument.partition('=')[0]!r}; {hint}")
        name = name.removeprefix("noconfig.")
        if name not in known and (line := names.former(name)):
            raise UserError(line)
        if name in sections or name in OPEN:
            below = sorted(
                (each for each in known if each.startswith(f"{name}.")), key=lambda each: each.count(".")
            )
            such = f", such as --config.{below[0]}" if below else ""
            raise UserError(f"--config.{name} is a section of the config; expected one of its settings{such}")
        if name not in known:
            raise UserError(names.no_setting(name, known))
        if "=" not in argument and following.startswith("--") and not isinstance(known[name], bool):
            raise UserError(f"{argument} has no value; expected {names.wanted(known[name])}")


def _joined(arguments: Sequence[str], known: dict[str, Any]) -> Iterator[str]:
    """Yield the arguments, `--config.NAME VALUE` of a setting of several values as `--config.NAME=VALUE`."""
    pending = iter(arguments)
    for argument in pending:
        name = argument.lstrip("-").removeprefix("config.")
        is_apart = argument.startswith("-") and isinstance(known.get(name), tuple)
        yield f"{argument}={next(pending, '')}" if is_apart else argument


def _quoted(argument: str, known: dict[str, Any]) -> str:
    """Return a flag with its value as quoted text where it holds names, such as paths and numeric ones.

    Values that are quoted already, and Python's tuples and lists, stay as they are.
    """
    flag, equals, value = argument.partition("=")
    name = flag.lstrip("-").removeprefix("config.")
    standard = known.get(name)
    if not equals or not isinstance(standard, tuple):
        return argument
    try:
        found = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        found = None
    holds_names = name in several_names() or (standard and all(isinstance(each, str) for each in standard))
    members = found if isinstance(found, tuple | list) else (found,)
    is_meant = all(isinstance(each, str) for each in members) if holds_names else found is not None
    return argument if is_meant or value[:1] in "([" else f"{flag}={value!r}"


def _wrong_value(message: str, known: dict[str, Any]) -> str:
    """Return the error line for an invalid value, from absl's message."""
    told = re.match(r"flag --config\.(.+?)=(.*?): ", message, re.DOTALL)
    if not told or told[1] not in known:
        return " ".join(message.split())
    return f"--config.{told[1]}={told[2]}: expected {names.wanted(known[told[1]])}"
