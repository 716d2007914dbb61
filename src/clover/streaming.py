"""Prune a model that is larger than memory: from file to file, a block at a time, by one process or several.

First every block is decomposed, and its bases are kept on disk (a few d x d matrices a head). One plan is made of all
costs. Then every block is cut to it and written to its place; all other tensors are copied byte for byte. What is
finished is never done again: a run that was killed goes on where it was.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clover.basis import Basis, find_basis
from clover.budget import Costs, Granularity, Limits
from clover.calibrate import Moments
from clover.checkpoint import adopt, rebuild, write_config
from clover.crew import Crew, crew
from clover.decompose import Bases
from clover.draft import Draft, draft
from clover.errors import CloverError
from clover.families import Block
from clover.pieces import Pieces, cut
from clover.plan import Plan
from clover.progress import track
from clover.pruning import Part, plan_costs, rule, summary
from clover.shards import INDEX, Entry, Shard, form

BASES, DONE = "bases", "done"
COSTS = "costs."


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
    beside: tuple[Any, ...] = (),
    resume: bool = False,
) -> dict[str, float | int]:
    """Prune a model by its weights, from folder to folder, holding one attention block in memory.

    The result is that of ``load``, ``prune`` and ``save`` in float32, to the last bit. Started by ``torchrun`` or
    ``accelerate launch``, the processes share the blocks; the folder of ``out`` must be one for all of them.

    Args:
        model: a folder of safetensors or a hub name.
        out: the folder to make; must not exist. A draft of the same request, left by a run that was killed, is gone on
            with.
        qk, vo, part, qk_threshold, vo_threshold, qk_energy, vo_energy, granularity, limits: as in ``prune``.
        beside: tokenizers and processors to save with the model.
        resume: insist on a draft to go on with.

    Returns:
        What ``summary`` says of the pruned model.

    Raises:
        CloverError: as in ``prune``; files that are damaged or contradict each other; ``out`` exists, is being made by
            another run or can't be written.
    """
    rules = rule("qk", qk, qk_threshold, qk_energy), rule("vo", vo, vo_threshold, vo_energy)
    limits = limits or Limits()
    with crew() as we:
        pieces = Pieces.open(local(model))
        found = pieces.blocks(part)
        request = {
            "model": pieces.source.fingerprint(), "config": pieces.model.config.to_dict(), "part": part,
            "qk": repr(rules[0]), "vo": repr(rules[1]), "granularity": granularity, "limits": asdict(limits),
        }  # fmt: skip
        with draft(out, _plain(request), we, kinds=(BASES, DONE), resume=resume) as made:
            costs = decompose_all(pieces, found, made, we)
            plan = plan_costs(costs, *rules, granularity=granularity, limits=limits)
            return cut_all(pieces, found, plan, made, we, beside)


def local(model: str | os.PathLike[str]) -> Path:
    """The folder of a model; a hub name is fetched first, safetensors alone.

    Raises:
        CloverError: nothing there.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise CloverError(f"{model} is no model that can be loaded: {str(error).splitlines()[0]}") from error


def decompose_all(pieces: Pieces, found: Sequence[Block], made: Draft, we: Crew) -> list[Costs]:
    """Bases of all blocks, kept in the draft, and what their directions cost."""
    todo = [block for block in found if not made.has(BASES, block.name)]
    for block in track(we.share(todo), "decompose"):
        basis = find_basis(pieces.real(block))
        made.keep(BASES, block.name, pack(basis) | pack_costs(basis.costs()))
    we.meet()
    return [unpack_costs(made.load(BASES, block.name)) for block in found]


def cut_all(
    pieces: Pieces, found: Sequence[Block], plan: Plan, made: Draft, we: Crew, beside: tuple[Any, ...]
) -> dict[str, float | int]:
    """Cut every block to the plan, copy the rest, and give the folder its name."""
    layout = Layout.of(pieces, found, plan, made.out)
    layout.begin(made, we)
    plans = {block.name: block for block in plan.blocks}
    for block in track(we.share([b for b in found if not made.has(DONE, b.name)]), "cut"):
        real = pieces.real(block)
        basis = unpack(real, made.load(BASES, block.name))
        layout.write(block, cut(real, basis, plans[block.name], pieces.model.dtype))
        made.keep(DONE, block.name, {})
    layout.finish(made, we, beside)
    return summary(layout.model)


