"""No test passes whatever the code does: each asserts something, itself or through a function that it calls.

Run: pytest tests/test_assertions.py
"""

import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent


class Function(NamedTuple):
    """A function of the tests: whether an assertion stands in it, and the functions that it calls by their bare name."""

    asserts: bool
    called: frozenset[str]


def functions(tree: ast.Module) -> dict[str, Function]:
    found = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        asserts, called = False, set()
        for node in ast.walk(function):
            asserts |= isinstance(node, ast.Assert)
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                asserts |= name in ("raises", "warns", "fail") or name.startswith("assert_")
                if isinstance(node.func, ast.Name):
                    called.add(name)
        found[function.name] = Function(asserts, frozenset(called))
    return found


def empty_tests(sources: dict[str, str]) -> list[str]:
    """ "file: test" of every test that asserts nothing."""
    files = {name: functions(ast.parse(source)) for name, source in sources.items()}
    shared = {name: function for known in files.values() for name, function in known.items()}  # helpers are imported
    empty = []
    for file, known in files.items():
        for test in (name for name in known if name.startswith("test_")):
            open_names, seen = [test], {test}
            while open_names:
                function = known.get(open_names[-1]) or shared[open_names[-1]]
                if function.asserts:
                    break
                new = {name for name in function.called if name in shared} - seen
                open_names = [*open_names[:-1], *new]
                seen |= new
            else:
                empty.append(f"{file}: {test}")
    return empty


def test_a_test_without_an_assertion_is_found() -> None:
    source = """
def check(x): assert x
def go(): return 1
def test_one(): assert True
def test_two(): check(go())
def test_three(): torch.testing.assert_close(1, 1)
def test_four():
    with pytest.raises(ValueError): go()
def test_five(): go()
def test_six(): assertion = go()
"""
    assert empty_tests({"a.py": source}) == ["a.py: test_five", "a.py: test_six"]
    assert empty_tests({}) == []


def test_every_test_asserts_something() -> None:
    assert empty_tests({path.name: path.read_text() for path in sorted(TESTS.glob("*.py"))}) == []
