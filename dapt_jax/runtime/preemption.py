"""Preemption by SIGTERM or SIGHUP, or Ctrl-C: the study saves at the next step, then exits."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

RESTART_CODE = os.EX_TEMPFAIL
"""Exit code, 75, of a preempted study, which resumes when it is started again: launchers restart on it."""

STOPPED_CODE = 128 + signal.SIGINT
"""Exit code, 130, of a study that a user has interrupted: launchers do not restart it."""


class Stopped(BaseException):
    """End of the study at a point from which a restart resumes.

    Not an `Exception`, so that error handlers do not catch it.
    """

    def __init__(self, number: int):
        """Set the message.

        Args:
            number: Number of the signal.
        """
        super().__init__(signal.Signals(number).name)
        self.code = STOPPED_CODE if number == signal.SIGINT else RESTART_CODE


class PreemptionHandler:
    """Handler of SIGTERM, SIGHUP and SIGINT in its `with` block; a second signal ends the process at once.

    SIGHUP, of a terminal that is closed, is left ignored where `nohup` has it ignored.

    Where training has state to save, the code defers the signal and checks `signal_received` after its steps.
    Everywhere else all state is already saved, and the signal ends the study where it is.
    """

    def __init__(self) -> None:
        """Start with no signal received."""
        self.signal_received = 0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                self._before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        self.listen()
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._on_unraisable
        return self

    def listen(self) -> None:
        """Install the handlers again after other code, such as multi-process JAX, has replaced them."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _on_unraisable(self, unraisable: Any) -> None:
        """Send a signal again that came in a destructor or a callback, from which Python lets none out."""
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            self._hook(unraisable)
        elif self._before:
            number, self.signal_received = self.signal_received, 0
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_received = number
        if self._deferred:
            line = (
                f"{signal.Signals(number).name}: saves at the next step, then ends; once more ends at once\n"
            )
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        else:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Record a signal in `signal_received` inside the `with` block, and act on it at the end.

        Raises:
            Stopped: A signal was received inside the block.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.signal_received:
            raise Stopped(self.signal_received)
