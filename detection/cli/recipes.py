"""How a recipe becomes the config of a training.

A recipe is a Python function without arguments that returns a config. It is named by its file,
``configs/coco.py:ssdlite_mnv2_320``, or, if it comes with LiteDet, ``coco:ssdlite_mnv2_320``. The command line overrides
any field by its dotted name. In place of a recipe a training takes the folder of a run, which then goes on.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

import detection
from backbones.errors import UserError
from detection.cli.docstrings import functions_of


def load_config(
    argv: Sequence[str],
    description: str,
    wanted: type[Any] = object,
    read: Callable[[Mapping[str, Any]], Any] | None = None,
    goes_on: bool = True,
) -> Any:
    """The config of a training's command line: the recipe or the config of a run, then overrides.

    Args:
        argv: ``FILE.py:FUNCTION``, or the folder of a run (or its last.pt) to go on with, and any ``--dotted.field VALUE``.
            ``--help`` after the recipe lists every field.
        description: of the tool, for ``--help``.
        wanted: the dataclass that the recipe has to give.
        read: makes one of the plain data in a checkpoint; None where runs are not gone on with.
        goes_on: a run has to hold the state to go on from. False: any checkpoint of it will do (``best.pt``).

    Returns:
        What the recipe returns, with the overrides; of a run what it was started with, with ``train.resume`` on.

    Raises:
        UserError: no such recipe or run, or one for another tool.
        SystemExit: ``--help``, or an override that names no field or has a value of another type; tyro says which.
    """
    ask_for_recipe(argv, description, runs=read is not None)
    place = Path(argv[0])
    if read is not None and (place.is_dir() or place.suffix == ".pt"):
        default = _config_of_run(place, read, goes_on)
    else:
        default = read_recipe(argv[0])()
        if not isinstance(default, wanted):
            raise UserError(
                f"{argv[0]} gives a {type(default).__name__}; {Path(sys.argv[0]).name} needs a {wanted.__name__}"
            )
    return tyro.cli(
        type(default),
        default=default,
        args=list(argv[1:]),
        prog=f"{Path(sys.argv[0]).name} {argv[0]}",
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )


def ask_for_recipe(argv: Sequence[str], description: str, runs: bool) -> None:
    """Ends with the usage and the list of recipes where a command line does not begin with a recipe or a run.

    ``load_config`` calls it; a command that calls it first need not load torch for that.

    Args:
        argv, description: as for ``load_config``.
        runs: whether the folder of a run will do.

    Raises:
        SystemExit: status 0 for ``--help``, else 2.
    """
    if argv and not argv[0].startswith("-"):
        return
    program = Path(sys.argv[0]).name
    print(f"usage: {program} RECIPE [--FIELD VALUE ...]")
    if runs:
        print(f"       {program} RUN_FOLDER [--FIELD VALUE ...]   (go on with a run)")
    print(f"\n{description.strip()}\n\n{recipe_list()}")
    raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)


def _config_of_run(place: Path, read: Callable[[Mapping[str, Any]], Any], goes_on: bool) -> Any:
    """What the run in a folder was started with, set to go on with it; see ``load_config``."""
    if goes_on and place.suffix == ".pt" and place.name != "last.pt":
        raise UserError(f"{place}: a run is gone on with from its last.pt; give that file or its folder")
    path = place if place.suffix == ".pt" else place / "last.pt"
    from detection.engine.checkpoint import load_checkpoint  # here, because it loads torch

    # mapped: every process reads the config, and none of them the tensors
    content = load_checkpoint(path, mapped=True)
    if goes_on and "training" not in content:
        raise UserError(f"{path} holds weights alone and no state to go on from; is it a copy of a best.pt?")
    try:
        config = read(content.get("training", {}).get("asked", content["config"]))
    except UserError as error:
        raise UserError(f"{path}: {error} (a checkpoint of another kind of training?)") from error
    config.run_dir, config.train.resume = path.parent, True
    return config


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


def read_recipe(spec: str) -> Any:
    """The function of a recipe, ``FILE:FUNCTION``.

    Raises:
        UserError: there is no such file or function.
    """
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
