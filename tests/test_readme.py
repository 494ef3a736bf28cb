"""The commands in README and docs are the tools' commands, and their files are there. Run: pytest tests/test_readme.py"""

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from detection.cli import main as litedet
from detection.cli.docstrings import functions_of
from detection.cli.recipes import recipe_files
from detection.engine import runtime

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(file: Path) -> list[list[str]]:
    """The words of every command in a file's bash blocks, with optional parts taken and placeholders kept."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", file.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.partition(" # ")[0]
            if "pip install" not in text:
                text = text.replace("[", "").replace("]", "").replace("|", "_")
            if text.strip():
                found.append(shlex.split(text))
    return found


def own_commands() -> list[list[str]]:
    """Those that call one of our commands, from its name on: litedet COMMAND, tools/NAME.py or a module."""
    found = []
    for words in (words for file in DOCS for words in commands(file)):
        for place, word in enumerate(words):
            if word == "litedet" or re.fullmatch(r"tools/\w+\.py|detection\.cli\.\w+", word):
                found.append(words[place:])
    return found


def function_of(words: list[str]) -> tuple[Callable[[list[str]], object], list[str]]:
    """What a command calls, and its arguments."""
    name, *arguments = words
    if name == "litedet":
        return litedet.main, arguments
    if name.startswith("tools/"):
        assert (ROOT / name).is_file()
        name = name.removesuffix(".py").replace("/", ".")
    return importlib.import_module(name).main, arguments


class ParsedError(Exception):
    """Everything was parsed and checked; a training would begin."""


def test_there_are_commands() -> None:
    names = {tuple(words[:2]) for words in own_commands()}
    for command in litedet.COMMANDS:
        if command != "quickstart":  # bash tools/quickstart.sh
            assert ("litedet", command) in names


@pytest.mark.parametrize("words", own_commands(), ids=" ".join)
def test_every_option_is_one_of_the_commands(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, arguments = function_of(words)
    looks = arguments[0] in ("check", "inspect")  # at data, before anything else
    if (
        any(re.fullmatch(r"[\w/.]+:\w+", word) for word in arguments) and not looks
    ):  # a recipe: parsed and checked as given

        def begin(*_: object, **__: object) -> None:
            raise ParsedError

        monkeypatch.setattr(runtime, "open_runtime", begin)
        with pytest.raises(ParsedError):
            function(arguments)
        return
    if arguments == ["convert-weights", "--list"]:
        function(arguments)
        return
    options = [word for word in arguments if word.startswith("--")]
    leading = [word for word in arguments[:2] if re.fullmatch("[a-z-]+", word) and not word.startswith("-")]
    with pytest.raises(SystemExit) as stop:
        function([*leading[: 2 if "convert" in leading else 1], "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in options:
        assert option in text


@pytest.mark.parametrize("script", [words[1] for file in DOCS for words in commands(file) if words[0] == "bash"])
def test_every_script_is_there(script: str) -> None:
    assert (ROOT / script).is_file()


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_every_linked_file_is_there(file: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
        assert (file.parent / target).exists(), target


def test_every_recipe_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for file in recipe_files():
        if file.stem != "quickstart":
            for recipe in functions_of(file):
                assert f"`{file.stem}:{recipe.name}`" in text


def test_every_extra_is_one_of_setup_cfg() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    extras = {
        extra.strip()
        for file in DOCS
        for named in re.findall(r"(?:litedet|\.)\[([\w, ]+)\]", file.read_text())
        for extra in named.split(",")
    }
    assert extras >= {"convert", "export"}
    for extra in extras:
        assert re.search(rf"^{extra} =$", setup, re.MULTILINE), extra


def test_the_tree_has_every_package() -> None:
    tree = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    shown = [line.split()[0] for line in tree[1].splitlines()]
    for folder in shown:
        assert (ROOT / folder).is_dir(), folder
    for top in ("backbones", "detection", "configs"):
        for file in (ROOT / top).rglob("__init__.py"):
            assert f"{file.parent.relative_to(ROOT)}/" in shown