@dataclass(frozen=True)
class Layout:
    """Which tensor goes where: a file for each file of the source, cut tensors in the place of what they replace."""

    pieces: Pieces
    model: PreTrainedModel
    """The rewritten model, on the meta device."""
    shards: dict[str, Shard]
    rest: dict[str, dict[str, Entry]]
    """What each file takes over unchanged."""

    @classmethod
    def of(cls, pieces: Pieces, found: Sequence[Block], plan: Plan, folder: Path) -> Layout:
        model = copy.deepcopy(pieces.model)
        rebuild(model, plan)
        adopt(model, plan)
        gone = tuple(start for block in found for start in pieces.inside(block))
        rest: dict[str, dict[str, Entry]] = {file: {} for file in pieces.source.files}
        for key, name in pieces.names.items():
            if not key.startswith(gone):
                entry = pieces.source.entries[name]
                rest[entry.file.name][key] = entry
        tensors = {f: {n: (e.dtype, e.shape, e.size) for n, e in kept.items()} for f, kept in rest.items()}
        for block in found:
            inside = pieces.inside(block)
            tensors[pieces.home(block)] |= {k: form(t) for k, t in model.state_dict().items() if k.startswith(inside)}
        return cls(pieces, model, {f: Shard(folder / f, of) for f, of in tensors.items()}, rest)

    def begin(self, made: Draft, we: Crew) -> None:
        """Take the room for all files; those of an earlier run stay as they are."""
        if we.leads:
            new = [file for file, shard in self.shards.items() if shard.create()]
            if new:
                made.forget(DONE)
        we.meet()

    def write(self, block: Block, state: Mapping[str, Tensor]) -> None:
        """Put the tensors of a block's cut, by their names in the model, into their file."""
        self.shards[self.pieces.home(block)].write(state.items())

    def finish(self, made: Draft, we: Crew, beside: tuple[Any, ...]) -> None:
        """Copy what is unchanged, write what lies beside the weights, and give the folder its name."""
        for file in track(we.share([f for f in self.rest if not made.has(DONE, f)]), "copy"):
            self.shards[file].write(self.rest[file].items())
            made.keep(DONE, file, {})
        we.meet()
        if we.leads:
            write_config(self.model, made.out)
            for thing in beside:
                thing.save_pretrained(made.out)
            if self.pieces.source.indexed:
                (made.out / INDEX).write_text(json.dumps(self._index(), indent=2) + "\n")
            made.finish()
        we.meet()

    def _index(self) -> dict[str, Any]:
        sizes = {
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "total_size": sum(size for shard in self.shards.values() for _, size in shard.places.values()),
        }
        places = {name: file for file, shard in self.shards.items() for name in shard.places}
        return {"metadata": sizes, "weight_map": dict(sorted(places.items()))}


# --- a basis and its costs, as tensors ---


def pack(basis: Basis) -> dict[str, Tensor]:
    """A basis without its weights and moments."""
    packed: dict[str, Tensor] = {}
    for name, value in vars(basis).items():
        if isinstance(value, Tensor):
            packed[name] = value
        elif isinstance(value, Bases):
            packed |= {f"{name}.{key}": tensor for key, tensor in value._asdict().items()}
    return packed


def unpack(block: Block, packed: Mapping[str, Tensor], moments: Moments | None = None) -> Basis:
    """The basis again, beside the block that it is of."""
    heads = block.heads().double()
    here = {key: tensor.to(heads.q.device) for key, tensor in packed.items() if not key.startswith(COSTS)}
    values: dict[str, Any] = {key: tensor for key, tensor in here.items() if "." not in key}
    for name in {key.partition(".")[0] for key in here if "." in key}:
        values[name] = Bases(*(here[f"{name}.{key}"] for key in Bases._fields))
    return Basis(block, heads, moments, **values)


def pack_costs(costs: Costs) -> dict[str, Tensor]:
    """What the directions of a block cost; all that is no tensor becomes one of JSON's bytes."""
    tensors = {COSTS + key: value for key, value in vars(costs).items() if isinstance(value, Tensor)}
    others = {key: value for key, value in vars(costs).items() if not isinstance(value, Tensor)}
    return tensors | {COSTS: torch.tensor(list(json.dumps(others).encode()), dtype=torch.uint8)}


def unpack_costs(packed: Mapping[str, Tensor]) -> Costs:
    """What ``pack_costs`` packed."""
    others: dict[str, Any] = json.loads(bytes(packed[COSTS].tolist()))
    tensors = {k.removeprefix(COSTS): t for k, t in packed.items() if k.startswith(COSTS) and k != COSTS}
    return Costs(**others | tensors)


def _plain(request: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(request, default=str))
