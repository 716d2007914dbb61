"""The shape of the code: one direction of imports, one home of model names, files that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from clover.model.families import FAMILIES

SOURCE = Path(__file__).resolve().parents[1] / "src/clover"
ORDER = [
    "errors", "progress", "extras",
    "model.heads", "model.alike", "model.family", "model.rotation", "model.mla", "model.block", "model.families",
    "model.survey", "model.precision", "model.running", "model.answers", "model.traits",
    "decomposition.decompose", "decomposition.rotary", "decomposition.refit",
    "planning.plan", "planning.spend", "planning.budget",
    "calibration.visible", "calibration.calibrate",
    "attention.eager", "attention.ragged", "attention.cache", "attention.attention",
    "jobs.folders", "jobs.crew", "jobs.draft",
    "pruning.basis", "pruning.surgery", "pruning.checks", "pruning.classes", "pruning.checkpoint",
    "pruning.lossbudget", "pruning.prune",
    "streaming.shards", "streaming.pieces", "streaming.packed", "streaming.layout", "streaming.layerwise",
    "streaming.sequential", "streaming.stream",
    "measure.files", "measure.data", "measure.cost", "measure.bench", "measure.evaluate",
    "tuning.recipe", "tuning.targets", "tuning.config", "tuning.methods", "tuning.cores", "tuning.linear",
    "tuning.tuner", "tuning.training", "tuning.merging",
    "runtimes.export", "runtimes.graphs", "runtimes.onnx",
    "command.curve", "command.report", "command.demo", "command.show", "command.options", "command.cli",
]  # fmt: skip
"""A module may import only from modules above it; a package only from packages above it."""
KNOWING = {"model.families", "model.traits"}
"""Modules that know models by name: what their attention is called, and the ways of Whisper."""
ALGORITHM = [
    m
    for m in ORDER
    if not m.startswith(("measure.", "tuning.recipe", "tuning.training", "tuning.merging", "runtimes.", "command."))
]
"""Modules that know no model by name, save those."""
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

FILES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in SOURCE.rglob("*.py")}
MODULES = sorted(name for name in FILES if not name.endswith("__"))


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def own(names: Iterator[str]) -> set[str]:
    """Which of this project's modules are among them."""
    return {name.removeprefix("clover.") for name in names} & set(ORDER)


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
    assert set(MODULES) == set(ORDER), "put the new module into ORDER, below all that it imports"
    packages = [name.partition(".")[0] for name in ORDER if "." in name]
    assert len(list(groupby(packages))) == len(set(packages)), "the modules of a package stand together"
    assert {p.name for p in SOURCE.iterdir() if p.is_dir()} - {"__pycache__"} == set(packages)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    above = set(ORDER[: ORDER.index(module)])
    assert (found := own(imports(module))) <= above, (
        f"{module} imports {sorted(found - above)}, which may only import it"
    )
    if "clover" in imports(module):
        assert own(imports("__init__")) <= above, f"{module} imports the package as a whole, which imports it"


def model_names() -> set[str]:
    """``Llama`` and ``llama`` for each class of the table, and the class itself; ``ast`` is also Python's parser."""
    stems = {name.removesuffix("Attention") for name in FAMILIES}
    return {*FAMILIES, *stems, *(stem.lower() for stem in stems)} - {"ast"}


@pytest.mark.parametrize("module", MODULES)
def test_only_families_knows_attention_classes(module: str) -> None:
    known = set(FAMILIES) if module not in ALGORITHM else model_names()
    if module not in KNOWING:
        assert not known & set(words(module))


@pytest.mark.parametrize("module", ALGORITHM)
def test_the_algorithm_reads_no_model_of_transformers(module: str) -> None:
    assert not [name for name in imports(module) if name.startswith("transformers.models.") and "auto" not in name]


def test_the_check_for_names_would_find_one() -> None:
    assert {"LlamaAttention", "whisper", "Bert"} <= model_names()
    assert {"LlamaAttention", "WhisperAttention"} <= set(words("model.families"))


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_no_file_is_long(module: str) -> None:
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= 400, f"{module} has {lines} lines; split it by idea"


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_nothing_unpickles(module: str) -> None:
    assert not UNSAFE & {name.split(".")[0] for name in imports(module)}
    dotted = {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & (dotted | set(imports(module)))


@pytest.mark.parametrize("module", FILES)
def test_files_say_what_they_are_for(module: str) -> None:
    assert ast.get_docstring(tree(module))
