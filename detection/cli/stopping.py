"""Being stopped from outside without losing what was made so far."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from detection.engine.stopping import Terminated
from detection.engine.streams import let_go


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise ``Terminated``, once: a second one must not cut off the closing of files.

    A signal that the parent process has set to be ignored (``nohup``) stays ignored.
    """
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python lets no other thread set handlers
    came = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise Terminated(number)

    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def let_go_of_terminal() -> None:
    """After a terminal was closed nothing can be printed, and every try is an error that would hide the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            let_go(stream)
