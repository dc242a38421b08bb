"""The command line: `python -m dapt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapt_jax.errors import EXIT_CODE, UserError
from dapt_jax.runtime import allocator, preemption, storage, user_cache
from dapt_jax.settings import flags


def main(argv: Sequence[str]) -> int:
    """Runs one command, and ends this process at once where others of the study are, or were, and it failed.

    Args:
        argv: of the command line, the program's name first.

    Returns:
        The exit code, see `command`.
    """
    code = command(argv)
    if code and (processes := sys.modules.get("dapt_jax.runtime.processes")) and processes.is_multi_process():
        processes.exit_now(code)
    return code


def command(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        argv: of the command line, the program's name first.

    Returns:
        The exit code: 0; 2 after one line that says what the user can mend; 75 after SIGTERM, or the loss of another process
        of the study, and 130 after Ctrl-C, where the same command goes on.
    """
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(flags.usage())
        return 0
    try:
        config, workdir = flags.parse(argv[1:])
        with preemption.PreemptionHandler() as preemption_handler:
            if config.mode == "run" and workdir is not None:
                return _run(config, workdir, preemption_handler)
            with storage.workdir(workdir, config.mode) as folder:
                _dispatch(config, folder)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}: make room; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_CODE
    except preemption.Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on from the last checkpoint", file=sys.stderr)
        return stopped.code
    return 0


def _run(config: Any, workdir: str, preemption_handler: preemption.PreemptionHandler) -> int:
    """A study, in as many processes as there are; returns the exit code."""
    set_up_jax()
    from dapt_jax.runtime import processes
    from dapt_jax.study import study

    processes.start(config.parallel)
    preemption_handler.listen()
    try:
        mine = storage.workdir(workdir, config.mode) if processes.is_primary() else processes.scratch()
        with mine as folder:
            assert folder is not None
            study.run(config, folder, preemption_handler)
    except Exception as error:
        if isinstance(error, UserError | OSError) or not processes.is_multi_process():
            raise
        if not processes.is_peer_failure(error):
            traceback.print_exc()
            return 1
        print(
            "another process of the study is gone; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return preemption.RESTART_CODE
    except processes.PeerFailed as lost:
        return lost.code
    return 0


def _dispatch(config: Any, workdir: Path | None) -> None:
    if config.mode == "models":
        set_up_jax()
        from dapt_jax.export import catalogue

        catalogue.show()
        return
    if config.mode == "plan":
        set_up_jax()
        from dapt_jax.study import plan, prepare

        ready = prepare.prepare(config)
        plan.show(config, list(ready.strategies), ready.corpora, list(ready.tasks))
        return
    if config.mode == "aot":
        from dapt_jax.aot import topology

        topology.set_up()  # before JAX is there
        set_up_jax()
        from dapt_jax.aot.report import show

        show(config, workdir)
        return
    if workdir is None:
        raise UserError("no workdir; expected --workdir=FOLDER, such as --workdir=runs/quickstart")
    if config.mode == "status":  # without JAX, which may be busy elsewhere
        from dapt_jax.monitoring import status

        status.show(workdir)
    elif config.mode == "report":  # without JAX: a report can be made where no study could run
        from dapt_jax import report

        report.build(workdir)
        print(f"report: {workdir / 'report.html'}")
    else:
        set_up_jax()
        from dapt_jax.export import encoders

        encoders.run(config, workdir)


def set_up_jax() -> None:
    """Compiled programs are kept between starts, in the user's cache folder."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    folder = user_cache.folder("xla")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    allocator.restart_with_settings()
    sys.exit(main(sys.argv))
