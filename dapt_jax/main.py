"""The command line: `python -m dapt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from dapt_jax.config import MODES
from dapt_jax.errors import EXIT_CODE, UserError, nearest

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of a study.", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study's results.", flag_values=FLAGS)


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: of the command line, the program's name first.

    Returns:
        The exit code: 0, or 2 after one line that says what the user can mend.
    """
    try:
        config, workdir = _parse(arguments)
        _set_up_jax()
        _dispatch(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Any, Path]:
    """Flags to config and workdir.

    Raises:
        UserError: anything that they cannot be.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--config" and not Path(value.partition(":")[0]).is_file():
            path = Path(value.partition(":")[0])
            near = [str(file) for file in sorted(path.parent.glob("*.py"))] or [
                str(file) for file in sorted(Path("configs").glob("*.py"))
            ]
            raise UserError(f"no config file {str(path)!r}; {nearest(str(path), near)}")
    try:
        rest = FLAGS(list(arguments))
    except UserError:
        raise
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except AttributeError as error:
        raise UserError(_no_such_setting(arguments, error)) from error
    except Exception as error:  # a config file is the user's code and may raise anything
        raise UserError(f"the config cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; expected --config=FILE --workdir=FOLDER --config.key=value")
    if CONFIG.value is None:
        raise UserError("no config; expected --config=FILE, such as --config=configs/quickstart.py")
    config = CONFIG.value
    for key in ("strategies",):
        config[key] = tuple(name.strip() for value in config[key] for name in value.split(",") if name.strip())
    if config.mode not in MODES:
        raise UserError(f"unknown mode {config.mode!r}; {nearest(config.mode, MODES)}")
    if WORKDIR.value is None and config.mode != "plan":
        raise UserError("no workdir; expected --workdir=FOLDER, such as --workdir=runs/quickstart")
    return config, Path(WORKDIR.value or ".")


def _no_such_setting(arguments: Sequence[str], error: AttributeError) -> str:
    """The line for an override that the config does not have."""
    from dapt_jax.config import default

    known: list[str] = []

    def collect(tree: Any, prefix: str) -> None:
        for key, value in tree.items():
            if hasattr(value, "items"):
                collect(value, f"{prefix}{key}.")
            known.append(f"{prefix}{key}")

    collect(default(), "")
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and name not in known:
            return f"the config has no setting {name!r}; {nearest(name, known)}"
    return f"the config has no setting {error}"


def _set_up_jax() -> None:
    """Compiled programs are kept between starts, in the user's cache folder."""
    logging.set_verbosity(logging.ERROR)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapt_jax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _dispatch(config: Any, workdir: Path) -> None:
    from dapt_jax import plan, report, study

    if config.mode == "report":
        report.build(workdir)
        print(f"report: {workdir / 'report.html'}")
    elif config.mode == "plan":
        prepared = study.prepare(config)
        plan.show(config, list(prepared.strategies), prepared.corpus, list(prepared.tasks))
    else:
        study.run(config, workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
