"""The files of a pruned model in the making, tensor by tensor."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from clover.errors import CloverError
from clover.jobs.crew import Crew
from clover.jobs.draft import Draft
from clover.model.block import Block
from clover.planning.plan import BlockPlan, Plan
from clover.progress import track
from clover.pruning.basis import Basis
from clover.pruning.checkpoint import write_beside, write_config
from clover.pruning.classes import adopt, rebuild
from clover.pruning.surgery import install, skeleton
from clover.streaming.pieces import Pieces, cut
from clover.streaming.shards import INDEX, Entry, Shard, form

BASES, DONE = "bases", "done"
"""Kinds of pieces in a draft: blocks that were decomposed, blocks and files that were written."""


@dataclass(frozen=True)
class Layout:
    """Which tensor goes where: a file for each file of the source, cut tensors in the place of what they replace."""

    pieces: Pieces
    model: PreTrainedModel
    """The rewritten model, on the meta device."""
    shards: dict[str, Shard]
    rest: dict[str, dict[str, Entry]]
    """What each file takes over unchanged."""
    plans: dict[str, BlockPlan]
    """Of the blocks that are cut, by their names."""

    @classmethod
    def of(cls, pieces: Pieces, found: Sequence[Block], plan: Plan, folder: Path) -> Layout:
        model = copy.deepcopy(pieces.model)
        rebuild(model, plan)
        adopt(model, plan)
        gone = tuple(start for block in found for start in block.replaced)
        rest: dict[str, dict[str, Entry]] = {file: {} for file in pieces.source.files}
        for key, entry in pieces.untouched(gone):
            rest[entry.file.name][key] = entry
        tensors = {f: {n: (e.dtype, e.shape, e.size) for n, e in kept.items()} for f, kept in rest.items()}
        state = model.state_dict()
        for block in found:
            tensors[pieces.home(block)] |= {k: form(t) for k, t in state.items() if k.startswith(block.replaced)}
        shards = {f: Shard(folder / f, of) for f, of in tensors.items()}
        return cls(pieces, model, shards, rest, {block.name: block for block in plan.blocks})

    def begin(self, made: Draft, we: Crew) -> None:
        """Take the room for all files; those of an earlier run stay as they are."""
        if we.leads:
            new = [shard for shard in self.shards.values() if not shard.exists()]
            if new:
                made.forget(DONE)  # before a file is begun: a mark must never stand beside an empty one
            for shard in new:
                shard.create()
        we.meet()

    def write(self, block: Block, basis: Basis, made: Draft) -> None:
        """Cut a block, put its tensors into their file, and say so in the draft."""
        state = cut(block, basis, self.plans[block.name], self.pieces.model.dtype)
        self.shards[self.pieces.home(block)].write(state.items())
        made.keep(DONE, block.name, {})

    def install(self, block: Block, layer: nn.Module, layer_name: str) -> None:
        """Put the cut of a block that was written into the layer that holds it, in the dtype of the layer."""
        made = skeleton(block, self.plans[block.name])
        shard = self.shards[self.pieces.home(block)]
        for name, module in made.items():
            module.load_state_dict({key: shard.read(f"{name}.{key}") for key in module.state_dict()})
        install(layer, block, made, f"{layer_name}.")

    @contextmanager
    def copying(self, made: Draft, we: Crew) -> Iterator[None]:
        """Copy what is unchanged while the caller computes; the end of the block waits for it.

        The disk is as slow as the decompositions, and neither needs the other. What fails there is raised at the end.
        """
        given_up = Event()

        def copy(file: str) -> None:
            self.shards[file].write(takewhile(lambda _: not given_up.is_set(), self.rest[file].items()))
            if not given_up.is_set():
                made.keep(DONE, file, {})

        with ThreadPoolExecutor(1) as thread:
            files = [thread.submit(copy, f) for f in we.share(list(self.rest)) if not made.has(DONE, f)]
            try:
                yield
                for file in track(files, "copy"):
                    file.result()
            except BaseException:
                given_up.set()
                raise

    def finish(self, made: Draft, we: Crew, beside: tuple[Any, ...]) -> None:
        """Write what lies beside the weights, and give the folder its name.

        Raises:
            CloverError: a piece is not there.
        """
        we.meet()
        if we.leads:
            if missing := [piece for piece in (*self.rest, *self.plans) if not made.has(DONE, piece)]:
                raise CloverError(f"{missing[0]} was not written to {made.out}; give the same command again")
            write_config(self.model, made.out)
            write_beside(beside, made.out)
            if self.pieces.source.indexed:
                (made.out / INDEX).write_text(json.dumps(self._index(), indent=2) + "\n")
            made.finish()
        we.meet()

    def _index(self) -> dict[str, Any]:
        sizes = {
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "total_size": sum(entry.size for shard in self.shards.values() for entry in shard.entries.values()),
        }
        places = {name: file for file, shard in self.shards.items() for name in shard.entries}
        return {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
