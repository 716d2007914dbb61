"""all-MiniLM-L6-v2 on WikiText-2: cosine between mean-pooled embeddings of the pruned and of the dense model.

    python benchmarks/embedding.py [CONFIG ...]     CONFIG: vo25, vo50, qk25, qk50, both25, both50 (all when left out)

Calibrated on 64 windows of 128 tokens of the train split, measured on paragraphs of the test split; beside it the
paper's weights-only metric.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertModel

import clover
from clover.measure.data import calibration_batches
from clover.measure.evaluate import embedding_cosine
from clover.planning.budget import Share
from clover.pruning.basis import Basis
from clover.pruning.prune import apply, find_bases, plan_ranks
from common import DATA, MODELS, SEED, chosen, record, text

SHARES = {
    "vo25": (0, 0.25), "vo50": (0, 0.5), "qk25": (0.25, 0), "qk50": (0.5, 0),
    "both25": (0.25, 0.25), "both50": (0.5, 0.5),
}  # fmt: skip
WINDOWS, LENGTH = 64, 128
PARAGRAPHS, LONGEST, BATCH = 512, 256, 32  # tokens of a paragraph: as sentence-transformers cuts for this model


@cache
def dense() -> BertModel:
    return AutoModel.from_pretrained(MODELS / "minilm", dtype=torch.float32).eval()


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODELS / "minilm")


def calibration(split: str = "train") -> Any:
    path = DATA / "wikitext2" / f"{split}.txt.gz"
    return calibration_batches(path, dense(), processor=tokenizer(), sequences=WINDOWS, length=LENGTH)


@cache
def bases(metric: str) -> list[Basis]:
    data = calibration() if metric == "activations" else None
    return find_bases(dense(), calibration=data, metric=metric, seed=SEED)  # type: ignore[arg-type]


@cache
def paragraphs() -> list[dict[str, torch.Tensor]]:
    """Paragraphs evenly spread over the test split, headings left out, in padded batches of like length."""
    lines = [line.strip() for line in text("test").splitlines() if line.strip() and not line.startswith(" =")]
    count = min(PARAGRAPHS, len(lines))
    some = sorted((lines[i * len(lines) // count] for i in range(count)), key=len)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return [dict(tokenizer()(some[i : i + BATCH], **options)) for i in range(0, count, BATCH)]


def cosine(metric: str, qk: float, vo: float) -> dict:
    model = copy.deepcopy(dense())
    apply(model, bases(metric), plan_ranks(bases(metric), Share(qk), Share(vo)))
    return embedding_cosine(dense(), model, paragraphs()).to_dict() | clover.summary(model)


if __name__ == "__main__":
    for name in chosen(SHARES):
        metrics = {"calibrated": "activations", "weights": "weights"}
        record(f"embedding-{name}", {arm: cosine(metric, *SHARES[name]) for arm, metric in metrics.items()})
