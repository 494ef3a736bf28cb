"""Bounds of the dependencies, and the sets of versions that are tested."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from tools.constraints import bounds, main, oldest, requirements

ROOT = Path(__file__).resolve().parents[1]


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    assert len(requirements()) > 30
    for requirement in requirements():
        low, high = bounds(requirement)
        assert low is not None, f"{requirement}: from which version on?"
        assert high is not None, f"{requirement}: up to which version?"
        assert Version(low) < Version(high)


def test_bounds_of_one_package_agree() -> None:
    found: dict[str, str] = {}
    for requirement in requirements():
        assert found.setdefault(requirement.name, str(requirement.specifier)) == str(requirement.specifier)


def test_the_oldest_set_is_the_lower_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["oldest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(oldest())
    allowed = {requirement.name: requirement.specifier for requirement in requirements()}
    for line in lines:
        name, version = line.split("==")
        assert version in allowed[name]


def test_the_lock_is_within_the_bounds() -> None:
    lines = (ROOT / "tools" / "lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines)  # exact versions and nothing else
    assert lines == [f"{name}=={locked[name]}" for name in sorted(locked)]
    for requirement in requirements("dev"):
        assert locked[requirement.name] in requirement.specifier, f"{requirement}: make tools/lock.txt anew"


def test_the_installed_set_is_what_is_imported_here() -> None:
    command = [sys.executable, ROOT / "tools" / "constraints.py", "installed"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    versions = dict(line.split("==") for line in done.stdout.splitlines())
    assert versions["numpy"] == np.__version__
    assert {"torch", "pytest", "pluggy", "jinja2"} <= set(versions), "what its dependencies need, too"
    assert "litedet" not in versions


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "error: say which: oldest or installed" in capsys.readouterr().err
