"""A notice to stop, by SIGTERM from whoever takes the machine away or by Ctrl-C: saved at the next step, then out."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

RESTART_CODE = os.EX_TEMPFAIL
"""Exit code, 75, of a study that was told to go and goes on when it is started again: launchers restart on
it."""

STOPPED_CODE = 128 + signal.SIGINT
"""Exit code, 130, of a study that a person has stopped: nobody restarts it."""


class Stopped(BaseException):
    """The study ends here, at a place from which a restart goes on; no error, so that nothing catches it as one."""

    def __init__(self, number: int):
        """Says why.

        Args:
            number: of the signal.
        """
        super().__init__(signal.Signals(number).name)
        self.code = STOPPED_CODE if number == signal.SIGINT else RESTART_CODE


class PreemptionHandler:
    """Listens to SIGTERM and SIGINT inside its `with` block; a second one ends the process at once.

    Where training has state to save, the code defers the notice and looks at `signal_received` after its
    steps. Everywhere else there is nothing to save that is not saved already, and the notice ends the study
    where it is.
    """

    def __init__(self) -> None:
        """Hears nothing yet."""
        self.signal_received = 0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.listen()
        return self

    def listen(self) -> None:
        """Listens again, after something else has taken the signals for itself, as JAX does where it finds other processes."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal_received = number
        if self._deferred:
            line = (
                f"{signal.Signals(number).name}: saves at the next step, then ends; once more ends at once\n"
            )
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        else:
            raise Stopped(number)

    def check(self, given: int = 0) -> None:
        """Ends the study if it was told to.

        Args:
            given: number of a signal that another process of the study was given, or 0.

        Raises:
            Stopped: it was.
        """
        if number := self.signal_received or given:
            raise Stopped(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the `with` block a notice is kept in `signal_received`; at its end it is obeyed.

        Raises:
            Stopped: a notice was given meanwhile.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()
