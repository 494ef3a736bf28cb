"""``litedet COMMAND ...``: every command of LiteDet under one name."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detection.cli.docstrings import summary_of
from detection.engine.streams import quiet_without_reader

# Name -> module. It is imported when its command is asked for, because torch takes seconds.
COMMANDS = {
    "train": "train",
    "train-cls": "train_cls",
    "eval": "eval",
    "report": "report",
    "video": "video",
    "predict": "predict",
    "check": "check",
    "inspect": "inspect",
    "export": "export",
    "convert": "convert",
    "convert-weights": "convert_weights",
    "benchmark": "benchmark",
    "quickstart": "quickstart",
}


@quiet_without_reader()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that ``argv`` begins with. Exit codes: 0, 2 for wrong usage, and those of the commands.

    Raises:
        SystemExit: help, the version, or a command that does not exist.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        raise SystemExit(0)
    if name == "--version":
        print(f"litedet {installed_version()}")
        raise SystemExit(0)
    if name not in COMMANDS:
        print(f"{_unknown(name)}\n\n{usage()}" if name else usage(), file=sys.stderr)
        raise SystemExit(2)
    sys.argv[0] = f"litedet {name}"  # what the command's own help and messages show
    importlib.import_module(f"detection.cli.{COMMANDS[name]}").main(arguments)


def usage() -> str:
    """Every command with the first line of its module's docstring."""
    width = max(map(len, COMMANDS))
    folder = Path(__file__).parent
    lines = [f"  {name:<{width}}  {summary_of(folder / f'{module}.py')}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "usage: litedet COMMAND ...",
            "",
            *lines,
            "",
            "litedet COMMAND --help explains a command, litedet --version prints the version.",
        ]
    )


def installed_version() -> str:
    """The version of the installed package."""
    try:
        return version("litedet")
    except PackageNotFoundError:
        return "(not installed: run from a checkout)"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    return f"error: there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


if __name__ == "__main__":
    main()
