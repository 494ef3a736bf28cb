#!/usr/bin/env python3
"""The licence of every package that an installation of LiteDet brings, as a table; status 1 where one forbids its use.

$ python tools/licences.py
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

FORBIDDEN = re.compile(r"(A?GPL|(AFFERO )?GENERAL PUBLIC LICENSE)", re.IGNORECASE)
LESSER = re.compile(r"LGPL|LESSER GENERAL PUBLIC", re.IGNORECASE)


def is_forbidden(licence: str) -> bool:
    """Whether a licence is the GPL or AGPL, with no other to choose. The lesser GPL asks nothing of who imports it."""
    return bool(FORBIDDEN.search(LESSER.sub("", licence))) and " OR " not in licence


def needed(root: str) -> dict[str, tuple[str, str]]:
    """Name -> (version, licence) of a package and all that it asks for, extras aside, as they are installed here."""
    found: dict[str, tuple[str, str]] = {}
    waiting = [root]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system or Python
            continue
        meta: Any = package.metadata  # an email.message.Message, which typeshed does not say
        classifiers = [
            line.split(" :: ")[-1] for line in meta.get_all("Classifier") or () if line.startswith("License")
        ]
        text = (meta.get("License") or "").strip().splitlines()
        licence = meta.get("License-Expression") or ", ".join(classifiers) or (text[0][:60] if text else "")
        found[name] = (package.version, licence or "says none")
        asked = [line for line in package.requires or () if "extra ==" not in line]
        waiting += [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked]
    return found


def main() -> int:
    """Prints the table; gives the status."""
    packages = needed("litedet")
    for name, (version, licence) in sorted(packages.items()):
        print(f"{name:32} {version:16} {licence}")
    bad = [name for name, (_, licence) in sorted(packages.items()) if is_forbidden(licence)]
    if bad:
        print(f"error: not free to ship under the MIT licence: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
