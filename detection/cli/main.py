"""``litedet COMMAND ...``: every command of LiteDet under one name."""

import importlib
import sys
from collections.abc import Sequence

# Name -> module; imported when it is asked for, because torch takes seconds.
COMMANDS = {
    "train": "train",
    "train-cls": "train_cls",
    "eval": "eval",
    "video": "video",
    "convert": "convert",
    "convert-weights": "convert_weights",
    "benchmark": "benchmark",
    "quickstart": "quickstart",
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: litedet COMMAND ...; the commands are {', '.join(COMMANDS)}")
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    name = arguments[0]
    sys.argv[0] = f"litedet {name}"
    importlib.import_module(f"detection.cli.{COMMANDS[name]}").main(arguments[1:])
