"""Mutation check: small faults put into the code one at a time, to see whether a test notices.

    python tests/mutants.py                                    # every module of the table below
    python tests/mutants.py detection.images.place --each 30   # 30 mutants of one module, drawn by a fixed seed

A mutant swaps an operator, comparison, constant, condition, reduction or the branches of ``torch.where``. A forked process
imports the module with it and runs the module's tests with ``-x``; torch, and what else the tests import, is loaded once.
What no test notices is printed, and the exit status is 1 if ``EQUIVALENT`` does not explain it.

Why not mutmut: version 3.8 is faster (20 mutants of ``detection/boxes.py`` in 3 s, here in 9 s), but changes functions alone, no
default of a config, neither reductions nor branches of ``where``, and what no test can notice is marked in the code, by lines.
"""

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "detection.boxes": ["boxes"],
    "detection.images.place": ["place", "augment"],
    "detection.models.anchors": ["anchors"],
    "detection.models.box_coders": ["box_coder", "litedet_loss"],
    "detection.postprocess": ["postprocess", "postprocess_reference"],
    "detection.training.assignment": ["matcher", "losses"],
    "detection.training.litedet_loss": ["litedet_loss"],
    "detection.training.losses": ["losses", "litedet_loss"],
    "detection.training.ssd_loss": ["losses"],
    "detection.training.task_aligned": ["task_aligned"],
}

