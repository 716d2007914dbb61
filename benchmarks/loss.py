"""What a cut loses: predicted, measured on kept-out calibration data, and true, on test data.

    python benchmarks/loss.py rank [MODEL ...]    # Q-K, V-O and both at 12.5 to 75 %
    python benchmarks/loss.py bound [MODEL ...]   # what clover prune --max-loss delivers for 1 to 20 %

MODEL: smollm2, gemma3 (made by gemma3.py; norms fix its Q-K), minilm, whisper-encoder (all when left out).

A third of the calibration data is kept out for measuring. Language models: 24 windows of 512 tokens, evenly spread over
WikiText-2 train; truth is log-perplexity over that of the dense model on the first tokens of test in windows of 1024,
in bfloat16. The others are calibrated as in embedding.py and speech.py; truth is what is measured, on test data of the
same form: MiniLM's relative squared error, the divergence of what Whisper writes of the test clips. "elsewhere" is that
of MiniLM on whole paragraphs, most of them shorter than the windows of the calibration.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

import embedding
import language
import speech
from clover.measure.data import text_tokens
from clover.measure.evaluate import perplexity
from clover.planning.budget import Share, make_plan
from clover.planning.plan import Plan
from clover.pruning.lossbudget import Forecast, compare, keep_apart, twin, within
from clover.pruning.prune import find_bases
from clover.pruning.surgery import operate
from common import DEVICE, MODELS, SEED, record, text

WINDOWS = 24
FIRST = {"smollm2": 24_576, "gemma3": 8_192}
SHARES = [0.25, 0.5, 0.125, 0.75, 0.375, 0.625]
BOUNDS = [0.02, 0.05, 0.1, 0.01, 0.2]
OTHERS = ("minilm", "whisper-encoder")


class Bench:
    """A model, its bases, and test data."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, calibration, self.truth = _language(name) if name in FIRST else _other(name)
        used, self.kept_out = keep_apart(calibration)
        part: Any = "encoder" if name == "whisper-encoder" else "all"
        self.bases = find_bases(self.model, part=part, calibration=used, seed=SEED)

    def cut(self, plan: Plan) -> torch.nn.Module:
        model = twin(self.model)
        operate(model, self.bases, plan)
        return model

    def keep(self, kind: str, result: dict) -> None:
        record(f"loss-{kind}" if self.name == "smollm2" else f"loss-{kind}-{self.name}", {"model": self.name} | result)


def _language(name: str) -> tuple[Any, list, Callable[[Any], float]]:
    tokenizer, model = AutoTokenizer.from_pretrained(MODELS / name), language.load(name).to(DEVICE)
    (train, start), (test, _) = (text_tokens(text(split), tokenizer) for split in ("train", "test"))

    def score(model: torch.nn.Module) -> float:
        half = copy.deepcopy(model).bfloat16()
        return math.log(perplexity(half, test, limit=FIRST[name], start=start).value)

    dense = score(model)
    return model, language.calibration(train, WINDOWS, start), lambda cut: score(cut) - dense


def _other(name: str) -> tuple[Any, list, Callable[[Any], float]]:
    if name == "minilm":
        model, calibration, test = (
            embedding.dense().to(DEVICE),
            list(embedding.calibration()),
            list(embedding.calibration("test")),
        )
    else:
        model = speech.dense().to(DEVICE)
        calibration, test = (list(speech.transcripts(split)) for split in ("calibration", "test"))
    return model, calibration, lambda cut: compare(model, cut, test).nats


def rank(bench: Bench) -> None:
    """Predicted, measured and true loss of 18 cuts; of 6 where norms fix Q-K."""
    costs = [basis.costs() for basis in bench.bases]
    forecast, points = Forecast.of(costs), []
    fixed = all(c.fixed_qk for c in costs)
    for qk, vo in [pair for s in SHARES for pair in ((s, 0.0), (0.0, s), (s, s)) if not (fixed and pair[0])]:
        cut = bench.cut(make_plan(costs, Share(qk), Share(vo)))
        found = compare(bench.model, cut, bench.kept_out)
        points.append({
            "qk": qk, "vo": vo, "qk_cost": forecast.loss(qk, 0), "vo_cost": forecast.loss(0, vo),
            "measured": found.nats, "error": found.error, "true": bench.truth(cut),
        })  # fmt: skip
        bench.keep("rank", {"points": points})


def bound(bench: Bench) -> None:
    """What is delivered for a bound."""
    runs: list[dict[str, Any]] = []
    for max_loss in BOUNDS:
        started = time.perf_counter()
        found = within(bench.model, bench.bases, bench.kept_out, max_loss)
        seconds = time.perf_counter() - started
        cut = bench.cut(found.plan)
        run = found.to_dict() | {"true": math.expm1(bench.truth(cut)), "seconds": round(seconds, 1)}
        if bench.name == "minilm":
            run["elsewhere"] = math.expm1(compare(bench.model, cut, embedding.paragraphs()[::4]).nats)
        runs.append(run)
        bench.keep("bound", {"runs": runs})


if __name__ == "__main__":
    kinds = {"rank": rank, "bound": bound}
    asked, every = sys.argv[1:], [*FIRST, *OTHERS]
    if unknown := [word for word in asked if word not in (*kinds, *every)]:
        raise SystemExit(f"{unknown[0]} is neither of {', '.join(kinds)} nor of {', '.join(every)}")
    for name in [n for n in every if n in asked] or every:
        bench = Bench(name)
        for kind in [k for k in kinds if k in asked] or kinds:
            kinds[kind](bench)
