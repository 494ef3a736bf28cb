"""When whoever reads what a command prints has gone: ``litedet ... | head -1``, a closed terminal."""

import contextlib
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

STATUS = 141
"""Exit status, 128 and the number of SIGPIPE, as shells have it for a program that the signal ended."""


def reader_has_gone(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads; False where the system cannot say (Windows)."""
    if stream is None or not hasattr(select, "poll"):
        return False
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # none, or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def let_go(stream: TextIO) -> None:
    """Sends what is and will be written to a stream nowhere: every try would be an error, the last at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def quiet_without_reader() -> Iterator[None]:
    """Ends a command without a word once nobody reads its output.

    Raises:
        SystemExit: with ``STATUS``, in the place of the BrokenPipeError.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # else it fails at the interpreter's end, where nobody can catch it
    except BrokenPipeError as error:
        if not reader_has_gone(sys.stdout):
            raise
        let_go(sys.stdout)
        raise SystemExit(STATUS) from error


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:  # Python 3.10 has no such subscript
    _Handler = logging.StreamHandler


class LineHandler(_Handler):
    """Log lines on a stream. Without a reader they are dropped and the work goes on; ``logging`` prints a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        """See ``logging.Handler``."""
        if isinstance(sys.exc_info()[1], BrokenPipeError) and reader_has_gone(self.stream):
            let_go(self.stream)
        else:
            super().handleError(record)
