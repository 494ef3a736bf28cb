"""Progress of anything long: a bar on a terminal, a line now and then where there is none (a pipe, a log file)."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal; what is done sooner has no line at all


class _Lines:
    """A file that turns what a bar draws over itself into lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, unit: str, lines: bool = True, **options: Any
) -> "tqdm[Any]":
    """A tqdm bar on stderr with rate and time left; where stderr is no terminal, a line every 30 seconds.

    Args:
        items: to iterate over; None: whoever calls ``update`` counts.
        desc: what is being done.
        unit: what is counted, one of it.
        lines: False: nothing at all without a terminal, for who writes lines of their own.
        options: further ones of tqdm: total, initial, leave, unit_scale.
    """
    stream = sys.stderr
    if stream is not None and stream.isatty():
        return tqdm(items, desc=desc, unit=unit, dynamic_ncols=True, **options)
    if stream is None or not lines:
        return tqdm(items, desc=desc, unit=unit, disable=True, **options)
    seconds = SECONDS_BETWEEN_LINES
    return tqdm(
        items, desc=desc, unit=unit, file=_Lines(stream), ncols=0, mininterval=seconds, maxinterval=seconds, delay=seconds,
        **options,
    )  # fmt: skip
