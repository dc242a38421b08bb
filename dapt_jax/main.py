"""The command line: `python -m dapt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported, Ctrl-C is no traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `allocator.restart_with_settings`

import contextlib
import dataclasses
import gc
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapt_jax.errors import EXIT_CODE, UserError, of_machine
from dapt_jax.runtime import allocator, home, preemption, storage, streams, user_cache

if TYPE_CHECKING:
    from dapt_jax.settings import StudySettings
    from dapt_jax.settings.flags import Grid

HELP = {"--help", "-help", "-h"}
OF_RECORDS = ("status", "report")
"""Modes that read the records of a workdir alone: they need no settings, and so no JAX."""
SHOWN = ("config.report.", "config.energy.")
"""How the flags begin of what a report shows, as the study has recorded it."""


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: Command-line arguments, the program's name first.

    Returns:
        The exit code: 0; 2 after a one-line error about user input; 75 after SIGTERM and 130 after Ctrl-C,
        where the same command resumes the study.
    """
    preemption_handler = preemption.PreemptionHandler()
    try:
        with preemption_handler:
            mode, workdir = _mode_and_workdir(argv[1:])
            if mode in OF_RECORDS and _are_known(argv[1:]):
                _show_records(mode, workdir, argv[1:])
                return 0
            if HELP & set(argv[1:]):
                print(help_text(), end="")
                return 0
            if argv[1:] == ["--config.mode=models"]:
                _show_models()
                return 0
            with (
                preemption_handler.deferred()
            ):  # libraries that are interrupted while imported print tracebacks
                set_up_jax()
                from dapt_jax.settings import flags

            if grid := flags.grid(argv[1:], workdir):
                return _run_grid(grid, mode, workdir)
            settings, workdir = flags.parse(argv[1:])
            if settings.mode != "run" or workdir is None:
                _show(settings, workdir, argv[1:])
                return 0
            from dapt_jax.study import study

            with _one_of_several(settings, workdir, preemption_handler) as folder:
                study.run(settings, folder, preemption_handler)
    except (Exception, preemption.Stopped) as error:
        # A signal inside a library, such as one that is being imported, surfaces as that library's error.
        is_stopped = preemption_handler.signal_received and not isinstance(error, UserError)
        code = _exit_code(preemption.Stopped(preemption_handler.signal_received) if is_stopped else error)
        if code is None:
            raise
        return code
    return 0


