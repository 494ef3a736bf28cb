"""The command ``litedet``: its help, its mistakes, and that it works from a wheel in an empty folder."""

import configparser
import importlib
import inspect
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import detection
from detection.benchmark import config as benchmark_config
from detection.cli import docstrings, recipes
from detection.cli.eval import EvalConfig
from detection.cli.main import COMMANDS, installed_version, main
from detection.data.dataset import ExifRule
from detection.data.drawn import draw_detection_set
from detection.evaluation import coco_ap
from detection.inference import runners

ROOT = Path(__file__).resolve().parents[1]


def ends(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(["--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(COMMANDS)
    for name, summary in lines:
        module = importlib.import_module(f"detection.cli.{COMMANDS[name]}")
        assert (module.__doc__ or "").startswith(summary.rstrip())
        assert callable(module.main)
        assert inspect.getsource(module).rstrip().endswith("main()"), "python -m must not end without a word"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(["--version"]) == 0
    assert capsys.readouterr().out == f"litedet {installed_version()}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "usage: litedet COMMAND"),
        (["evl"], "there is no command 'evl'; did you mean 'eval'?"),
        (["train_cls"], "did you mean 'train-cls'?"),
        (["xyz"], "there is no command 'xyz'\n"),
    ],
)
def test_wrong_usage_is_exit_code_2(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(given) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    ["--help", "train", "train --help", "train-cls --help", "eval --help", "eval --wrong", "video --help", "convert voc --help",
     "convert-weights --help", "benchmark --help", "quickstart --help"],
)  # fmt: skip
def test_torch_is_not_loaded_to_parse_a_command(arguments: str) -> None:
    code = """
import sys
from detection.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    print("loaded:", {"torch", "torchvision", "supervision"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: set()\n"), done.stdout


def test_choices_are_those_of_what_is_imported_late() -> None:
    hints = get_type_hints(EvalConfig)
    for name, choices in (("exif", ExifRule), ("backend", coco_ap.Backend), ("runner", runners.Backend)):
        assert get_args(hints[name]) == get_args(choices)
    assert get_args(benchmark_config.Backend) == get_args(runners.Backend)


def test_examples_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(["convert", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("$ litedet convert ") for line in lines) == 2


def test_train_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(["train"]) == 2
    printed = capsys.readouterr().out
    shown = [line.strip() for line in printed.splitlines() if line.startswith("  ") and ":" in line]
    for file in recipes.recipe_files():
        for function in docstrings.functions_of(file):
            assert f"{file.stem}:{function.name}" in shown
            assert function.summary
            assert function.summary in printed


def test_a_recipe_of_ours_by_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="LiteDet's own is finetune:detector"):
        recipes.load_config(["configs/finetune.py:detector"], "")


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    on_disk = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("backbones", "detection")
        for path in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted([*on_disk, "detection.recipes"])
    # Scripts of a bundle and of a page are copied, never imported: they are data of their package.
    assert config["options.package_data"]["detection.export"].split() == ["bundle_files/*.py", "web_files/*"]
    data = {ROOT / "detection" / "export" / name for name in ("bundle_files", "web_files")}
    folders = {path.parent for top in ("backbones", "detection") for path in (ROOT / top).rglob("*.py")}
    assert folders - data == {ROOT / Path(*name.split(".")) for name in on_disk}, (
        "a folder with Python files and without __init__.py"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy, so that nothing is left in it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("backbones", "detection", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("litedet-*.whl")
    return built


@pytest.fixture(scope="module")
def litedet(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment that has the wheel, and what it depends on from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--no-warn-script-location"]
    python = Path(paths["scripts"]) / Path(sys.executable).name
    command = [sys.executable, "-m", "pip", f"--python={python}", "install", *options, str(wheel)]
    subprocess.run(command, cwd=folder, env=apart(), check=True)
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Path(paths["scripts"]) / "litedet"


def apart() -> dict[str, str]:
    """The environment without what would show the checkout to a Python."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(command: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([command, *arguments], cwd=folder, env=apart(), capture_output=True, text=True)


@pytest.mark.slow
def test_a_wheel_trains_from_an_empty_folder(litedet: Path, tmp_path: Path) -> None:
    drawn = draw_detection_set(tmp_path / "data", num_train=4, num_val=2, size=(64, 64))
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = [
        "--data.train.annotations",
        str(drawn.train_annotations),
        "--data.train.images",
        str(drawn.train_images),
    ]
    arguments += ["--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)]
    arguments += ["--train.epochs", "1", "--train.batch-size", "2", "--data.workers", "0", "--run-dir", "run"]
    arguments += ["--model.backbone.frozen-stages", "0", "--model.input-size", "96", "96", "--train.device", "cpu"]
    done = run(litedet, folder, "train", "quickstart:detector", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run" / "best.pt").is_file()
    assert [path.name for path in folder.iterdir()] == ["run"]


@pytest.mark.slow
def test_recipes_of_a_wheel(litedet: Path, tmp_path: Path) -> None:
    where = run(litedet.with_name("python"), tmp_path, "-c", "import detection; print(detection.__file__)").stdout
    assert Path(where.strip()) != Path(detection.__file__)
    listed = run(litedet, tmp_path, "train")
    assert listed.returncode == 2
    assert "finetune:detector" in listed.stdout
    shown = run(litedet, tmp_path, "train", "finetune:detector", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: litedet train finetune:detector" in shown.stdout
    assert "--train.epochs" in shown.stdout


@pytest.mark.parametrize(
    ("command", "old"),
    [
        ("convert-weights", ["--max-pictures", "--picture-size"]),
        ("quickstart", ["--picture-side"]),
        ("benchmark", ["--open-pictures", "--evaluate-pictures"]),
    ],
)
def test_arguments_of_old_names_still_work(command: str, old: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ends([command, "--help"]) == 0
    printed = capsys.readouterr().out
    for name in old:
        assert name in printed
