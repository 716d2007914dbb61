"""Real weights: orthogonalising changes nothing that can be measured, calibration is worth its while."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import clover
from clover.calibration.calibrate import calibrate
from clover.measure.data import calibration_batches, load_processor
from clover.measure.evaluate import perplexity
from clover.measure.files import read_text
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.pruning.basis import find_basis
from clover.pruning.prune import plan_ranks
from clover.pruning.surgery import operate

PROMPT = "The history of mathematics is largely the history of"


def assert_same(new: Tensor, old: Tensor) -> None:
    """To 1e-4 of the size of the outputs, all together and each."""
    assert new.shape == old.shape and old.isfinite().all()
    assert float((new - old).norm() / old.norm()) < 1e-4
    assert float((new - old).abs().max() / old.abs().max()) < 1e-4


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """20 tokens more, the cache in use."""
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": 1, "use_cache": True}
    return model.generate(**inputs, **options)[0].tolist()


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Tensor], field: str) -> Tensor:
    return model(**inputs)[field]


def test_smollm2_stays_the_same_model(smollm2: Path) -> None:
    model = clover.load(smollm2, dtype=torch.float32)
    inputs = dict(load_processor(model, "AutoTokenizer")(PROMPT, return_tensors="pt"))
    logits, tokens = forward(model, inputs, "logits"), greedy(model, inputs)
    clover.orthogonalize(model)
    assert clover.plan_of(model).qk_removed == clover.plan_of(model).vo_removed == 0
    assert_same(forward(model, inputs, "logits"), logits)
    assert greedy(model, inputs) == tokens and len(tokens) == inputs["input_ids"].shape[1] + 20


def test_whisper_stays_the_same_model(whisper: Path, speech: Path) -> None:
    model = clover.load(whisper, dtype=torch.float32)
    (clip,) = calibration_batches(speech / "manifest.tsv", model, split="test", limit=1)
    logits = forward(model, clip, "logits")
    sound = {"input_features": clip["input_features"], "language": "en", "task": "transcribe"}
    tokens = greedy(model, sound)
    clover.orthogonalize(model)
    assert {b.part for b in clover.plan_of(model).blocks} == {"encoder", "decoder", "cross"}
    assert_same(forward(model, clip, "logits"), logits)
    assert greedy(model, sound) == tokens


def test_minilm_stays_the_same_model(minilm: Path) -> None:
    model = clover.load(minilm, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    inputs = dict(tokenizer([PROMPT, "A short one."], padding=True, return_tensors="pt"))
    keep = inputs["attention_mask"].bool()
    states = forward(model, inputs, "last_hidden_state")[keep]
    clover.orthogonalize(model)
    assert_same(forward(model, inputs, "last_hidden_state")[keep], states)


def test_calibration_beats_weights_alone(smollm2: Path, wikitext2: Path) -> None:
    """A smoke test: every third block and 4 windows of 128 tokens show the order, not good figures."""
    dense = clover.load(smollm2, dtype=torch.float32)
    text = load_processor(dense, "AutoTokenizer")(read_text(wikitext2 / "test.txt.gz")[:4000])["input_ids"]
    batches = calibration_batches(wikitext2 / "validation.txt.gz", dense, sequences=4, length=128)

    def pruned(calibrated: bool) -> float:
        model = copy.deepcopy(dense)
        found = blocks(model)[::3]
        moments = calibrate(model, found, batches) if calibrated else [None] * len(found)
        bases = [find_basis(block, m) for block, m in zip(found, moments, strict=True)]
        plan = plan_ranks(bases, Share(0.25), Share(0.25))
        assert plan.qk_removed == pytest.approx(0.25, abs=0.01) == plan.vo_removed
        operate(model, bases, plan)
        return perplexity(model, torch.tensor(text), window=512, limit=512).value

    before = perplexity(dense, torch.tensor(text), window=512, limit=512).value
    assert before < pruned(calibrated=True) < 1.25 * before
    assert pruned(calibrated=False) > 2 * before
