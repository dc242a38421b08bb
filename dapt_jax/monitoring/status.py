"""`--config.mode=status`: progress of a study, from the files in its workdir alone."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dapt_jax.errors import UserError
from dapt_jax.monitoring.heartbeat import BEAT_S, STATUS
from dapt_jax.records.ledger import Ledger
from dapt_jax.runtime import streams

RUNNING = "running"

STALE_S = 15 * BEAT_S
"""Age from which a heartbeat counts as stale: a few beats may be late on a loaded machine."""


def show(workdir: Path) -> None:
    """Print the progress of a study.

    Raises:
        UserError: No study has begun in the workdir.
    """
    for line in lines(workdir, time.time()):
        streams.say(line)


def lines(workdir: Path, now: float) -> list[str]:
    """Return the lines that `show` prints.

    Args:
        workdir: Folder of the study.
        now: Seconds of the wall clock.

    Raises:
        UserError: No study has begun in the workdir, or its heartbeat is damaged.
    """
    path = workdir / STATUS
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the --workdir of a study that runs or has run")
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON ({getattr(error, 'msg', 'damaged')}); expected a heartbeat: start the study again"
        ) from error
    try:
        return _lines(workdir, status, now)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path}: not a heartbeat; expected that of a study: start the study again"
        ) from error


def _lines(workdir: Path, status: dict[str, Any], now: float) -> list[str]:
    arms, flops, at = status["arms"], status["flops"], status["at"]
    state = _state(status, now)
    is_running = state.startswith(RUNNING)
    word = RUNNING if is_running else "begun"
    shown = [f"{workdir}: {state}"]
    shown.append(
        f"arms: {len(arms['done'])} done, {1 if arms['running'] else 0} {word}, {len(arms['left'])} left"
    )
    shown += [f"  {each}: {', '.join(names)}" for each, names in _named(arms, word)]
    if is_running and status["doing"]:
        speed = f", {status['images_per_s']:.0f} images/s" if status["images_per_s"] else ""
        shown.append(f"now: {status['doing']}{speed}, {_span(now - status['progressed'])} ago")
    if at:
        shown.append(
            f"  phase {at['phase']}, epoch {at['epoch']} of {at['epochs']}, "
            f"step {at['step']} of {at['steps']} of the run"
        )
    share = 100 * min(flops["done"] / flops["total"], 1) if flops["total"] else 0.0
    left = ""
    if status["left_s"] is not None and status["state"] != "done":
        at_speed = "" if is_running else " at the speed that it had"
        left = f", about {_span(status['left_s'])} left{at_speed}"
    shown.append(
        f"progress: {flops['done'] / 1e12:.4g} of {flops['total'] / 1e12:.4g} TFLOP ({share:.0f}%){left}"
    )
    return [*shown, _cost(workdir, status["row"])]


def _named(arms: dict[str, Any], word: str) -> list[tuple[str, list[str]]]:
    parts = [
        ("done", arms["done"]),
        (word, [arms["running"]] if arms["running"] else []),
        ("left", arms["left"]),
    ]
    return [(each, names) for each, names in parts if names]


def _state(status: dict[str, Any], now: float) -> str:
    """Return whether the study is running, in words."""
    age = now - status["time"]
    who = f"process {status['pid']} on {status['host']}"
    if status["state"] == "done":
        return f"done, {_span(age)} ago"
    if status["state"] != RUNNING:
        return f"{status['state']} {_span(age)} ago; the same command goes on"
    is_here = status["host"] == socket.gethostname()
    if (is_here and not _lives(status["pid"])) or age > STALE_S:
        return (
            f"no sign of life for {_span(age)} from {who}: it was killed or cannot write; "
            "the same command goes on"
        )
    return f"{RUNNING}, {who}, heard of {_span(max(age, 0))} ago"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cost(workdir: Path, row: dict[str, Any]) -> str:
    """Return the cost of the study so far: its ledger, and the row under way."""
    under_way = tuple(row.get("key", ()))
    rows = [each for each in Ledger(workdir / "ledger.jsonl").rows() if each.key != under_way]
    flops, seconds, kwh = (
        sum(getattr(each, name) for each in rows) + row.get(name, 0)
        for name in ("model_flops", "wall_s", "energy_kwh")
    )
    return f"cost so far: {flops / 1e12:.4g} TFLOP, {_span(seconds)}, {kwh:.3g} kWh"


def _span(seconds: float) -> str:
    """Return a duration in words."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
