"""Sides for tests/test_benchmark.py, in a file that a new process imports quickly."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path


def add(numbers: list[int], variable: str) -> AbstractContextManager[Callable[[], None]]:
    path = Path(os.environ["APART_OUT"])

    def run() -> None:
        path.write_text(f"{path.read_text() if path.exists() else ''}{sum(numbers)} {os.environ.get(variable)}\n")

    return nullcontext(run)


def fail() -> AbstractContextManager[Callable[[], None]]:
    raise SystemExit(3)
