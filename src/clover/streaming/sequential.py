"""Calibration of a model that is never whole in memory: each block behind those that are already cut.

All moments are those of ``calibrate`` but one. What an error at a block's output costs can't be asked of a loss that
lies layers ahead, so it is asked of the layer's own output: the gradient there is noise of the size of each token's
hidden state over its square, carried back through the rest of this one layer. A cost of V-O is then a squared error of
the hidden state, relative to its square, instead of nats; it is comparable between layers, but knows nothing of what
later layers make of it.

Twice all batches go through all layers. First nothing is cut, and all costs are gathered for one plan. Then each block
is decomposed again by what comes out of the cut layers before it, cut to the plan, written, and carries its batches on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clover.calibration.calibrate import QUERIES, Moments, Watcher, warn_of_few, watching
from clover.errors import CloverError
from clover.jobs.crew import Crew
from clover.jobs.draft import Draft
from clover.model.answers import Masks, on, padding, valid
from clover.model.block import Block
from clover.model.precision import workplace
from clover.model.survey import survey
from clover.pruning.basis import find_basis
from clover.streaming.layerwise import Call, Stack, entered, run, stacks, walk
from clover.streaming.layout import BASES, DONE, Layout
from clover.streaming.packed import pack_costs
from clover.streaming.pieces import Pieces

STRIDE = 1_000_003
"""Between the seeds of batches: what is drawn for a batch must not depend on which process has it."""


@dataclass(frozen=True)
class Sample:
    """The batches of this process: their numbers among all, and masks that keep padding out."""

    numbers: tuple[int, ...]
    masks: tuple[Masks, ...]
    seed: int

    @classmethod
    def of(cls, batches: Sequence[Any], model: nn.Module, we: Crew, seed: int) -> tuple[Sample, list[Any]]:
        """This process's share of the batches.

        Raises:
            CloverError: no batches, or fewer than processes.
        """
        if len(batches) < we.size:
            raise CloverError(
                f"there are {len(batches)} calibration batches for {we.size} processes; give more, or start fewer"
                if batches
                else "the calibration data is empty; give at least one batch"
            )
        numbers = tuple(we.share(range(len(batches))))
        mine = [batches[i] for i in numbers]
        return cls(numbers, tuple(padding(batch, model) for batch in mine), seed), mine


def inside(layer: str, blocks: Sequence[Block], module: nn.Module) -> list[Block]:
    """The blocks of a layer, on a module of that layer with weights."""
    start = f"{layer}."
    mine = [block for block in blocks if block.name.startswith(start)]
    return [replace(block, module=module.get_submodule(block.name.removeprefix(start))) for block in mine]


def observe(
    module: nn.Module, blocks: Sequence[Block], inputs: Iterable[tuple[Tensor, Call]], sample: Sample, we: Crew
) -> list[Moments]:
    """Moments of a layer's blocks over the batches of all processes.

    Args:
        module: the layer, with weights; its blocks still whole.
        blocks: those of its blocks that are watched, see ``inside``.
        inputs: of the batches of this process.

    Raises:
        CloverError: see ``calibrate``.
    """
    watchers = [Watcher(block, QUERIES, torch.Generator()) for block in blocks]
    module.eval().requires_grad_(False)
    with watching(watchers):
        for at, (hidden, call) in enumerate(inputs):
            seed = sample.seed + crc32(blocks[0].name.encode()) + STRIDE * (sample.numbers[at] + 1)
            for i, watcher in enumerate(watchers):
                watcher.masks = sample.masks[at].of(watcher.block.part)
                watcher.generator.manual_seed(seed + i)
            noise = torch.Generator().manual_seed(seed)  # of the CPU: a GPU would draw others
            with torch.enable_grad():
                score = _likelihood(run(module, hidden, call)[0], sample.masks[at].of(blocks[0].part), noise)
            score.backward()
    for watcher in watchers:
        _add_up(watcher, we)
    return [watcher.moments() for watcher in watchers]


def _add_up(watcher: Watcher, we: Crew) -> None:
    """Sums over the batches of all processes."""
    counts = torch.tensor([watcher.rows, watcher.tokens])
    we.sum([counts, *(watcher.sums[name] for name in sorted(watcher.sums))])
    watcher.rows, watcher.tokens = counts.tolist()


def _likelihood(output: Tensor, masks: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Derivative by its mean of the log-likelihood of noise as large as each token's hidden state."""
    noise = torch.randn(output.shape, generator=generator, device="cpu").to(output.device)
    if output.dim() == 3:
        noise = noise * valid(output, masks).unsqueeze(-1)
    size = output.detach().float().square().mean(-1, keepdim=True).sqrt()
    return (output.float() / size.clamp_min(torch.finfo(torch.float32).tiny) * noise).sum()


