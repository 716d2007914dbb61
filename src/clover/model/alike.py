"""Whether one attention class computes as another, under a new name.

transformers copies code from model to model and renames it. Two classes are alike if their syntax trees are, and those
of all that they use from their own files, whatever it is called there. What does not decide how they compute does not
count: annotations, docstrings, the decorators of the class itself, the order and the defaults of arguments, and of a
constructor all but the classes that it uses; what it sets is read from the module. Files are read, not imported.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
import sys
from collections.abc import Container, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import transformers


@cache
def alike(kind: type, known: Sequence[str]) -> str | None:
    """The first of the ``known`` classes of transformers whose code is that of ``kind``; None where there is none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or kind.__name__ not in _definitions(Path(file)):
        return None
    own, files = code(kind.__name__, Path(file)), _files()
    return next((name for name in known if name in files and code(name, files[name]) == own), None)


@cache
def _files() -> dict[str, Path]:
    """Where transformers defines each class of attention."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+Attention)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = file
    return found


@cache
def _definitions(file: Path) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Classes and functions at the top of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


@cache
def code(name: str, file: Path, above: tuple[str, ...] = ()) -> str:
    """A digest of a definition, in which those that it uses, of the same file, stand for their names.

    Args:
        above: definitions on the way here; one that uses itself, or these, is told by its place.
    """
    found, above = _definitions(file), (*above, name)
    node = _Bare(found).visit(copy.deepcopy(found[name]))
    node.name, node.decorator_list = "", []
    for used in ast.walk(node):
        if isinstance(used, ast.Name) and used.id in above:
            used.id = f"^{above.index(used.id)}"
        elif isinstance(used, ast.Name) and used.id in found:
            used.id = code(used.id, file, above)
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()


class _Bare(ast.NodeTransformer):
    """Takes away what does not decide how a class computes."""

    def __init__(self, own: Container[str]) -> None:
        self.own = own  # what the file defines itself

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        if node.name == "__init__":
            used = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in self.own]
            node.args, node.body = ast.arguments([], [], None, [], [], None, []), [ast.Expr(n) for n in used]
            return node
        if node.name == "forward":
            node.args.args[2:] = sorted(node.args.args[2:], key=lambda a: a.arg)  # after the module and the states
            node.args.defaults = []
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign | None:
        return ast.Assign([node.target], self.visit(node.value)) if node.value else None

    def _without_docstring(self, node: ast.ClassDef | ast.FunctionDef) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)
