"""This project and its peers, side by side: one model, one calibration pass, one evaluation, every ratio.

    python benchmarks/frontier.py MODEL [METHOD ...] [--ratios R ...] [--choice]

MODEL: smollm2 (perplexity of the first 24,576 tokens of WikiText-2 test, windows of 1024), gemma3 (made by gemma3.py;
the first 8,192 tokens; norms fix its Q-K, so the share goes from V-O alone), whisper-encoder,
whisper-decoder, whisper-cross (word error rate of the test split, and the divergence from the dense model in what it
writes of it, nats a token: 12 clips are enough to tell methods apart by that), minilm (cosine to the dense embeddings,
every fourth batch of embedding.py's paragraphs).
METHOD: dense, clover, clover-weights and those of peers.py (all when left out). --choice scores 32 questions of each of
the eight commonsense sets instead (smollm2). Each result is a file of its own, and what has one is not run again.

The share is removed from Q-K and V-O alike. Peers are evaluated with their cut multiplied out into the model's own
class. Evaluated in bfloat16, MiniLM in float32; calibrated in float32.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

import clover
import embedding
import language
import speech
from clover.calibration.calibrate import Moments, calibrate
from clover.measure.data import text_tokens
from clover.measure.evaluate import embedding_cosine, multiple_choice, perplexity
from clover.measure.files import read_questions
from clover.model.block import Block
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.pruning.basis import Basis, find_basis
from clover.pruning.lossbudget import compare
from clover.pruning.prune import apply, plan_ranks
from clover.runtimes.export import pad
from common import DATA, DEVICE, MODELS, RESULTS, SEED, record, text
from facts import Facts, watching
from peers import METHODS, Cut, Inapplicable

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
FIRST = {"smollm2": 24_576, "gemma3": 8_192}
SEQUENCES = {"smollm2": 32, "gemma3": 16}
QUESTIONS = 32
SCRATCH = Path(os.environ.get("CLOVER_SCRATCH", tempfile.gettempdir()))
OURS = ("clover", "clover-weights")


# --- models: how each is loaded, calibrated and measured ---


@cache
def dense(name: str) -> Any:
    if name in FIRST:
        return language.load(name).to(DEVICE)
    return embedding.dense() if name == "minilm" else speech.dense()


def part(name: str) -> str:
    return name.removeprefix("whisper-") if name.startswith("whisper") else "all"


@cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(MODELS / name)


@cache
def tokens(name: str, split: str) -> tuple[Tensor, int | None]:
    return text_tokens(text(split), tokenizer(name))


def calibration(name: str) -> list[dict[str, Tensor]]:
    if name in FIRST:
        train, start = tokens(name, "train")
        return language.calibration(train, SEQUENCES[name], start)
    if name == "minilm":
        return list(embedding.calibration())
    return speech.calibration()


@cache
def measured(name: str) -> tuple[list[Basis], list[Facts]]:
    """This project's bases and the peers' facts, of the same tokens in the same pass.

    Calibrated a batch at a time, each with a seed of its own, and kept on disk, so that a run that was cut off goes on.
    """
    found = blocks(dense(name), part(name))
    sums: Any
    facts: Any
    state = SCRATCH / f"clover-frontier-{name}.pt"
    done, sums, facts = (
        torch.load(state, map_location=next(dense(name).parameters()).device) if state.exists() else (0, None, None)
    )
    batches = calibration(name)
    for i in range(done, len(batches)):
        with watching(dense(name), found) as seen:
            moments = [_raw(m) for m in calibrate(dense(name), found, [batches[i]], seed=SEED + i)]
        counted = [{k: (v, f.counts[k]) for k, v in f.sums.items()} for f in seen]
        sums = moments if sums is None else [_add(a, b) for a, b in zip(sums, moments, strict=True)]
        facts = counted if facts is None else [_merge(a, b) for a, b in zip(facts, counted, strict=True)]
        if (i + 1) % 4 == 0 or i + 1 == len(batches):
            torch.save((i + 1, sums, facts), state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    bases = [find_basis(block, _moments(s)) for block, s in zip(found, sums, strict=True)]
    filled = [
        Facts(block, {k: v for k, (v, _) in f.items()}, {k: n for k, (_, n) in f.items()})
        for block, f in zip(found, facts, strict=True)
    ]
    return bases, filled


def _raw(moments: Moments) -> dict[str, Tensor | int]:
    """Sums over tokens, which can be added; the covariance of the outputs becomes a second moment."""
    second = moments.output + moments.mean.outer(moments.mean)
    sums = {k: v * moments.tokens for k, v in vars(replace(moments, output=second)).items() if k != "tokens"}
    return sums | {"tokens": moments.tokens}


def _moments(sums: dict[str, Any]) -> Moments:
    found = Moments(**{k: v / sums["tokens"] for k, v in sums.items() if k != "tokens"}, tokens=sums["tokens"])
    return replace(found, output=found.output - found.mean.outer(found.mean))


def _add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: a[k] + b[k] for k in a}


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: (a[k][0] + b[k][0], a[k][1] + b[k][1]) for k in a}


def quality(name: str, model: Any) -> dict:
    if name in FIRST:
        test, start = tokens(name, "test")
        return perplexity(model.to(torch.bfloat16), test, limit=FIRST[name], start=start).to_dict()
    if name == "minilm":
        return embedding_cosine(dense(name), model, embedding.paragraphs()[::4]).to_dict()
    nats = compare(dense(name), model, speech.transcripts()).nats
    return speech.wer(model.to(torch.bfloat16)) | {"nats": nats}


def choice(_: str, model: Any) -> dict:
    """Share of right answers, by likelihood, of each commonsense set and on average."""
    model = model.to(torch.bfloat16)
    scores = {
        file.name.partition(".")[0]: multiple_choice(
            model, tokenizer("smollm2"), read_questions(file), limit=QUESTIONS
        ).value
        for file in sorted((DATA / "commonsense").glob("*.test.jsonl.gz"))
    }
    return {"task": "choice", "value": sum(scores.values()) / len(scores), "sets": scores, "questions": QUESTIONS}


# --- methods: a smaller model, and its size ---


def smaller(name: str, method: str, share: float) -> tuple[Any, dict]:
    if method in OURS:
        return _ours(name, method, share)
    cuts = METHODS[method](measured(name)[1], share)
    model = copy.deepcopy(dense(name))
    found = blocks(model, part(name))
    whole = [b.heads() for b in found]
    for block, cut in zip(found, cuts, strict=True):
        write(block, cut)
    sizes = {
        "attention_parameters_left": sum(c.parameters for c in cuts) / sum(h.parameters() for h in whole),
        "cache_left": sum(c.cached for c in cuts) / sum(h.k[..., 0].numel() + h.v[..., 0].numel() for h in whole),
    }
    return model, sizes


def _ours(name: str, method: str, share: float) -> tuple[Any, dict]:
    bases, granularity = measured(name)[0], "head"
    if method == "clover-weights":  # the paper's: no data, one rank for all heads
        bases, granularity = [find_basis(b) for b in blocks(dense(name), part(name))], "model"
    qk = Share(0.0 if bases[0].block.normed else share)
    plan = plan_ranks(bases, qk, Share(share), granularity=granularity)  # type: ignore[arg-type]
    model = copy.deepcopy(dense(name))
    apply(model, bases, plan)
    size = clover.summary(model)
    sizes = {
        "attention_parameters_left": size["attention_parameters_after"] / size["attention_parameters_before"],
        "cache_left": sum(b.qk_kept + b.vo_kept for b in plan.blocks)
        / sum(b.kv_heads * (b.qk + b.vo) for b in plan.blocks),
    }
    return pad(model), sizes


@torch.no_grad()
def write(block: Block, cut: Cut) -> None:
    """Put a cut into a block of the model's own class."""
    module: Any
    for which in "qkv":
        module, rows = block.projection(which), block.rows(which).flatten()
        _matrix(module)[rows] = getattr(cut.heads, which).flatten(0, -2).to(_matrix(module).dtype)
        bias = getattr(cut.heads, f"{which}_bias")
        if bias is not None:
            module.bias[rows] = bias.flatten().to(module.bias.dtype)
    output: Any = block.projection("o")
    _matrix(output).copy_(cut.heads.o.permute(2, 0, 1, 3).flatten(1))
    if cut.heads.o_bias is not None:
        output.bias = nn.Parameter(cut.heads.o_bias.to(output.weight.dtype))
    if cut.behind is not None:
        core: Any = block.core
        core.behind = cut.behind
        core.config = copy.copy(core.config)
        core.config._attn_implementation = "behind"


