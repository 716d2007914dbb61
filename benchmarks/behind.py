"""Whether calibrating each block behind those that are cut already gains anything: SmolLM2, Q-K and V-O cut alike.

    python benchmarks/behind.py [SHARE ...]     (0.5 when left out)

uncut: all blocks are calibrated in the uncut model, as ``clover.prune`` does.
behind: each block again by what comes out of the cut blocks before it, as ``clover prune --stream`` does, with what an
error costs asked of the layer alone.
behind, whole model's prices: the same, but what an error costs is that of the uncut model.
behind, aimed at the uncut: as that, and values and output projection are fitted to what the uncut model's block puts
out, which would undo the errors of the blocks before.
Calibrated on 16 x 512 tokens of WikiText-2 train, one plan for all; perplexity on the first 12,288 tokens of test in
windows of 1024, bfloat16.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import language
from clover.decomposition.refit import fit
from clover.jobs.crew import Crew
from clover.measure.evaluate import perplexity
from clover.model.block import Block
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.planning.plan import Plan
from clover.pruning.basis import Basis, find_basis
from clover.pruning.lossbudget import twin
from clover.pruning.prune import find_bases, plan_ranks
from clover.pruning.surgery import filled, install, operate
from clover.streaming.layerwise import stacks, walk
from clover.streaming.sequential import Sample, inside, observe
from common import MODELS, SEED, record, text

SEQUENCES, FIRST = 16, 12_288
WAYS = ("behind", "behind, whole model's prices", "behind, aimed at the uncut")


@contextmanager
def outputs_of(found: Sequence[Block]) -> Iterator[dict[str, list[Tensor]]]:
    """Head outputs of blocks, ``(tokens, columns)`` a batch, while the block lasts."""
    seen: dict[str, list[Tensor]] = {block.name: [] for block in found}

    def keep(name: str) -> Any:
        return lambda _, args: seen[name].append(args[0].detach().flatten(0, 1))

    hooks = [block.projection("o").register_forward_pre_hook(keep(block.name)) for block in found]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def behind(model: Any, bases: Sequence[Basis], plan: Plan, batches: list, way: str, uncut: dict[str, Tensor]) -> Any:
    """The model cut to a plan, block after block."""
    model = twin(model)
    found, plans = blocks(model), {p.name: p for p in plan.blocks}
    known: Any = {basis.name: basis.moments for basis in bases}
    sample, mine = Sample.of(batches, model, Crew(), SEED)

    def layer(name: str, inputs: Any) -> nn.Module:
        module = model.get_submodule(name)
        (block,) = inside(name, found, module)
        with outputs_of([block]) as seen:
            (moments,) = observe(module, [block], inputs, sample, Crew())
        if way != "behind":
            moments = replace(moments, gradient=known[block.name].gradient)
        basis = find_basis(block, moments)
        if way == "behind, aimed at the uncut":
            parts = aimed(block, basis, plans[block.name], torch.cat(seen[block.name]), uncut[block.name])
        else:
            parts = filled(block, basis, plans[block.name])
        install(module, block, parts, f"{name}.")
        return module

    walk(model, stacks(model, found), mine, layer)
    return model


def aimed(block: Block, basis: Basis, plan: Any, here: Tensor, there: Tensor) -> Any:
    """The cut fitted to the output ``W there`` of the uncut model in place of ``W here``."""
    means = here.mean(0), there.mean(0)
    cross = ((there - means[1]).T @ (here - means[0])).double() / len(here)

    whole: Any = block.projection("o").weight
    with mock.patch("clover.pruning.basis.fit", lambda _, *rest: fit(whole.double() @ cross, *rest)):
        made: Any = filled(block, basis, plan)
    with torch.no_grad():
        made[block.core_name].o_proj.bias += whole @ (means[1] - means[0])
    return made


def main(shares: Sequence[float]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    train, test = (tokenizer(text(split), return_tensors="pt").input_ids[0] for split in ("train", "test"))
    model: Any = language.load()
    batches = language.calibration(train, SEQUENCES)
    bases = find_bases(model, calibration=batches, seed=SEED)
    with outputs_of(blocks(model)) as seen, torch.no_grad():
        for batch in batches:
            model.model(**batch, use_cache=False)
    uncut = {name: torch.cat(found) for name, found in seen.items()}

    def score(cut: Any) -> float:
        return perplexity(copy.deepcopy(cut).bfloat16(), test, limit=FIRST).value

    result: dict[str, Any] = {"dense": score(model), "sequences": SEQUENCES, "length": language.LENGTH, "first": FIRST}
    for share in shares:
        plan = plan_ranks(bases, Share(share), Share(share))
        whole = twin(model)
        operate(whole, bases, plan)
        result[str(share)] = {"uncut": score(whole)}
        for way in WAYS:
            result[str(share)][way] = score(behind(model, bases, plan, batches, way, uncut))
    record("behind", result)


if __name__ == "__main__":
    main([float(share) for share in sys.argv[1:]] or [0.5])
