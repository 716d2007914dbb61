"""SmolLM2 on WikiText-2: perplexity of the whole test split, dense and pruned without training.

    python benchmarks/language.py [--first N] [CONFIG ...]

CONFIG: dense, vo25, vo50, qk25, qk50, both25, both50 (all when left out). With --first only the first N tokens are
scored, under names of their own: a quick look.

Calibrated on 32 sequences of 512 tokens, evenly spread over the train split.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import clover
from clover.measure.evaluate import perplexity
from clover.planning.budget import Share
from clover.pruning.prune import apply, find_bases, plan_ranks
from common import DEVICE, MODELS, SEED, record, text

SHARES = {
    "dense": None,
    "vo25": (0, 0.25), "vo50": (0, 0.5),
    "qk25": (0.25, 0), "qk50": (0.5, 0),
    "both25": (0.25, 0.25), "both50": (0.5, 0.5),
}  # fmt: skip
SEQUENCES, LENGTH = 32, 512


def load(name: str = "smollm2") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


def calibration(
    tokens: torch.Tensor, sequences: int = SEQUENCES, start: int | None = None
) -> list[dict[str, torch.Tensor]]:
    """Windows at even distances, each behind the token that the model wants in front of any text, if it wants one."""
    front = tokens.new_tensor([] if start is None else [start])
    room = LENGTH - len(front)
    places = torch.linspace(0, len(tokens) - room, sequences).long().tolist()
    return [{"input_ids": torch.cat([front, tokens[at : at + room]])[None]} for at in places]


def main(first: int | None, names: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    test = tokenizer(text("test"), return_tensors="pt").input_ids[0]
    bases: Any = None
    for name in names or list(SHARES):
        model: Any = load().to(DEVICE)
        result = {}
        if shares := SHARES[name]:
            qk, vo = shares
            started = time.perf_counter()
            if bases is None:
                train = tokenizer(text("train"), return_tensors="pt").input_ids[0]
                bases = find_bases(load().to(DEVICE), calibration=calibration(train), seed=SEED)
            apply(model, bases, plan_ranks(bases, Share(qk), Share(vo)))
            result = {
                **clover.summary(model),
                "calibration": f"{SEQUENCES} sequences of {LENGTH} tokens of the train split",
                "seconds_to_prune": round(time.perf_counter() - started, 1),
            }
        kind = f"language-first-{first}" if first else "language"
        record(f"{kind}-{name}", perplexity(model, test, limit=first).to_dict() | result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, metavar="N", help="score only the first N tokens (a quick look)")
    parser.add_argument("names", nargs="*", metavar="CONFIG", help=", ".join(SHARES))
    options = parser.parse_args()
    main(options.first, options.names)
