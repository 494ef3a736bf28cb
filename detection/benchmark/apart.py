"""Sides of a comparison that need a process each, because what one changes in its process would help the other too."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Side(NamedTuple):
    """What a process does.

    Attributes:
        build: called in the process; a context manager that gives what is to be timed.
        arguments: of ``build``.
        environment: variables that differ in the process; None takes one away.
    """

    build: Callable[..., AbstractContextManager[Callable[[], object]]]
    arguments: tuple[Any, ...]
    environment: Mapping[str, str | None] = {}


@contextmanager
def run_apart(sides: Mapping[str, Side]) -> Iterator[dict[str, Callable[[], None]]]:
    """Calls that each make one run in the process of a side and wait for it; the processes live as long as the context.

    Raises:
        RuntimeError: a process has ended; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        calls = {}
        for name, side in sides.items():
            here, there = context.Pipe()
            # No daemon: those may not have data workers. One that outlives its parent ends when it waits for the next call.
            process = context.Process(target=_serve, args=(side, there))
            with _environment(side.environment):
                process.start()
            there.close()  # else a process that ends would leave this one waiting
            stack.callback(process.join)
            stack.callback(process.terminate)
            calls[name] = _asker(name, here)
        yield calls


def _asker(name: str, connection: Connection) -> Callable[[], None]:
    def ask() -> None:
        try:
            connection.send(None)
            connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the process of side {name!r} has ended; its own traceback is above") from error

    return ask


def _serve(side: Side, connection: Connection) -> None:
    with side.build(*side.arguments) as run:
        while True:
            connection.recv()
            run()
            connection.send(None)


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    try:
        for name, value in changes.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
