"""What a cut of SmolLM2 loses: foretold, measured on kept-out calibration data, and in truth on test text.

    python benchmarks/loss.py rank   # Q-K, V-O and both at 12.5 to 75 %
    python benchmarks/loss.py bound  # what clover prune --max-loss delivers for 1 to 20 %

Calibration: 24 windows of 512 tokens, evenly spread over WikiText-2 train, a third of them kept out for measuring.
Truth: log-perplexity over that of the dense model on the first 24,576 tokens of test in windows of 1024, in bfloat16.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clover.budget import Share, make_plan
from clover.evaluate import perplexity
from clover.lossbudget import Forecast, compare, keep_apart, twin, within
from clover.plan import Plan
from clover.pruning import find_bases
from clover.surgery import operate
from common import MODELS, SEED, chosen, record, text

WINDOWS, LENGTH, FIRST = 24, 512, 24_576
SHARES = [0.25, 0.5, 0.125, 0.75, 0.375, 0.625]
BOUNDS = [0.02, 0.05, 0.1, 0.01, 0.2]


class Bench:
    """The model, its bases, and test text."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
        train, test = (tokenizer(text(s), return_tensors="pt").input_ids[0] for s in ("train", "test"))
        starts = torch.linspace(0, len(train) - LENGTH, WINDOWS).long().tolist()
        used, self.kept_out = keep_apart([{"input_ids": train[s : s + LENGTH][None]} for s in starts])
        self.model = AutoModelForCausalLM.from_pretrained(MODELS / "smollm2", dtype=torch.float32).eval()
        self.bases = find_bases(self.model, calibration=used, seed=SEED)
        self.test = test
        self.dense = self.score(self.model)

    def score(self, model: torch.nn.Module) -> float:
        """Log-perplexity on test text."""
        return math.log(perplexity(copy.deepcopy(model).bfloat16(), self.test, limit=FIRST).value)

    def cut(self, plan: Plan) -> torch.nn.Module:
        model = twin(self.model)
        operate(model, self.bases, plan)
        return model


def rank(bench: Bench) -> None:
    """Foretold, measured and true loss of 18 cuts."""
    costs = [basis.costs() for basis in bench.bases]
    forecast, points = Forecast.of(costs), []
    for qk, vo in [pair for s in SHARES for pair in ((s, 0.0), (0.0, s), (s, s))]:
        cut = bench.cut(make_plan(costs, Share(qk), Share(vo)))
        found = compare(bench.model, cut, bench.kept_out)
        points.append({
            "qk": qk, "vo": vo, "qk_cost": forecast.loss(qk, 0), "vo_cost": forecast.loss(0, vo),
            "measured": found.nats, "error": found.error, "true": bench.score(cut) - bench.dense,
        })  # fmt: skip
        record("loss-rank", {"dense": bench.dense, "points": points})


def bound(bench: Bench) -> None:
    """What is delivered for a bound."""
    runs: list[dict[str, Any]] = []
    for max_loss in BOUNDS:
        started = time.perf_counter()
        found = within(bench.model, bench.bases, bench.kept_out, max_loss)
        seconds = time.perf_counter() - started
        true = math.expm1(bench.score(bench.cut(found.plan)) - bench.dense)
        runs.append(found.to_dict() | {"true": true, "seconds": round(seconds, 1)})
        record("loss-bound", {"dense": bench.dense, "runs": runs})


if __name__ == "__main__":
    names = chosen(["rank", "bound"])
    bench = Bench()
    for name in names:
        {"rank": rank, "bound": bound}[name](bench)
