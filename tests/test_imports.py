"""Every module can be imported, also one that no other test happens to import, with the oldest packages and with the newest."""

import importlib
import pkgutil


def test_every_module_can_be_imported() -> None:
    found = [
        module.name
        for package in ("backbones", "configs", "detection")
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    ]
    assert len(found) > 150
    for name in found:
        assert importlib.import_module(name).__name__ == name