@dataclass(frozen=True)
class Calibrated:
    """Decompose and cut by activations; the processes share the batches, the first of them cuts."""

    pieces: Pieces
    blocks: Sequence[Block]
    order: Sequence[Stack]
    model: PreTrainedModel
    """With weights outside its layers."""
    batches: Sequence[Any]
    sample: Sample
    fingerprint: str
    """Of all batches, those of other processes too."""

    @classmethod
    def of(
        cls,
        pieces: Pieces,
        blocks: Sequence[Block],
        calibration: Iterable[Any] | Callable[[PreTrainedModel], Iterable[Any]],
        we: Crew,
        seed: int,
    ) -> Calibrated:
        """Make ready.

        Raises:
            CloverError: no batches, fewer than processes, or blocks that are in no list of layers.
        """
        order = stacks(pieces.model, survey(pieces.model)[0])
        model = pieces.shell([name for stack in order for name in stack.layers])
        device = workplace(pieces.model.dtype)[0]
        batches = [on(b, device) for b in (calibration(model) if callable(calibration) else calibration)]
        sample, mine = Sample.of(batches, model, we, seed)
        return cls(pieces, blocks, _needed(model, order, blocks, batches), model, mine, sample, _fingerprint(batches))

    def survey(self, made: Draft, we: Crew) -> None:
        """Keep what the directions of all blocks cost in the draft."""
        reached: list[tuple[str, int, int]] = []

        def layer(name: str, inputs: Iterable[tuple[Tensor, Call]]) -> nn.Module:
            module, _, observed = self._layer(name, inputs, BASES, made, we)
            for block, moments in observed:
                reached.append((block.name, moments.tokens, len(moments.mean)))
                if we.leads:
                    made.keep(BASES, block.name, pack_costs(find_basis(block, moments).costs()))
            return module

        self._walk(layer, BASES, made, we)
        if we.leads:
            warn_of_few(reached)

    def cut(self, layout: Layout, made: Draft, we: Crew) -> None:
        """Write the cut of every block, each calibrated behind those before it."""

        def layer(name: str, inputs: Iterable[tuple[Tensor, Call]]) -> nn.Module:
            module, blocks, observed = self._layer(name, inputs, DONE, made, we)
            for block, moments in observed:
                if we.leads:
                    layout.write(block, find_basis(block, moments), made)
            if observed:
                we.meet()
            for block in blocks:
                layout.install(block, module, name)
            return module

        self._walk(layer, DONE, made, we)

    def _layer(
        self, name: str, inputs: Iterable[tuple[Tensor, Call]], kind: str, made: Draft, we: Crew
    ) -> tuple[nn.Module, list[Block], list[tuple[Block, Moments]]]:
        """A layer with its weights, its blocks, and these with their moments unless the draft has all of them."""
        module = self.pieces.fill(name)
        blocks = list(inside(name, self.blocks, module))
        if all(made.has(kind, block.name) for block in blocks):
            return module, blocks, []
        for block in blocks:
            block.heads().check_finite(block.name)
        return module, blocks, list(zip(blocks, observe(module, blocks, inputs, self.sample, we), strict=True))

    def _walk(self, layer: Callable[..., nn.Module], kind: str, made: Draft, we: Crew) -> None:
        """All batches through all layers, unless the draft has every block."""
        if not all(made.has(kind, block.name) for block in self.blocks):
            spill = made.folder / f"hidden-{we.rank}"
            shutil.rmtree(spill, ignore_errors=True)  # of a run that was killed
            walk(self.model, self.order, self.batches, layer, spill)
            shutil.rmtree(spill, ignore_errors=True)
        we.meet()


def _needed(
    model: nn.Module, order: Sequence[Stack], blocks: Sequence[Block], batches: Sequence[Any]
) -> Sequence[Stack]:
    """The lists of layers without those that nothing comes from: the images' of a model that is given text alone."""
    chosen = {stack.name for stack in stacks(model, blocks)}
    runs = [entered(model, order, batch) for batch in batches]
    if not all(chosen <= set(run) for run in runs):
        return order
    return [stack for stack in order if stack.name in chosen.union(*runs)]


def _fingerprint(batches: Iterable[Any]) -> str:
    """Tells whether these are still the same batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items() if isinstance(batch, Mapping) else [("", batch)]):
            held = value.contiguous().flatten().cpu() if isinstance(value, Tensor) else None
            found.update(f"{name} {getattr(value, 'shape', value)}".encode())
            found.update(b"" if held is None else held.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
