"""Progress display: current work, throughput and remaining time, as a bar on a terminal, else as lines."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from dapt_jax.errors import one_line
from dapt_jax.monitoring.heartbeat import Heartbeat
from dapt_jax.runtime import streams

LINE_EVERY_S = 10.0


class Reporter:
    """Reporter of a study's progress, in units of work known before it starts (model FLOPs)."""

    def __init__(self, total: float, *, quiet: bool = False, heartbeat: Heartbeat | None = None):
        """Start at zero.

        Args:
            total: Work of the whole study.
            quiet: Whether to print nothing.
            heartbeat: Heartbeat that receives the progress too.
        """
        self.total, self.done, self.skipped = max(total, 1.0), 0.0, 0.0
        self._start = self._spoken = time.monotonic()
        self._live = None
        self._quiet, self._heartbeat = quiet, heartbeat or Heartbeat()
        if not quiet and sys.stderr.isatty():
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            ]  # fmt: skip
            self._live = Progress(*columns, console=Console(stderr=True, markup=False, emoji=False))
            self._task = self._live.add_task("starting", total=self.total, left="")
            self._live.start()

    def skip(self, work: float) -> None:
        """Count work that an earlier start of the same study has done."""
        self.done += work
        self.skipped += work
        self._heartbeat.progress(self.done, self.total, self._left_s(), "", None)

    def reach(self, work: float) -> None:
        """Count all planned work up to here as done: what was spared, such as a prefix that two arms share."""
        if work > self.done:
            self.skip(work - self.done)

    def advance(self, work: float, doing: str, images_per_s: float | None = None) -> None:
        """Count finished work.

        Args:
            work: Work done since the last call.
            doing: Description of the current work.
            images_per_s: Its throughput in images per second.
        """
        self.done += work
        speed = f"  {images_per_s:.0f} images/s" if images_per_s else ""
        self._heartbeat.progress(self.done, self.total, self._left_s(), doing, images_per_s)
        self._show(doing + speed)

    def _left_s(self) -> float | None:
        """Return the seconds to the end at the average speed so far; None where nothing is done yet."""
        run = self.done - self.skipped
        return (time.monotonic() - self._start) * max(self.total - self.done, 0) / run if run > 0 else None

    def _left(self) -> str:
        seconds = self._left_s()
        if seconds is None:
            return "time left: not known yet"
        return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _show(self, text: str) -> None:
        if self._live:
            self._live.update(self._task, completed=self.done, description=text, left=self._left())
        elif not self._quiet and time.monotonic() - self._spoken > LINE_EVERY_S:
            self._spoken = time.monotonic()
            streams.say(f"[{100 * min(self.done / self.total, 1):3.0f}%] {text}  {self._left()}", sys.stderr)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._live:
            self._live.console.print(one_line(text), highlight=False)
        elif not self._quiet:
            streams.say(text, sys.stderr)

    def close(self) -> None:
        """End the display."""
        if self._live:
            self._live.stop()