def _run_grid(grid: "Grid", mode: str, workdir: str | None) -> int:
    """Plan or run a grid of studies, and return its exit code."""
    from dapt_jax.study import grid as grids

    if workdir is None or storage.is_url(workdir):
        raise UserError(f"a grid needs a local folder; {NO_WORKDIR}")
    if mode not in ("", "run", "plan"):
        raise UserError(f"--config.mode={mode} of a grid; expected run or plan")
    folder = home.expanded(workdir)
    if mode == "plan":
        return grids.show(grid, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return grids.run(grid, folder, lambda arguments: main(["dapt_jax", *arguments]))


def _exit_code(error: BaseException) -> int | None:
    """Print the line of a user error or a stop, and return its exit code; None for any other error."""
    if isinstance(error, preemption.Stopped):
        streams.say(f"stopped by {error}; the same command goes on from the last checkpoint", sys.stderr)
        return error.code
    if isinstance(error, UserError):
        streams.say(f"error: {' '.join(str(error).split())}", sys.stderr)
        return EXIT_CODE
    if line := of_machine(error):
        streams.say(f"error: {line}", sys.stderr)
        return EXIT_CODE
    return None


@contextlib.contextmanager
def _one_of_several(
    settings: "StudySettings", workdir: str, preemption_handler: preemption.PreemptionHandler
) -> Iterator[Path]:
    """Connect to the study's other processes, if any, and yield the working folder.

    With several processes, a process that fails exits at once, since the others would wait for it: with the
    codes of `main`, or 75 where another process has failed.
    """
    from dapt_jax.runtime import processes

    processes.start(settings.runtime.group())
    preemption_handler.listen()
    try:
        own = storage.workdir(workdir, settings.mode) if processes.is_primary() else processes.scratch()
        with contextlib.ExitStack() as stack:
            with processes.barrier_or_raise():
                folder = stack.enter_context(own)
            assert folder is not None
            yield folder
    except (Exception, preemption.Stopped, processes.PeerFailed) as error:
        if not processes.is_multi_process():
            raise
        code = error.code if isinstance(error, processes.PeerFailed) else _exit_code(error)
        if code is None and processes.is_peer_failure(error):
            line = "another process of the study is gone; the same command goes on from the last checkpoint"
            print(line, file=sys.stderr)
            code = preemption.RESTART_CODE
        elif code is None:
            traceback.print_exception(error)
            code = 1
        processes.exit_now(code)


def _mode_and_workdir(arguments: Sequence[str]) -> tuple[str, str | None]:
    """Return the mode and the workdir of the arguments; empty and None where absent."""
    given = _flags(arguments)
    return given.get("config.mode", ""), given.get("workdir") or None


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """Return the flags of the arguments by name, `--NAME=VALUE` or `--NAME VALUE`; the last of several counts.

    An argument that is no flag and no flag's value is a name without a value.
    """
    found: dict[str, str] = {}
    pending = iter(zip(arguments, [*arguments[1:], ""], strict=True))
    for argument, following in pending:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("-")
        found[name.lstrip("-") if is_flag else argument] = value if equals else following if is_flag else ""
        if is_flag and not equals and not following.startswith("-"):
            next(pending, None)
    return found


def _are_known(arguments: Sequence[str]) -> bool:
    """Return whether the help names all flags, so that `flags.parse`, which needs JAX, has none to refuse."""
    known = {"config", "workdir", *re.findall(r"^  --(config\.[a-z\d_.]+)=", help_text(), re.MULTILINE)}
    sections = tuple(f"config.{name}." for name in ("corpus", "corpora", "tasks", "custom_strategies"))
    return all(name in known or name.startswith(sections) for name in _flags(arguments))


def _check_shown(arguments: Sequence[str], workdir: Path) -> None:
    """Refuse a flag that would change what a report shows: it is drawn from the records alone."""
    shown = {name: text for name, text in _flags(arguments).items() if name.startswith(SHOWN)}
    if not shown:
        return
    from dapt_jax.records.study_records import Records

    config = Records.read(workdir).config
    for name, text in shown.items():
        _, section, setting = name.split(".")
        value = (config.get(section) or {}).get(setting)
        if value is not None and not _is_said(value, text):
            raise UserError(
                f"--{name}={text}: mode=report shows what {workdir / 'config.json'} records, {value!r}; expected "
                "the study's own command, --config.mode=run, with this flag: what is finished is not run again"
            )


def _is_said(value: object, text: str) -> bool:
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == value
    except ValueError:
        return False


def _show_records(mode: str, workdir: str | None, arguments: Sequence[str]) -> None:
    """Run a mode that only reads a workdir."""
    with storage.workdir(workdir, mode) as folder:
        if folder is None:
            raise UserError(NO_WORKDIR)
        if mode == "status":
            from dapt_jax.monitoring import status

            status.show(folder)
        else:
            from dapt_jax import report

            _check_shown(arguments, folder)
            report.build(folder)
            streams.say(f"report: {folder / 'report.html'}")


def help_text() -> str:
    """Return the text of `--help`: `flags.usage()`, shipped as a file, since JAX takes a second to import."""
    return Path(__file__).with_name("settings").joinpath("help.txt").read_text(encoding="utf-8")


def _show_models() -> None:
    from dapt_jax.export import catalogue

    catalogue.show()


NO_WORKDIR = "no workdir; expected --workdir=FOLDER, such as --workdir=runs/quickstart"


def _show(settings: "StudySettings", workdir: str | None, arguments: Sequence[str]) -> None:
    """Run a mode that does not train."""
    if settings.mode in OF_RECORDS:
        _show_records(settings.mode, workdir, arguments)
        return
    with storage.workdir(workdir, settings.mode) as folder:
        if settings.mode == "models":
            _show_models()
        elif settings.mode == "data":
            from dapt_jax.study import look

            look.run(settings, folder)
        elif settings.mode == "plan":
            from dapt_jax.study import budgets, plan_tables, prepare

            plan_tables.show(prepare.prepare(budgets.resolved(settings, folder)), folder)
        elif settings.mode == "advise":
            from dapt_jax.study import advise, budgets, prepare

            advise.show(prepare.prepare(budgets.resolved(settings, folder)))
        elif settings.mode == "aot":
            from dapt_jax.aot import report, topology

            topology.set_up()
            report.show(settings, folder)
        elif folder is None:
            raise UserError(NO_WORKDIR)
        elif settings.mode == "compare":
            from dapt_jax.report import compare

            given = _flags(arguments)
            if energy := next((name for name in given if name.startswith("config.energy.")), None):
                raise UserError(
                    f"--{energy}: mode=compare shows what the workdirs record; expected none of energy"
                )
            own = dataclasses.asdict(settings.report).items()
            compare.build(settings.compare, folder, {n: v for n, v in own if f"config.report.{n}" in given})
            print(f"report: {folder / 'report.html'}")
        elif settings.mode == "score":
            from dapt_jax.study import score

            score.run(settings, folder)
        elif settings.mode == "embed":
            from dapt_jax.export import embeddings

            embeddings.run(settings, folder)
        elif settings.mode == "predict":
            from dapt_jax.inference import stream

            stream.run(settings, folder)
        elif settings.predict.model:
            from dapt_jax.inference import deploy

            deploy.run(settings.predict.model, folder)
        else:
            from dapt_jax.export import encoders

            encoders.run(settings, folder)


def set_up_jax() -> None:
    """Enable JAX's persistent compilation cache in the user's cache folder, and collect garbage less often.

    Raises:
        UserError: The address space is too small for XLA.
    """
    allocator.check_address_space()
    import jax
    from absl import logging

    # Tracing makes millions of objects that stay: looking through them was an eighth of a plan's CPU time.
    gc.set_threshold(50_000, 20, 20)
    logging.set_verbosity(logging.ERROR)
    folder = user_cache.folder("xla")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    streams.guard()
    allocator.restart_with_settings()
    sys.exit(streams.finish(main(sys.argv)))