def _matrix(module: Any) -> Tensor:
    """The weight as ``(out, in)``."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _behind(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention whose keys are mapped behind the rotation."""
    return sdpa_attention_forward(module, query, key @ module.behind.to(key.dtype).mT, value, *args, **kwargs)


AttentionInterface.register("behind", _behind)


# --- runs ---


def run(name: str, method: str, share: float, score: Callable[[str, Any], dict], label: str) -> None:
    target = f"frontier-{label}-{method}" + (f"-{1000 * share:03.0f}" if share else "")
    if (RESULTS / f"{target}.json").exists():
        return
    try:
        model, sizes = (smaller if share else _dense)(name, method, share)
    except Inapplicable as reason:
        print(f"{label}, {method}: {reason}")
        return
    about = {"model": label, "method": method, "removed": share}
    record(f"{target}", about | sizes | score(name, model))


def _dense(name: str, *_: Any) -> tuple[Any, dict]:
    return copy.deepcopy(dense(name)), {"attention_parameters_left": 1.0, "cache_left": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", choices=["smollm2", "gemma3", "whisper-encoder", "whisper-decoder", "whisper-cross", "minilm"]
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, metavar="R")
    parser.add_argument("--choice", action="store_true", help="commonsense questions instead of perplexity")
    options = parser.parse_args()
    known = ["dense", *OURS, *METHODS]
    if unknown := [m for m in options.methods if m not in known]:
        parser.error(f"unknown method {unknown[0]}; choose from {', '.join(known)}")
    if options.choice and options.model != "smollm2":
        parser.error("only smollm2 answers questions")
    score, label = (choice, "smollm2-choice") if options.choice else (quality, options.model)
    for share in options.ratios:
        for method in options.methods or known:
            run(options.model, method, 0.0 if method == "dense" else share, score, label)


if __name__ == "__main__":
    main()
