"""Real images and weights beside the checkout; tests that need them skip, and say so, where they are not."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def needs_shared(*names: str) -> pytest.MarkDecorator:
    """Skip a test unless all of these files or folders of the shared folder are there."""
    missing = [name for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs real data that is not here: {', '.join(missing)} in {SHARED}"
    )
