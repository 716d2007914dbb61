"""Whisper-base on LJSpeech: word error rate of the test split, dense and pruned without training.

    python benchmarks/speech.py [GROUP ...]     (all when left out)

GROUP: dense; vanilla, weights and calibrated (the encoder at the paper's shares and beyond); thresholds (the paper's
rule, encoder); decoder and cross (calibrated sweeps); divided (totals of the encoder that are divided between Q-K and
V-O by what a cut of either loses on a third of the calibration clips, kept out of the bases that decide); joined
(equal shares of the encoder, calibrated by clips alone, by clips that fill windows, and by these in two orders, which
is the default of the command and what all others do). One result file each, with a row for every pruned model.
Calibrated on the manifest's calibration split, float32.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoProcessor, WhisperForConditionalGeneration

import clover
from clover.measure.data import calibration_batches
from clover.measure.evaluate import word_error_rate
from clover.measure.files import read_manifest
from clover.model.survey import blocks
from clover.planning.budget import Rule, Share, Threshold
from clover.pruning.basis import Basis
from clover.pruning.lossbudget import gauge, keep_apart
from clover.pruning.prune import apply, find_bases, plan_ranks
from common import DATA, MODELS, SEED, chosen, record

MANIFEST = DATA / "speech" / "manifest.tsv"
PAPER, BEYOND = (0.5601, 0.3682), (0.75, 0.50)
ENCODER = [PAPER, BEYOND]
SWEEP = [(0.25, 0.25), (0.50, 0.50), PAPER, BEYOND]
THRESHOLDS = (5e-3, 6e-3)
TOTALS, NATS = (0.5, 0.625, 0.75), 0.1
LIMIT: int | None = None  # test utterances; None is all


@cache
def dense() -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(MODELS / "whisper-base", dtype=torch.float32).eval()


@cache
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODELS / "whisper-base")


def calibration(joined: int = 2) -> list[Any]:
    return calibration_batches(MANIFEST, dense(), processor=processor(), split="calibration", joined=joined)


@cache
def transcripts(split: str = "test") -> list[Any]:
    """Each clip by itself, with its text."""
    return calibration_batches(MANIFEST, dense(), processor=processor(), split=split, joined=0)


@cache
def bases(part: str, metric: str, joined: int = 2) -> list[Basis]:
    data = calibration(joined) if metric == "activations" else None
    return find_bases(dense(), part=part, calibration=data, metric=metric, seed=SEED)  # type: ignore[arg-type]


def wer(model: Any) -> dict:
    score = word_error_rate(model, processor(), read_manifest(MANIFEST, "test"), limit=LIMIT)
    return {"task": score.task, "value": score.value, "protocol": score.protocol}


def pruned(part: str, metric: str, qk: Rule, vo: Rule, joined: int = 2) -> dict:
    """One model cut by CLOVER."""
    model, found = copy.deepcopy(dense()), bases(part, metric, joined)
    apply(model, found, plan_ranks(found, qk, vo))
    return {"part": part, "metric": metric, **clover.summary(model), **wer(model)}


def sweep(part: str, metric: str, shares: list[tuple[float, float]]) -> list[dict]:
    return [{"qk": qk, "vo": vo, **pruned(part, metric, Share(qk), Share(vo))} for qk, vo in shares]


@torch.no_grad()
def norm_pruned(qk: float, vo: float) -> dict:
    """Plain norm pruning: original head dimensions of the encoder, those of the least norm product in all layers cut.

    A dimension is cut by zeroing its key or its value row. What is left of it is the value bias, a constant of the
    output, which costs nothing to keep: the kindest form of this baseline.
    """
    model = copy.deepcopy(dense())
    heads = [block.heads() for block in blocks(model, "encoder")]
    q, k, v = (torch.stack([getattr(h, name).square().sum(-1) for h in heads]) for name in "qkv")
    o = torch.stack([h.o.square().sum(-2) for h in heads])
    removed = {}
    for name, norms, share in (("k", q.sum(2) * k, qk), ("v", v * o.sum(2), vo)):
        cut = norms.flatten().argsort()[: round(share * norms.numel())]
        gone = torch.zeros(norms.numel(), dtype=torch.bool).index_fill(0, cut, True).view_as(norms)
        for head, mask in zip(heads, gone, strict=True):
            getattr(head, name)[mask] = 0
        removed[name] = len(cut) / norms.numel()
    shares = {"qk": qk, "vo": vo, "qk_removed": removed["k"], "vo_removed": removed["v"]}
    return {"part": "encoder", "metric": "norms", **shares, **wer(model)}


def thresholds() -> list[dict]:
    qk, vo = THRESHOLDS
    return [{"qk_threshold": qk, "vo_threshold": vo, **pruned("encoder", "weights", Threshold(qk), Threshold(vo))}]


def divided() -> list[dict]:
    used, kept_out = keep_apart(transcripts("calibration"))
    forecast = gauge(dense(), find_bases(dense(), part="encoder", calibration=used, seed=SEED), kept_out, NATS)
    return [{"total": total, **sweep("encoder", "activations", [forecast.shares(total)])[0]} for total in TOTALS]


def joined() -> list[dict]:
    """The encoder at three shares, calibrated by clips alone, and by clips that fill windows, once and twice."""
    rows = []
    for often in (0, 1, 2):
        for share in TOTALS:
            made = pruned("encoder", "activations", Share(share), Share(share), often)
            rows.append({"joined": often, "qk": share, "vo": share, **made})
    return rows


GROUPS = {
    "dense": lambda: wer(dense()),
    "vanilla": lambda: [norm_pruned(qk, vo) for qk, vo in ENCODER],
    "weights": lambda: sweep("encoder", "weights", ENCODER),
    "calibrated": lambda: sweep("encoder", "activations", ENCODER),
    "thresholds": thresholds,
    "decoder": lambda: sweep("decoder", "activations", SWEEP),
    "divided": divided,
    "joined": joined,
    "cross": lambda: sweep("cross", "activations", SWEEP),
    "all": lambda: sweep("all", "activations", SWEEP[:2]),
}

if __name__ == "__main__":
    for name in chosen(GROUPS):
        record(f"speech-{name}", GROUPS[name]())
