"""Healing: SmolLM2 cut by 50 % of Q-K and V-O, then trained for a while on WikiText-2; what training may touch differs.

    python benchmarks/healing.py [--steps N] [--first N] [ARM ...]

ARM: cores (the singular-value matrices alone), lora (on the same projections, as many parameters), attention (all
weights of the attention); each also with -distil: the loss is then the divergence from the dense model's distribution
in place of the text's own. All arms see the same tokens in the same order. The learning rate of an arm, and of its
-distil, is the one of three with the least loss on validation text after a short run on the text's own loss
(``validation_loss_by_lr``). Scored on the first N tokens of the test split.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

import clover
import language
from clover.attention import CloverAttention
from clover.evaluate import perplexity
from clover.training import Recipe, adapter_config, mean_loss, train
from common import MODELS, SEED, record, text, timed

ARMS = ("cores", "lora", "attention", "cores-distil", "lora-distil", "attention-distil")
LENGTH, BATCH = 256, 2
RATES = {"cores": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3), "attention": (3e-5, 1e-4, 3e-4)}
TRIAL = 12
"""Steps of the runs that choose the learning rate."""
RECIPE = Recipe(batch=BATCH, length=LENGTH, seed=SEED, parts=("qk", "q", "vo"))


class Distilled(nn.Module):
    """A student whose loss is its divergence from a teacher, in nats per token."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher]  # in a list, it is no submodule: neither trained nor saved

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            target = self.teacher[0](input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
        logits = self.student(input_ids=input_ids, attention_mask=attention_mask).logits.log_softmax(-1)
        return {"loss": nn.functional.kl_div(logits.flatten(0, 1), target.flatten(0, 1), reduction="batchmean",
                                             log_target=True)}  # fmt: skip


def prepare(arm: str, pruned: Path) -> Any:
    """The pruned model with that trainable which the arm may touch."""
    model: Any = clover.load(pruned, dtype=torch.float32)
    if arm.startswith("attention"):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, CloverAttention):
                module.requires_grad_(True)
        return model
    torch.manual_seed(SEED)
    method = "clover" if arm.startswith("cores") else "lora"
    return get_peft_model(model, adapter_config(model, replace(RECIPE, method=method)))


def heal(arm: str, pruned: Path, teacher: Any, data: list[Any], steps: int, rate: float) -> tuple[Any, list[Any]]:
    model = prepare(arm, pruned)
    trained = Distilled(model, teacher) if arm.endswith("distil") else model
    with tempfile.TemporaryDirectory() as scratch:
        log = train(trained, data, replace(RECIPE, steps=steps, lr=rate), Path(scratch))
    return model.eval(), log


def windows(split: str, tokenizer: Any) -> list[Any]:
    ids = tokenizer(text(split)).input_ids
    return [{"input_ids": ids[i : i + LENGTH], "labels": ids[i : i + LENGTH]}
            for i in range(0, len(ids) - LENGTH, LENGTH)]  # fmt: skip


def main(steps: int, first: int, arms: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    test = tokenizer(text("test"), return_tensors="pt").input_ids[0]
    data, held_out = windows("train", tokenizer), windows("validation", tokenizer)[::64]
    teacher = language.load()
    with tempfile.TemporaryDirectory() as scratch:
        tokens = tokenizer(text("train"), return_tensors="pt").input_ids[0]
        cut: Any = language.load()
        clover.prune(cut, qk=0.5, vo=0.5, calibration=language.calibration(tokens), seed=SEED)
        pruned = clover.save(cut, Path(scratch) / "pruned")
        base = {
            "dense": perplexity(teacher, test, limit=first).value,
            "pruned": perplexity(cut, test, limit=first).value,
        }
        del cut
        trials: dict[str, dict[float, float]] = {}
        for arm in arms or ARMS:
            what = arm.partition("-")[0]
            if what not in trials:
                runs = {rate: heal(what, pruned, None, data, TRIAL, rate)[0] for rate in RATES[what]}
                trials[what] = {rate: mean_loss(model, held_out) for rate, model in runs.items()}
            best = min(trials[what], key=trials[what].__getitem__)
            (model, log), seconds = timed(partial(heal, arm, pruned, teacher, data, steps, best))
            healed = perplexity(model, test, limit=first)
            record(f"healing-{arm}", {
                **base, "healed": healed.value, "over_dense": healed.value / base["dense"], "protocol": healed.protocol,
                "qk_removed": 0.5, "vo_removed": 0.5, "steps": steps, "tokens": steps * BATCH * LENGTH,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "lr": best, "validation_loss_by_lr": {str(k): v for k, v in trials[what].items()},
                "trial_steps": TRIAL, "seconds": seconds, "loss": [round(e["loss"], 4) for e in log],
            })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N")
    parser.add_argument(
        "--first", type=int, default=12288, metavar="N", help="tokens of the test split that are scored"
    )
    parser.add_argument("arms", nargs="*", metavar="ARM", help=", ".join(ARMS))
    options = parser.parse_args()
    main(options.steps, options.first, options.arms)
