"""How a command ends when the user made a mistake. It imports no torch, so that commands can be parsed before torch is loaded."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, overload

from backbones.errors import UserError
from detection.engine.streams import quiet_without_reader, reader_has_gone

TRAINING_STOPPED = (
    "stopped; the training goes on from its last checkpoint with the same command and --train.resume True"
)

_Main = TypeVar("_Main", bound=Callable[..., Any])

EXPECTED = (UserError, OSError, FloatingPointError)
"""What a user can mend."""


@overload
def main_errors(main: _Main) -> _Main: ...
@overload
def main_errors(*, stopped: str) -> Callable[[_Main], _Main]: ...
def main_errors(main: _Main | None = None, *, stopped: str = "stopped") -> _Main | Callable[[_Main], _Main]:
    """Decorates a tool's ``main(argv)``: a user's mistake ends in one clear line, a mistake of ours in a traceback.

    ``UserError``, ``OSError`` and ``FloatingPointError`` (a training that diverged) become "error: ..." on stderr and
    exit code 2 (argparse's and tyro's code for wrong usage), Ctrl-C becomes ``stopped`` and exit code 130 (the shell's
    code for it; 143 after SIGTERM). Where nobody reads the output any more (``| head -1``) the command ends without a word
    and with 141. With LITEDET_TRACEBACK=1 in the environment nothing is turned, for whoever looks for the place in the code.

    Args:
        main: the tool; without it the result is the decorator.
        stopped: what is printed after Ctrl-C.
    """
    if main is None:
        return functools.partial(main_errors, stopped=stopped)

    @functools.wraps(main)
    @quiet_without_reader()
    def run(argv: Sequence[str] | None = None) -> Any:
        if os.environ.get("LITEDET_TRACEBACK") == "1":
            return main(argv)
        try:
            try:
                return main(argv)
            except RuntimeError as error:
                # torch: whatever raised this has imported it already
                from detection.engine.memory import is_full_memory, what_was_too_much
                from detection.engine.workers import clear_failures

                if is_full_memory(error):
                    raise UserError(
                        "memory is full: fewer images at once (--batch-size, where there is one) need less, and so does "
                        f"--device cpu of a GPU. torch says: {what_was_too_much(error)}"
                    ) from error
                with clear_failures():
                    raise
        except EXPECTED as error:
            if isinstance(error, BrokenPipeError) and reader_has_gone(sys.stdout):
                raise
            tell(error)
            raise SystemExit(2) from error
        except KeyboardInterrupt as error:
            print(stopped, file=sys.stderr)
            raise SystemExit(getattr(error, "status", 130)) from error  # Terminated has one

    return cast(_Main, run)


def tell(error: Exception, prefix: str = "") -> None:
    """Prints an error for the user, once, whoever sees it first."""
    if not getattr(error, "_told", False):
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        error._told = True  # type: ignore[attr-defined]
