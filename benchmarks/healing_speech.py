"""Healing of speech: the encoder of Whisper-base cut hard, then trained on the calibration clips alone.

    python benchmarks/healing_speech.py [ARM ...]

ARM as in healing.py: cores, cores-mlp, lora, attention; each with the loss of the transcripts, or with -distil that of
the encoder's output beside the dense encoder's. All arms hear the same clips in the same order. The learning rate of an
arm is the one of three with the least loss on two clips held out, after a short run. Scored on the test clips: word
error rate, and how far the encoder's output is from the dense one's, relative to its size.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from itertools import cycle, islice
from typing import Any

import torch

import clover
from clover.measure.data import audio_features
from clover.measure.evaluate import word_error_rate
from clover.measure.files import read_manifest
from common import SEED, chosen, record, timed
from healing import HALF, RECIPES, open_up
from speech import MANIFEST, dense, processor

QK, VO = 0.80, 0.60
STEPS, TRIAL, BATCH, HELD_OUT = 30, 6, 2, 2
RATES = {
    "cores": (3e-4, 1e-3, 3e-3), "cores-mlp": (1e-4, 3e-4, 1e-3), "lora": (1e-4, 3e-4, 1e-3),
    "attention": (1e-5, 3e-5, 1e-4),
}  # fmt: skip
ARMS = [arm + loss for arm in RATES for loss in ("", "-distil")]
Clip = dict[str, torch.Tensor]


@cache
def clips(split: str) -> list[Clip]:
    """Features, the dense encoder's output and the labels of each clip, batches of one."""
    tokenizer = processor().tokenizer
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    found = []
    for clip in read_manifest(MANIFEST, split):
        features = audio_features([clip.file], processor().feature_extractor)
        with torch.no_grad():
            target = dense().model.encoder(features).last_hidden_state
        labels = tokenizer(f" {clip.text}", return_tensors="pt").input_ids[:, 1:]  # the model puts the first in front
        found.append({"input_features": features, "target": target, "labels": labels})
    return found


@cache
def pruned() -> Any:
    model = copy.deepcopy(dense())
    calibration = [{"input_features": c["input_features"], "labels": c["labels"]} for c in clips("calibration")]
    return clover.prune(model, part="encoder", qk=QK, vo=VO, calibration=calibration, seed=SEED)


def loss_of(model: Any, clip: Clip, distil: bool) -> torch.Tensor:
    hidden = model.model.encoder(clip["input_features"])
    if distil:
        return error(hidden.last_hidden_state, clip["target"])
    return model(encoder_outputs=hidden, labels=clip["labels"]).loss


def error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float() - target).square().sum() / target.square().sum()


def heal(arm: str, steps: int, rate: float) -> tuple[Any, list[float]]:
    what, distil = arm.removesuffix("-distil"), arm.endswith("-distil")
    model = copy.deepcopy(pruned()).requires_grad_(False)
    model.model.encoder = open_up(model.model.encoder, RECIPES[what], whole=what == "attention")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    warmup = steps // 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))
    )
    heard, losses = cycle(clips("calibration")[:-HELD_OUT]), []
    for _ in range(steps):
        for clip in islice(heard, BATCH):
            with HALF():
                loss = loss_of(model, clip, distil)
            (loss / BATCH).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()
    return model, losses


@torch.no_grad()
def held_out_loss(model: Any, distil: bool) -> float:
    with HALF():
        return sum(loss_of(model, clip, distil).item() for clip in clips("calibration")[-HELD_OUT:]) / HELD_OUT


@torch.no_grad()
def score(model: Any) -> dict[str, Any]:
    wer = word_error_rate(model, processor(), read_manifest(MANIFEST, "test"))
    errors = [error(model.model.encoder(c["input_features"]).last_hidden_state, c["target"]) for c in clips("test")]
    return {"wer": wer.value, "protocol": wer.protocol, "encoder_error": sum(map(float, errors)) / len(errors)}


def run(arm: str) -> dict[str, Any]:
    what, distil = arm.removesuffix("-distil"), arm.endswith("-distil")
    trials = {rate: held_out_loss(heal(arm, TRIAL, rate)[0], distil) for rate in RATES[what]}
    best = min(trials, key=trials.__getitem__)
    (model, losses), seconds = timed(partial(heal, arm, STEPS, best))
    return {
        "qk_removed": QK, "vo_removed": VO, "steps": STEPS, "batch": BATCH, "lr": best, **score(model.eval()),
        "held_out_loss_by_lr": {str(rate): loss for rate, loss in trials.items()}, "trial_steps": TRIAL,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": seconds, "loss": [round(x, 4) for x in losses],
    }  # fmt: skip


if __name__ == "__main__":
    names = chosen(["start", *ARMS])
    for name in names:
        result = {"dense": score(dense()), "pruned": score(pruned())} if name == "start" else run(name)
        record(f"healing-speech-{name}", result)
