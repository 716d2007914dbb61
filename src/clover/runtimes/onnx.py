"""Graphs in ONNX: written by PyTorch's exporter, then run by ONNX Runtime beside PyTorch before they are let out.

Everything is float32. Batch, sequence and cached tokens are free. A rewritten model's cache is flat: one "head" of
``(batch, 1, tokens, columns)`` a layer, its columns told by the graph's own inputs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clover.errors import CloverError, reason
from clover.extras import extra
from clover.jobs.folders import fresh_folder
from clover.progress import track
from clover.pruning.checkpoint import write_beside
from clover.runtimes.graphs import Graph, graphs

TOLERANCE = 1e-3
"""How far an output may lie from PyTorch's, in itself and relative to it."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(model: PreTrainedModel, path: str | os.PathLike[str], *, beside: tuple[Any, ...] = ()) -> dict[str, float]:
    """Write a model as ONNX, whole or not at all: a file for each of its ``graphs``, and the config.

    Args:
        model: rewritten by clover or not, float32; it is left in evaluation mode.
        path: the folder to make; must not exist.
        beside: tokenizers and processors to save with it.

    Returns:
        For each graph the largest difference to PyTorch that was seen.

    Raises:
        CloverError: the ``onnx`` extra is not installed, the folder can't be written, a graph can't be made, or it
            computes something else than PyTorch does.
    """
    check_installed()
    with fresh_folder(path) as folder:
        made = track(graphs(model.eval()), "export (minutes)")
        seen = {graph.name: _write(graph, folder / f"{graph.name}.onnx") for graph in made}
        told = (model.config, getattr(model, "generation_config", None), *beside)
        write_beside(tuple(thing for thing in told if thing is not None), folder)
    return seen


def check_installed() -> None:
    """Refuse early where a package of the ``onnx`` extra is missing."""
    for package in PACKAGES:
        extra(package, "onnx")


def _write(graph: Graph, file: Path) -> float:
    """Write one graph and compare it with PyTorch."""
    tensors = tuple(graph.fill(graph.free[0]).values())
    free = tuple({i: s for i, s in enumerate(shape) if isinstance(s, str)} for shape in graph.inputs.values())
    with _silence():
        try:
            program: Any = torch.onnx.export(
                graph.module, tensors, dynamo=True, verbose=False, dynamic_shapes=(free,),
                input_names=list(graph.inputs), output_names=list(graph.outputs), optimize=False,
            )  # fmt: skip
            _tidy(program.model)
        except Exception as error:  # whatever tracing or conversion met; the exporter has no error of its own for it
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise CloverError(f"{file.stem} can't be written as ONNX: {reason(cause)}; use --format padded") from error
        program.save(str(file))
    return compare(graph, file)


def _tidy(model: Any) -> None:
    """What the exporter's own optimisation does to these graphs.

    It has a rule besides (``slice_split_rule``) that looks at the whole graph at each of its nodes, for minutes.
    """
    optimizer: Any = extra("onnxscript.optimizer", "onnx")
    rewriter: Any = extra("onnxscript.rewriter", "onnx")
    rules: Any = extra("onnxscript.rewriter.rules.common", "onnx")
    passes: Any = extra("onnx_ir.passes.common", "onnx")
    optimizer.inline(model)
    optimizer.fold_constants(model)
    rewriter.rewrite(
        model, [rules.transpose_transpose_rule, rules.no_op_transpose_rule, rules.unsqueeze_unsqueeze_rule]
    )
    for tidied in (
        passes.RemoveUnusedNodesPass(), passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass(), passes.OutputFixPass(),
        passes.NameFixPass(),
    ):  # fmt: skip
        tidied(model)


def compare(graph: Graph, file: Path) -> float:
    """The largest difference between ONNX Runtime's outputs and PyTorch's over all sizes that the graph names.

    Raises:
        CloverError: a difference beyond ``TOLERANCE``, or a graph that doesn't run.
    """
    runtime: Any = extra("onnxruntime", "onnx")
    try:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return max(_difference(graph, session, free) for free in graph.free)
    except CloverError:
        raise
    except Exception as error:  # its errors have no common ancestor
        raise CloverError(f"ONNX Runtime can't run {file.stem}: {error}; use --format padded") from error


def _difference(graph: Graph, session: Any, free: Mapping[str, int]) -> float:
    inputs = graph.fill(free)
    wanted, found, worst = graph.run(inputs), run(session, inputs), 0.0
    for name, right in wanted.items():
        gap = (found[name] - right).abs()
        if found[name].shape != right.shape or not (gap <= TOLERANCE * (1 + right.abs())).all():
            raise CloverError(
                f"{graph.name}.onnx computes {name} wrongly for {dict(free)}: {gap.max().item():g} away from PyTorch; "
                "nothing was written; use --format padded"
            )
        worst = max(worst, gap.max().item()) if gap.numel() else worst
    return worst


def run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a session of ONNX Runtime on tensors, as many as it knows by name."""
    names = {i.name for i in session.get_inputs()}
    found = session.run(None, {k: v.contiguous().numpy() for k, v in inputs.items() if k in names})
    return {o.name: torch.from_numpy(v) for o, v in zip(session.get_outputs(), found, strict=True)}


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter talks of its own affairs, at length."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
