"""The shape of the code: one direction of imports, one home of model names, files that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from clover.families import FAMILIES

SOURCE = Path(__file__).resolve().parents[1] / "src/clover"
ORDER = [
    "errors", "progress", "folders", "plan", "decompose", "heads", "rotary", "alike", "family", "latent",
    "block", "families", "survey", "spend", "budget", "layerwise", "answers", "precision", "visible",
    "calibrate", "refit", "ragged", "basis", "cache", "eager", "attention", "surgery", "checks", "classes",
    "checkpoint", "lossbudget", "pruning", "export", "targets", "config", "cores", "linear", "tuner", "crew",
    "shards", "pieces", "draft", "packed", "layout", "sequential", "streaming", "files", "traits", "data",
    "cost", "graphs", "onnx", "bench", "evaluate", "curve", "report", "demo", "recipe", "training", "show",
    "options", "cli",
]  # fmt: skip
"""A module may import only from modules to its left."""
ALGORITHM = ORDER[: ORDER.index("files")]
"""Modules that know no model by name, save ``families``."""
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MODULES = sorted(p.stem for p in SOURCE.glob("*.py") if p.stem not in ("__init__", "__main__"))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text())


def imports(module: str) -> Iterator[str]:
    """Every module that a module imports, at its top or inside a function."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import in line {node.lineno}"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def docstrings(module: str) -> set[int]:
    """Identities of the string nodes that only stand there to be read."""
    alone = (node.value for node in ast.walk(tree(module)) if isinstance(node, ast.Expr))
    return {id(value) for value in alone if isinstance(value, ast.Constant)}


def words(module: str) -> Iterator[str]:
    """Every word in the code of a module: names, attributes, imports and strings, without comments and docstrings."""
    skip = docstrings(module)
    texts = list(imports(module))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Name):
            texts.append(node.id)
        elif isinstance(node, ast.Attribute):
            texts.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            texts.append(node.value)
    for text in texts:
        yield from re.split(r"[^A-Za-z0-9]+", text)


def test_every_module_has_its_place() -> None:
    assert set(MODULES) <= set(ORDER), "put the new module into ORDER, right of all that it imports"
    assert not [p for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    left = ORDER[: ORDER.index(module)]
    own = {name.split(".")[1] for name in imports(module) if name.startswith("clover.")} & set(ORDER)
    assert own <= set(left), f"{module} imports {sorted(own - set(left))}, which may only import it"
    if "clover" in imports(module):
        public = {name.split(".")[1] for name in imports("__init__") if name.startswith("clover.")} & set(ORDER)
        assert public <= set(left), f"{module} imports the package as a whole, which imports it"


def model_names() -> set[str]:
    """``Llama`` and ``llama`` for each class of the table, and the class itself; ``ast`` is also Python's parser."""
    stems = {name.removesuffix("Attention") for name in FAMILIES}
    return {*FAMILIES, *stems, *(stem.lower() for stem in stems)} - {"ast"}


@pytest.mark.parametrize("module", MODULES)
def test_only_families_knows_attention_classes(module: str) -> None:
    known = set(FAMILIES) if module not in ALGORITHM else model_names()
    if module != "families":
        assert not known & set(words(module))


@pytest.mark.parametrize("module", ALGORITHM)
def test_the_algorithm_reads_no_model_of_transformers(module: str) -> None:
    assert not [name for name in imports(module) if name.startswith("transformers.models.") and "auto" not in name]


def test_the_check_for_names_would_find_one() -> None:
    assert {"LlamaAttention", "whisper", "Bert"} <= model_names()
    assert {"LlamaAttention", "WhisperAttention"} <= set(words("families"))


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_no_file_is_long(module: str) -> None:
    lines = len((SOURCE / f"{module}.py").read_text().splitlines())
    assert lines <= 400, f"{module}.py has {lines} lines; split it by idea"


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_nothing_unpickles(module: str) -> None:
    assert not UNSAFE & {name.split(".")[0] for name in imports(module)}
    dotted = {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & (dotted | set(imports(module)))


@pytest.mark.parametrize("module", MODULES)
def test_files_say_what_they_are_for(module: str) -> None:
    assert ast.get_docstring(tree(module))
