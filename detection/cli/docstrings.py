"""What a Python file says about itself, read without running it: importing a command or a recipe takes seconds (torch)."""

import ast
from pathlib import Path
from typing import NamedTuple


class Function(NamedTuple):
    """A public function of a file.

    Attributes:
        name: of the function.
        returns: its return annotation as it is written, "" without one.
        summary: the first line of its docstring, "" without one.
    """

    name: str
    returns: str
    summary: str


def summary_of(file: Path) -> str:
    """The first line of a file's docstring."""
    return _first_line(ast.parse(file.read_text(encoding="utf-8")))


def functions_of(file: Path) -> list[Function]:
    """The public functions of a file in their order."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    return [
        Function(node.name, ast.unparse(node.returns) if node.returns else "", _first_line(node))
        for node in nodes
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
