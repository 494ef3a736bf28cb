"""How a recipe becomes the config of a training.

A recipe is a Python function without arguments that returns a config. It is named by its file,
``configs/coco.py:ssdlite_mnv2_320``, or, if it comes with LiteDet, ``coco:ssdlite_mnv2_320``. The command line overrides
any field by its dotted name.
"""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

import detection
from backbones.errors import UserError
from detection.cli.docstrings import functions_of


def load_config(argv: Sequence[str], description: str) -> Any:
    """The config of a tool's command line: the recipe, then overrides.

    Args:
        argv: ``FILE.py:FUNCTION`` and any ``--dotted.field VALUE``. ``--help`` after the recipe lists every field.
        description: of the tool, for ``--help``.

    Returns:
        What the recipe returns, with the overrides.

    Raises:
        UserError: no such recipe.
        SystemExit: ``--help``, or an override that names no field or has a value of another type; tyro says which.
    """
    if not argv or argv[0].startswith("-"):
        print(f"usage: {Path(sys.argv[0]).name} RECIPE [--FIELD VALUE ...]\n\n{description.strip()}\n\n{recipe_list()}")
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    default = _recipe(argv[0])()
    return tyro.cli(
        type(default),
        default=default,
        args=list(argv[1:]),
        prog=f"{Path(sys.argv[0]).name} {argv[0]}",
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )


def recipe_files() -> list[Path]:
    """The files of the recipes that come with LiteDet: ``configs/`` of a checkout, ``detection/recipes/`` of a wheel."""
    package = Path(detection.__file__).parent
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return sorted(path for path in folder.glob("*.py") if path.stem != "__init__")


def recipe_list() -> str:
    """The recipes that come with LiteDet, a line each, with the first line of their docstrings."""
    lines = []
    for command, kind in (("train", "DetectionConfig"), ("train-cls", "ClassificationConfig")):
        lines.append(f"Recipes for litedet {command}:")
        for file in recipe_files():
            lines += [
                f"  {file.stem}:{one.name}\n      {one.summary}" for one in functions_of(file) if one.returns == kind
            ]
        lines.append("")
    lines.append("One of your own is mine.py:FUNCTION. RECIPE --help lists every field with its default.")
    return "\n".join(lines)


def _recipe(spec: str) -> Any:
    path, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise UserError(
            f"{spec!r} names no recipe; give FILE:FUNCTION, as finetune:detector or mine.py:my_recipe "
            f"(there are {', '.join(path.stem for path in recipe_files())})"
        )
    file = Path(path)
    if not path.endswith(".py"):
        shipped = {path.stem: path for path in recipe_files()}
        if path not in shipped:
            raise UserError(
                f"no recipe file is named {path!r}; there are {', '.join(shipped)}, or give FILE.py:FUNCTION"
            )
        file = shipped[path]
    elif not file.is_file():
        shipped_too = [f"; LiteDet's own is {file.stem}:{name}" for own in recipe_files() if own.stem == file.stem]
        raise UserError(f"no recipe file {path} (looked in {Path.cwd()}){''.join(shipped_too)}")
    # By file, not by import: a user's own recipe may lie anywhere.
    module_spec = importlib.util.spec_from_file_location(f"recipes_of_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    recipes = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if name not in recipes:
        raise UserError(f"{path} has no recipe {name!r}; it has: {', '.join(recipes) or 'none'}")
    return getattr(module, name)
