"""Healing: SmolLM2 cut by 50 % of Q-K and V-O, then trained for a while on WikiText-2; what training may touch differs.

    python benchmarks/healing.py [--steps N] [--first N] [--pruned FOLDER] [ARM ...]

ARM: cores (the singular-value matrices of the attention alone), cores-mlp (those of the MLP's first projections as
well), lora and lora-mlp (on the same projections, as many parameters), attention (all weights of the attention); each
also with -distil: the loss is then the divergence from the dense model's distribution in place of the text's own. All
arms see the same tokens in the same order. Each is trained at three learning rates to the end; the one with the least
loss on validation text counts (``validation_loss_by_lr``). Scored on the first N tokens of the test split. Products
are bfloat16 throughout; what is trained is float32. The pruned model is kept in FOLDER for the next call.
"""

from __future__ import annotations

import argparse
import tempfile
import time
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
from clover.attention.attention import CloverAttention
from clover.measure.evaluate import perplexity
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import Recipe
from clover.tuning.training import mean_loss, train
from common import MODELS, SEED, record, text

LENGTH, BATCH = 256, 2
ATTENTION = ("qk", "q", "vo")
MLP = (*ATTENTION, "up", "gate")
CORES = Recipe(batch=BATCH, length=LENGTH, seed=SEED, parts=ATTENTION)
RECIPES = {
    "cores": CORES, "cores-mlp": replace(CORES, parts=MLP), "lora": replace(CORES, method="lora"),
    "lora-mlp": replace(CORES, method="lora", parts=MLP), "attention": CORES,
}  # fmt: skip
RATES = {
    "cores": (1e-3, 2e-3, 4e-3), "cores-mlp": (1e-4, 3e-4, 6e-4), "lora": (1e-3, 3e-3, 1e-2),
    "lora-mlp": (3e-4, 1e-3, 3e-3), "attention": (3e-4, 1e-3, 3e-3),
}  # fmt: skip
ARMS = (*RECIPES, *(f"{arm}-distil" for arm in RECIPES))
HALF = partial(torch.autocast, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


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


def open_up(model: Any, recipe: Recipe, *, whole: bool) -> Any:
    """The pruned model with that trainable which an arm may touch: all of its attention, or what the recipe adapts."""
    if whole:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, CloverAttention):
                module.float().requires_grad_(True)
        return model
    torch.manual_seed(SEED)
    return get_peft_model(model, adapter_config(model, recipe))


def heal(arm: str, pruned: Path, teacher: Any, data: list[Any], steps: int, rate: float) -> tuple[Any, list[Any]]:
    """The healed model and its training log; from a teacher's distribution, if there is one."""
    model = open_up(clover.load(pruned, dtype=torch.bfloat16), RECIPES[arm], whole=arm == "attention")
    trained = model if teacher is None else Distilled(model, teacher)
    with tempfile.TemporaryDirectory() as scratch:
        log = train(trained, data, replace(RECIPES[arm], steps=steps, lr=rate), Path(scratch))
    return model.eval(), log


def windows(split: str, tokenizer: Any) -> list[Any]:
    ids = tokenizer(text(split)).input_ids
    return [{"input_ids": ids[i : i + LENGTH], "labels": ids[i : i + LENGTH]}
            for i in range(0, len(ids) - LENGTH, LENGTH)]  # fmt: skip


def prune(folder: Path, tokenizer: Any) -> None:
    tokens = tokenizer(text("train"), return_tensors="pt").input_ids[0]
    model: Any = language.load()
    clover.prune(model, qk=0.5, vo=0.5, calibration=language.calibration(tokens), seed=SEED)
    clover.save(model, folder)


def main(steps: int, first: int, pruned: Path, arms: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    test = tokenizer(text("test"), return_tensors="pt").input_ids[0]
    data, held_out = windows("train", tokenizer), windows("validation", tokenizer)[::64]
    if not pruned.exists():
        prune(pruned, tokenizer)

    def score(model: Any) -> Any:
        with HALF():
            return perplexity(model, test, limit=first)

    teacher: Any = clover.load(MODELS / "smollm2", dtype=torch.bfloat16)
    base = {"dense": score(teacher).value, "pruned": score(clover.load(pruned, dtype=torch.bfloat16)).value}
    for arm in arms or ARMS:
        what, distil = arm.removesuffix("-distil"), arm.endswith("-distil")
        started, losses, best = time.perf_counter(), {}, None
        for rate in RATES[what]:
            model, log = heal(what, pruned, teacher if distil else None, data, steps, rate)
            with HALF():
                losses[rate] = mean_loss(model, held_out)
            if losses[rate] == min(losses.values()):
                best = rate, model, log
        assert best is not None
        rate, model, log = best
        healed = score(model)
        record(f"healing-{arm}", {
            **base, "healed": healed.value, "over_dense": healed.value / base["dense"], "protocol": healed.protocol,
            "qk_removed": 0.5, "vo_removed": 0.5, "steps": steps, "tokens": steps * BATCH * LENGTH,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "lr": rate, "validation_loss_by_lr": {str(k): v for k, v in losses.items()},
            "seconds": (time.perf_counter() - started) / len(losses), "loss": [round(e["loss"], 4) for e in log],
        })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N")
    parser.add_argument(
        "--first", type=int, default=12288, metavar="N", help="tokens of the test split that are scored"
    )
    parser.add_argument("--pruned", type=Path, metavar="FOLDER", help="kept between calls; a temporary one by default")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=", ".join(ARMS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.steps, options.first, options.pruned or Path(temporary) / "pruned", options.arms)