# Mutants that no test can notice: (module, the line, what stood there, what stands there now) -> why.
EQUIVALENT = {
    (
        "detection.training.assignment",
        "bid = torch.where(unserved, bid, -1.0)",
        "1.0",
        "2.0",
    ): "every number below 0 is no bid",
    (
        "detection.training.assignment",
        "iou = torch.where(valid[..., None], paired_iou(boxes, anchors), -1.0)  # [B, M, A]",
        "1.0",
        "2.0",
    ): "every number below 0 is below the threshold, and no bid",
    (
        "detection.training.assignment",
        "bid, anchor = iou.masked_fill(claimed[:, None], -1.0).max(2)  # [B, M]",
        "1.0",
        "2.0",
    ): "every number below 0 is no bid",
    (
        "detection.models.anchors",
        "cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)  # [rows * columns, (x, y)]",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.models.anchors",
        "maps.append(torch.cat((cells, cells + 1), -1) * stride)",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.models.anchors",
        "cells = torch.cartesian_prod(cy, cx).flip(-1)  # [rows * columns, (x, y)]",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.models.box_coders",
        "if torch.compiler.is_compiling():",
        "if torch.compiler.is_compiling():",
        "if not torch.compiler.is_compiling():",
    ): "both ways give the same numbers, one faster, the other readable for compilers",
    (
        "detection.training.ssd_loss",
        "rank = background.argsort(dim=1, stable=True).argsort(dim=1)  # 0 = the hardest",
        "True",
        "False",
    ): "torch sorts stably on a CPU in either case",
    (
        "detection.training.task_aligned",
        "objects = torch.where(wanted, iou + _TIE * closeness, -1.0).argmax(1)  # [B, A]",
        "1.0",
        "2.0",
    ): "every overlap is above any number below 0",
    (
        "detection.postprocess",
        "boxes = to_image(boxes, placement).unflatten(-1, (2, 2)).clamp(min=0).minimum(limit).flatten(-2)",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.postprocess",
        "return boxes.double().clamp_(-_REACH, _REACH) + (groups.double() * (2 * _REACH + 1))[:, None]",
        "boxes.double().clamp_(-_REACH, _REACH) + (groups.double() * (2 * _REACH + 1))[:, None]",
        "boxes.double().clamp_(-_REACH, _REACH) - (groups.double() * (2 * _REACH + 1))[:, None]",
    ): "groups are as far apart on the other side",
    (
        "detection.postprocess",
        "groups = columns + C * torch.arange(B, device=columns.device)[:, None]",
        "columns + C * torch.arange(B, device=columns.device)[:, None]",
        "columns - C * torch.arange(B, device=columns.device)[:, None]",
    ): "the groups are other numbers, as different from each other",
    (
        "detection.postprocess",
        "return boxes.double().clamp_(-_REACH, _REACH) + (groups.double() * (2 * _REACH + 1))[:, None]",
        "1",
        "2",
    ): "further apart is apart too",
    (
        "detection.postprocess",
        "return boxes.double().clamp_(-_REACH, _REACH) + (groups.double() * (2 * _REACH + 1))[:, None]",
        "2",
        "3",
    ): "further apart is apart too",
    (
        "detection.postprocess",
        "count = wanted if self.config.nms_threshold == 1 else wanted + wanted // 2",
        "2",
        "3",
    ): "how much of the candidates is tried first changes the time, not what is found",
    (
        "detection.postprocess",
        "_REACH = 2.0**20",
        "2.0",
        "3.0",
    ): "any reach does that is beyond real boxes and leaves float64 its decimals",
    (
        "detection.postprocess",
        "_REACH = 2.0**20",
        "20",
        "21",
    ): "any reach does that is beyond real boxes and leaves float64 its decimals",
    (
        "detection.postprocess",
        'limits = original_sizes.to("cpu", torch.float32).flip(-1)  # [B, 2]: width, height',
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.postprocess",
        "pairs = pairs[pairs % class_logits.shape[-1] != 0]",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.postprocess",
        "found = self._each(raw) if on_host else _unpack(self.batched(raw).cpu())",
        "self._each(raw) if on_host else _unpack(self.batched(raw).cpu())",
        "self._each(raw) if not on_host else _unpack(self.batched(raw).cpu())",
    ): "both roads find the same; without a GPU that is all there is to see",
    (
        "detection.postprocess",
        "at_once = max(_AT_ONCE // N, 1)",
        "1",
        "2",
    ): "how many images are suppressed at once changes the time, not what is found",
    (
        "detection.postprocess",
        "_AT_ONCE = 2**14",
        "2",
        "3",
    ): "how many images are suppressed at once changes the time, not what is found",
    (
        "detection.postprocess",
        "_AT_ONCE = 2**14",
        "14",
        "15",
    ): "how many images are suppressed at once changes the time, not what is found",
    (
        "detection.postprocess",
        "count = wanted if self.config.nms_threshold == 1 else wanted + wanted // 2",
        "wanted + wanted // 2",
        "wanted - wanted // 2",
    ): "how much is tried first changes the time, not what is found",
    (
        "detection.postprocess",
        "if self.config.nms_threshold == 1:",
        "1",
        "2",
    ): "no IoU is above 1: suppression takes time and nothing goes",
    (
        "detection.postprocess",
        'on_host = raw.class_logits.device.type == "cpu"',
        "raw.class_logits.device.type == 'cpu'",
        "raw.class_logits.device.type != 'cpu'",
    ): "both roads find the same; without a GPU that is all there is to see",
    (
        "detection.postprocess",
        "for part in range(0, B, at_once) if self.config.nms_threshold < 1 else ():",
        "self.config.nms_threshold < 1",
        "self.config.nms_threshold <= 1",
    ): "at 1 all are kept already, and none goes",
    (
        "detection.postprocess",
        "math.log(threshold / (1 - threshold)) - 1e-3 if threshold else -math.inf",
        "threshold / (1 - threshold)",
        "threshold * (1 - threshold)",
    ): "a lower first sieve lets more through to the exact one",
    (
        "detection.postprocess",
        "math.log(threshold / (1 - threshold)) - 1e-3 if threshold else -math.inf",
        "0.001",
        "0.00125",
    ): "a lower first sieve lets more through to the exact one",
    (
        "detection.postprocess",
        "math.log(threshold / (1 - threshold)) - 1e-3 if threshold else -math.inf",
        "1",
        "2",
    ): "a lower first sieve lets more through to the exact one",
    (
        "detection.postprocess",
        "return torch.from_numpy(np.flatnonzero(values.detach().numpy() > least))",
        "values.detach().numpy() > least",
        "values.detach().numpy() >= least",
    ): "the exact sieve comes after this one",
    (
        "detection.postprocess",
        "if len(best) == wanted or count >= len(scores):",
        "count >= len(scores)",
        "count > len(scores)",
    ): "once more changes the time, not what is found",
    (
        "detection.postprocess",
        "for part in range(0, B, at_once) if self.config.nms_threshold < 1 else ():",
        "1",
        "2",
    ): "at 1 all are kept already, and none goes",
    (
        "detection.postprocess",
        "return ((boxes.unflatten(-1, (2, 2)) - offset) / scale).flatten(-2)  # corner by corner",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
    (
        "detection.training.litedet_loss",
        'return LiteDetLoss(self, box_coder, getattr(model.config, "one_to_one", False))',
        "False",
        "True",
    ): "the one config whose code is distributions has the field",
    ("detection.postprocess", "count *= 3", "3", "4"): "how fast the search widens changes its time, not what it finds",
    (
        "detection.postprocess",
        "visible = has_sides.all(-1)",
        "-1",
        "1",
    ): "the last of two dimensions is the one of number 1",
}

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_NAMES = {
    "max": "min",
    "minimum": "maximum",
    "amax": "amin",
    "argmax": "argmin",
    "any": "all",
    "sum": "mean",
    "floor": "ceil",
}
_NAMES |= {new: old for old, new in _NAMES.items()}


def mutations(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(what stands there, what to put there) of every mutant. Annotations, texts and docstrings are left alone."""
    skipped = set()
    for node in ast.walk(tree):
        of_zip = isinstance(node, ast.keyword) and node.arg == "strict"  # guards against what does not happen
        if of_zip or isinstance(node, ast.JoinedStr):
            skipped.update(map(id, ast.walk(node)))
        for name in ("annotation", "returns", "decorator_list"):
            value = getattr(node, name, None) or []
            for one in value if isinstance(value, list) else [value]:
                skipped.update(map(id, ast.walk(one)))
    for node in ast.walk(tree):
        if id(node) not in skipped:
            yield from ((node, new) for new in _mutants_of(node))


def _mutants_of(node: ast.AST) -> Iterator[ast.AST]:
    new = copy.copy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        new.ops = [_SWAPS[type(node.ops[0])](), *node.ops[1:]]
        yield new
    elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPS:
        new.op = _SWAPS[type(node.op)]()
        yield new
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1 if node.value == int(node.value) else node.value * 1.25)
    elif isinstance(node, ast.If | ast.IfExp):
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield new
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        new.attr = _NAMES[node.attr]
        yield new
    elif isinstance(node, ast.Name) and node.id in ("min", "max"):
        yield ast.Name(_NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
        new.args = [node.args[0], node.args[2], node.args[1]]
        yield new


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        self.generic_visit(node)
        return node


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree."""

    def __init__(self, module: str, tree: ast.Module, path: Path) -> None:
        self.module, self.tree, self.path = module, tree, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def passes(module: str, tree: ast.Module, path: Path, limit: int, imported: Path | None = None) -> tuple[bool, float]:
    """Whether the module's tests pass, in a process of their own, and its seconds of processor time.

    Args:
        module: its name.
        tree: what it is imported from.
        path: of its file.
        limit: seconds of processor time; a mutant that takes longer does not pass. (A busy or halted machine costs none.)
        imported: a file for the names of the modules that the tests import, besides the project's.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            sys.meta_path.insert(0, _Mutated(module, tree, path))
            files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS[module]]
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]))
            if imported:
                ours = {"__main__", "backbones", "configs", "detection"} | {
                    file.stem for file in ROOT.glob("tests/*.py")
                }
                imported.write_text("\n".join(name for name in sys.modules if name.partition(".")[0] not in ours))
        finally:
            os._exit(status)
    _, status, used = os.wait4(child, 0)
    return status == 0, used.ru_utime + used.ru_stime


def check(module: str, each: int | None, at_most: float) -> tuple[int, int]:
    """Prints what no test noticed -> (mutants run, those that nothing explains)."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    source = path.read_text()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        good, seconds = passes(module, ast.parse(source), path, 900, imported := Path(folder, "imported"))
        if not good:
            sys.exit(f"{module}: the tests fail without a mutant")
        for name in imported.read_text().splitlines():
            with contextlib.suppress(Exception):  # names that another module put there
                importlib.import_module(name)
    limit = int(20 + 5 * seconds)
    count = sum(1 for _ in mutations(ast.parse(source)))
    numbers = random.Random(module).sample(range(count), min(each or count, count))
    run = unexplained = 0
    for number in numbers:
        if time.monotonic() - start > at_most:
            break
        tree = ast.parse(source)
        old, new = list(mutations(tree))[number]
        line, before, after = old.lineno, *(ast.unparse(node).splitlines()[0] for node in (old, new))  # type: ignore[attr-defined]
        tree = ast.fix_missing_locations(_Replace(old, new).visit(tree))
        run += 1
        if passes(module, tree, path, limit)[0]:
            why = EQUIVALENT.get((module, source.splitlines()[line - 1].strip(), before, after), "")
            unexplained += not why
            print(f"{path.relative_to(ROOT)}:{line}: {before}  ->  {after}    {why or 'NOT NOTICED'}", flush=True)
    print(f"{module}: {run} of {count} mutants, {unexplained} not noticed and not explained", flush=True)
    return run, unexplained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all of them if none is named")
    parser.add_argument("--each", type=int, help="mutants of each module, drawn by a fixed seed; without it all")
    parser.add_argument("--minutes", type=float, default=600.0, help="for each module at most")
    args = parser.parse_args()
    if unknown := sorted(set(args.modules) - TESTS.keys()):
        parser.error(f"no tests are named for {', '.join(unknown)}")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    results = [check(module, args.each, 60 * args.minutes) for module in args.modules or TESTS]
    sys.exit(1 if any(unexplained for _, unexplained in results) else 0)


if __name__ == "__main__":
    main()
