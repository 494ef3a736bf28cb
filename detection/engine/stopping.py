"""Stopping a training from outside: after the step it is in, with its state kept. It imports no torch."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came: what Ctrl-C does, for ``docker stop``, a batch system or a closed terminal. Or Ctrl-C itself.

    Attributes:
        name: of the signal; of SIGINT "Ctrl-C".
        status: the exit status that goes with it, 128 and its number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.status = 128 + number
        super().__init__(f"stopped by {self.name}")


class StopRequest:
    """Within it (a context manager) SIGINT, SIGTERM and SIGHUP are noted and not acted on; a second one stops at once.

    A signal that the parent process has set to be ignored (``nohup``) stays ignored. Outside of the main thread, where
    Python lets nobody set handlers, it notes nothing.

    Attributes:
        number: of the signal that came, None before there is one.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
            numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
            self._before = {number: signal.getsignal(number) for number in numbers}
            for number, handler in self._before.items():
                if handler != signal.SIG_IGN:
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises, for what takes long and can be done again."""
        if self.number is not None:
            raise self.error()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def error(self) -> KeyboardInterrupt:
        """What ends the training: ``Terminated``, or a plain ``KeyboardInterrupt`` for Ctrl-C or if none came here."""
        if self.number is None or self.number == signal.SIGINT:
            return KeyboardInterrupt()
        return Terminated(self.number)

    def _note(self, number: int, _: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if again or self._at_once:
            raise self.error()
