"""Prune a model that is larger than memory: from file to file, a block at a time, by one process or several.

First every block is decomposed, and its bases are kept on disk (a few d x d matrices a head). One plan is made of all
costs. Then every block is cut to it and written to its place; all other tensors are copied byte for byte. What is
finished is never done again: a run that was killed goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from clover.errors import CloverError, reason
from clover.jobs.crew import Crew, crew
from clover.jobs.draft import Draft, draft
from clover.jobs.folders import check_writable
from clover.model.block import Block
from clover.model.survey import blocks
from clover.planning.budget import Granularity, Limits
from clover.planning.plan import FORMAT
from clover.progress import track
from clover.pruning.basis import find_basis
from clover.pruning.prune import Part, plan_costs, rules, summary
from clover.streaming.layout import BASES, DONE, Layout
from clover.streaming.packed import pack, pack_costs, unpack, unpack_costs
from clover.streaming.pieces import Pieces
from clover.streaming.sequential import Calibrated
from clover.streaming.shards import INDEX, SINGLE, read_index

Calibration = Iterable[Any] | Callable[[PreTrainedModel], Iterable[Any]]


def prune_folder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    qk: float | None = None,
    vo: float | None = None,
    part: Part = "all",
    qk_threshold: float | None = None,
    vo_threshold: float | None = None,
    qk_energy: float | None = None,
    vo_energy: float | None = None,
    granularity: Granularity = "head",
    limits: Limits | None = None,
    calibration: Calibration | None = None,
    seed: int = 0,
    beside: tuple[Any, ...] = (),
    resume: bool = False,
) -> dict[str, float | int]:
    """Prune a model from folder to folder, holding one attention block in memory, or one layer to calibrate it.

    By the weights the result is that of ``load``, ``prune`` and ``save`` in float32, to the last bit. With calibration
    data it is another one, see ``sequential``. Started by ``torchrun`` or ``accelerate launch``, the processes
    share the blocks, or the calibration batches; the folder of ``out`` must be one for all of them.

    Args:
        model: a folder of safetensors or a hub name.
        out: the folder to make; must not exist. A draft of the same request, left by a run that was killed, is gone on
            with.
        qk, vo, part, qk_threshold, vo_threshold, qk_energy, vo_energy, granularity, limits: as in ``prune``.
        calibration: batches as for ``prune``, or what makes them from the model (most of its weights are missing).
        seed: of the samples that calibration draws.
        beside: tokenizers and processors to save with the model.
        resume: insist on a draft to go on with.

    Returns:
        What ``summary`` says of the pruned model.

    Raises:
        CloverError: as in ``prune``; files that are damaged or contradict each other; ``out`` exists, is being made by
            another run or can't be written.
    """
    qk_rule, vo_rule = rules(
        qk=qk, vo=vo, qk_threshold=qk_threshold, vo_threshold=vo_threshold, qk_energy=qk_energy, vo_energy=vo_energy
    )
    limits = limits or Limits()
    check_writable(out)
    with crew() as we:
        pieces = Pieces.open(local(model))
        found = blocks(pieces.model, part)
        request = {
            "model": pieces.source.fingerprint(), "config": _settings(pieces.model.config), "part": part,
            "format": FORMAT,
            "qk": repr(qk_rule), "vo": repr(vo_rule), "granularity": granularity, "limits": asdict(limits),
        }  # fmt: skip
        work: Weights | Calibrated = Weights(pieces, found)
        if calibration is not None:
            work = Calibrated.of(pieces, found, calibration, we, seed)
            request |= {"calibration": work.fingerprint, "seed": seed}
        with draft(out, request, we, kinds=(BASES, DONE), resume=resume) as made:
            work.survey(made, we)
            costs = [unpack_costs(made.load(BASES, block.name)) for block in found]
            plan = plan_costs(costs, qk_rule, vo_rule, granularity=granularity, limits=limits)
            layout = Layout.of(pieces, found, plan, made.out)
            layout.begin(made, we)
            with layout.copying(made, we):
                work.cut(layout, made, we)
            layout.finish(made, we, beside)
            return summary(layout.model)


def local(model: str | os.PathLike[str]) -> Path:
    """The folder of a model; a hub name is fetched first, of its weights those that transformers would load.

    Raises:
        CloverError: nothing there.
    """
    if os.path.isdir(model):
        return Path(model)

    def fetch(files: list[str]) -> Path:  # other formats of the same weights lie beside them and in folders
        return Path(snapshot_download(str(model), allow_patterns=files, ignore_patterns=["*/*"]))

    try:
        index = fetch(["*.json"]) / INDEX
        shards = set(read_index(index).values()) if index.exists() else set()
        return fetch(["*.json", SINGLE, *sorted(shards)])
    except Exception as error:  # of any kind: a hub is reached through many libraries
        raise CloverError(f"{model} is no model that can be loaded: {reason(error)}") from error


@dataclass(frozen=True)
class Weights:
    """Decompose and cut by the weights; the processes share the blocks."""

    pieces: Pieces
    blocks: Sequence[Block]

    def survey(self, made: Draft, we: Crew) -> None:
        """Keep the bases of all blocks, and what their directions cost, in the draft."""
        mine = [b for b in we.share(self.blocks) if not made.has(BASES, b.name)]
        for block, coming in zip(track(mine, "decompose"), [*mine[1:], None], strict=False):
            if coming is not None:
                self.pieces.expect(coming)
            real = self.pieces.real(block)
            real.heads().check_finite(block.name)
            basis = find_basis(real)
            made.keep(BASES, block.name, pack(basis) | pack_costs(basis.costs()))
        we.meet()

    def cut(self, layout: Layout, made: Draft, we: Crew) -> None:
        """Write the cut of every block."""
        for block in track([b for b in we.share(self.blocks) if not made.has(DONE, b.name)], "cut"):
            real = self.pieces.real(block)
            layout.write(real, unpack(real, made.load(BASES, block.name)), made)


def _settings(config: Any) -> dict[str, Any]:
    """A config without the path by which the model was named this time."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
