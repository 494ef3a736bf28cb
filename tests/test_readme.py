"""The README's commands are the tools' commands, and its files are there. Run: pytest tests/test_readme.py"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from detection.cli.recipes import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The words of every command in the README's bash blocks, with optional parts taken and placeholders kept."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.partition(" # ")[0].replace("[", "").replace("]", "").replace("|", "_").strip()
            if text:
                found.append(shlex.split(text))
    return found


def tool_commands() -> list[list[str]]:
    """Tool and arguments of those that call one of our Python tools."""
    found = []
    for words in commands():
        for place, word in enumerate(words):
            if re.fullmatch(r"tools/\w+\.py", word):
                found.append(words[place:])
    return found


def test_there_are_commands() -> None:
    assert {words[0] for words in tool_commands()} >= {
        "tools/train_det.py",
        "tools/train_cls.py",
        "tools/eval_det.py",
        "tools/demo_video.py",
        "tools/convert_dataset.py",
    }


@pytest.mark.parametrize("words", tool_commands(), ids=" ".join)
def test_every_option_is_one_of_the_tools(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tool, *arguments = words
    assert (ROOT / tool).is_file()
    if arguments and ":" in arguments[0] and arguments[0].startswith("configs/"):
        load_config([f"{ROOT}/{arguments[0]}", *arguments[1:]], "test").validate()
        return
    main = importlib.import_module(tool.removesuffix(".py").replace("/", ".")).main
    subcommand = [arguments[0]] if tool == "tools/convert_dataset.py" else []
    with pytest.raises(SystemExit) as stop:
        main([*subcommand, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (word for word in arguments if word.startswith("--")):
        assert option in text


@pytest.mark.parametrize("script", [words[1] for words in commands() if words[0] == "bash"])
def test_every_script_is_there(script: str) -> None:
    assert (ROOT / script).is_file()


def test_every_linked_file_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_file_of_the_tree_is_there() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    folder = ROOT
    for line in tree[1].splitlines():
        if line and not line.startswith(" "):
            folder = ROOT / line.split()[0] if line.split()[0].endswith("/") else ROOT
            assert (ROOT / line.split()[0]).exists(), line
        elif line.strip():
            assert (folder / line.split()[0]).exists(), line
