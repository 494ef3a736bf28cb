"""Other libraries, kept from reporting what they do."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*logs: str) -> Iterator[None]:
    """Keeps a library from reporting its steps: nothing on stdout, no warnings, errors alone in its logs, and progress bars
    where a person sees them.

    Args:
        logs: names of loggers; "" is the root.
    """
    loggers = [logging.getLogger(name) for name in logs]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
