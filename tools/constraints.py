#!/usr/bin/env python3
"""Prints a constraints file for pip: the oldest set of packages that is supported, or the set that is installed here.

$ python tools/constraints.py oldest     # the lower bounds of setup.cfg, each as an exact version
$ python tools/constraints.py installed  # every package that LiteDet and its checks need, as it is here

The second is how tools/lock.txt is made, after the tests have passed: python tools/constraints.py installed > tools/lock.txt
"""

import configparser
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement
else:
    try:
        from packaging.requirements import Requirement
    except ImportError:  # an environment that holds pip alone
        from pip._vendor.packaging.requirements import Requirement

SETUP = Path(__file__).resolve().parents[1] / "setup.cfg"


def requirements(*extras: str) -> list[Requirement]:
    """What setup.cfg asks for, with these extras; all of them where none is named."""
    parser = configparser.ConfigParser()
    parser.read(SETUP)
    sections = parser["options.extras_require"]
    texts = [parser["options"]["install_requires"], *(sections[extra] for extra in extras or sections)]
    return [Requirement(line) for text in texts for line in text.split("\n") if line.strip()]


def bounds(requirement: Requirement) -> tuple[str | None, str | None]:
    """The lowest version that is allowed, and the one that all have to be below."""
    by_operator = {specifier.operator: specifier.version for specifier in requirement.specifier}
    return by_operator.get(">="), by_operator.get("<")


def oldest() -> Iterator[str]:
    """``name==version`` of each lower bound."""
    found = {requirement.name: bounds(requirement)[0] for requirement in requirements()}
    for name, version in sorted(found.items()):
        if version is not None:
            yield f"{name}=={version}"


def installed() -> Iterator[str]:
    """``name==version`` of what ``litedet[dev]`` brings, all that it needs in turn, as installed here."""
    waiting = [(Requirement("litedet"), "dev")]
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system or Python
            continue
        found[name] = package.version.split("+")[0]  # torch says its build for a GPU
        for line in package.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, part) for part in ("", *needed.extras)]
    found.pop("litedet")
    for name, version in sorted(found.items()):
        yield f"{name}=={version}"


def main(argv: list[str]) -> int:
    """Prints; gives the status."""
    sets = {"oldest": oldest, "installed": installed}
    if len(argv) != 1 or argv[0] not in sets:
        print(f"error: say which: {' or '.join(sets)}\n\n{__doc__}", file=sys.stderr)
        return 2
    print(*sets[argv[0]](), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
