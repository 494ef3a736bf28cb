"""tools/licences.py: what an installation brings may be used under the MIT licence."""

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "licences.py"))


@pytest.mark.parametrize(
    ("licence", "forbidden"),
    [
        ("MIT", False),
        ("GPL-3.0-only", True),
        ("AGPL-3.0", True),
        ("GNU Affero General Public License v3", True),
        ("GNU General Public License v2 (GPLv2)", True),
        ("LGPL-2.1", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("GPL-2.0 OR MIT", False),
        ("says none", False),
    ],
)
def test_which_licences_are_refused(licence: str, forbidden: bool) -> None:
    assert TOOL["is_forbidden"](licence) == forbidden


def test_no_dependency_is_under_the_gpl() -> None:
    packages = TOOL["needed"]("litedet")
    assert {"torch", "numpy", "opencv-python"} <= packages.keys()
    assert [name for name, (_, licence) in packages.items() if TOOL["is_forbidden"](licence)] == []
