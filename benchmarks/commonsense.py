"""The eight commonsense sets in the protocol of LLM-Adapters: CLOVER, LoRA, DoRA and PiSSA with as many parameters.

    python benchmarks/commonsense.py PROFILE [METHOD ...]     (PROFILE: a section of commonsense.yaml)

Every method is trained on the same mixture of the train splits, on the same modules, for the same steps. Its learning
rate is the one of its grid with the best mean on questions held out from the train splits; with that rate all seeds are
run and scored on the test splits. A seed stands for the order of the examples and the start of the adapter.

``candidates: labels`` is the protocol: the instruction with its numbered choices, ``the correct answer is answer2`` is
learned. ``texts``, for models too small to learn numbers: the bare question, and what the right choice says. ``score:
generate`` lets the model write and looks for the first choice that it names; ``likelihood``, the cheap variant, asks
which choice it finds most likely to come next. WikiText-2 perplexity beside it says what was forgotten. Each run is
written down when it is done, and not done again.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

import clover
from clover.measure.evaluate import continuations, multiple_choice, perplexity
from clover.measure.files import Question, read_questions
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import METHODS, Recipe
from clover.tuning.training import answered, train
from common import DATA, MODELS, RESULTS, record, text, timed

SETS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
HELD_OUT = 128
"""Questions at the end of each train split that no run learns from."""


def file(name: str, split: str) -> Path:
    return DATA / "commonsense" / f"{name}.{split}.jsonl.gz"


def mixture(profile: dict[str, Any], tokenizer: Any, seed: int) -> list[Any]:
    """As many examples of each set as there are, up to an equal share, in the order of a seed."""
    picked: list[Any] = []
    share = profile["train_examples"] // len(SETS)
    for name in SETS:
        asked = read_questions(file(name, "train"))[:-HELD_OUT]
        picked += [
            answered(*learned(q, profile["candidates"]), tokenizer, profile["length"])
            for q in random.Random(0).sample(asked, min(share, len(asked)))
        ]
    return in_batches(picked, profile["batch"], random.Random(seed))


def learned(question: Question, candidates: str) -> tuple[str, str]:
    """What a model is asked, and the right answer, as it will be scored."""
    return continuations(question, candidates)[question.answer]


def in_batches(data: list[Any], batch: int, chance: random.Random) -> list[Any]:
    """Shuffled so that the examples of a batch are of like length: padding would be half of the work."""
    data = chance.sample(data, len(data))
    batches = []
    for start in range(0, len(data), 8 * batch):
        pool = sorted(data[start : start + 8 * batch], key=lambda e: len(e["input_ids"]))
        batches += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return list(chain.from_iterable(chance.sample(batches, len(batches))))


def questions(split: str, count: int | None) -> dict[str, list[Question]]:
    """Questions of each set: of the test split, or those held out at the end of the train split."""
    found = {}
    for name in SETS:
        whole = read_questions(file(name, split))
        whole = whole[-HELD_OUT:] if split == "train" else whole
        found[name] = random.Random(0).sample(whole, min(count or len(whole), len(whole)))
    return found


@torch.inference_mode()
def label_likelihood(model: Any, tokenizer: Any, asked: Sequence[Question], batch: int = 16) -> float:
    """Share of questions whose right label is the most likely to follow ``the correct answer is``, in per cent."""
    right = 0
    for start in range(0, len(asked), batch):
        piece = asked[start : start + batch]
        rows, choices = [], []
        for q in piece:
            answers = [tokenizer(f"the correct answer is {x}", add_special_tokens=False).input_ids for x in q.labels]
            common = next(i for i in range(len(answers[0])) if len({a[i] for a in answers}) == len(answers))
            rows.append(tokenizer(f"{q.instruction}\n").input_ids + answers[0][:common])
            choices.append([a[common] for a in answers])
        lengths = torch.tensor([len(r) for r in rows])
        ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).to(model.device)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)
        hidden = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[torch.arange(len(rows)), lengths - 1]).float()
        for q, row, ends in zip(piece, logits, choices, strict=True):
            right += int(row[ends].argmax()) == q.answer
    return 100 * right / len(asked)


def text_likelihood(model: Any, tokenizer: Any, asked: Sequence[Question]) -> float:
    """Share of questions whose right choice is the likeliest per token after the bare question, in per cent."""
    return 100 * multiple_choice(model, tokenizer, asked, candidates="texts", batch=16).value


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, asked: Sequence[Question], batch: int = 16) -> float:
    """Share of questions whose right label is the first that the model names, in per cent."""
    right = 0
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(asked), batch):
        piece = asked[start : start + batch]
        inputs = tokenizer([f"{q.instruction}\n" for q in piece], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for q, said in zip(piece, tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :]), strict=True):
            named = re.findall("|".join(map(re.escape, q.labels)), said.lower())
            right += bool(named) and named[0] == q.labels[q.answer]
    return 100 * right / len(asked)


SCORES = {
    ("labels", "likelihood"): label_likelihood,
    ("labels", "generate"): generate,
    ("texts", "likelihood"): text_likelihood,
}


def load(profile: dict[str, Any]) -> tuple[Any, Any]:
    local = MODELS / profile["model"]
    name = str(local) if local.is_dir() else profile["model"]
    model = clover.load(name, dtype=getattr(torch, profile["dtype"]))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(name)


def measure(profile: dict[str, Any], model: Any, tokenizer: Any, asked: dict[str, list[Question]]) -> dict[str, Any]:
    score = SCORES[profile["candidates"], profile["score"]]
    sets = {name: score(model, tokenizer, found) for name, found in asked.items()}
    return {"sets": sets, "mean": mean(sets.values())}


def forgetting(profile: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    tokens = tokenizer(text("test"), return_tensors="pt").input_ids[0]
    return perplexity(model, tokens, limit=profile["perplexity_tokens"]).to_dict()


def run(profile: dict[str, Any], method: str, lr: float, seed: int, split: str) -> dict[str, Any]:
    """One training run, scored on ``split``."""
    model, tokenizer = load(profile)
    data = mixture(profile, tokenizer, seed)
    steps = profile.get("steps") or profile["epochs"] * len(data) // profile["batch"]
    recipe = Recipe(
        method, steps, lr, profile["batch"], seed, profile["warmup"], profile["length"], tuple(profile["parts"])
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, adapter_config(model, recipe))
    with tempfile.TemporaryDirectory() as scratch:
        log, seconds = timed(lambda: train(adapted, data, recipe, Path(scratch), shuffle=False))
    parameters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload().eval()
    count = profile["validation_questions"] if split == "train" else profile["test_questions"]
    result = {
        "method": method, "lr": lr, "seed": seed, "steps": steps, "batch": profile["batch"],
        "trainable_parameters": parameters, "seconds": round(seconds, 1), "loss": mean(e["loss"] for e in log[-10:]),
        **measure(profile, merged, tokenizer, questions(split, count)),
    }  # fmt: skip
    return result if split == "train" else result | {"forgetting": forgetting(profile, merged, tokenizer)}


def once(name: str, call: Any) -> dict[str, Any]:
    """The result on record, or a new one, put on record."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        record(name, call())
    return json.loads(path.read_text())["result"]


def main(name: str, methods: Sequence[str]) -> None:
    profile = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())[name]

    def untuned() -> dict[str, Any]:
        model, tokenizer = load(profile)
        asked = questions("test", profile["test_questions"])
        return measure(profile, model, tokenizer, asked) | {"forgetting": forgetting(profile, model, tokenizer)}

    summary: dict[str, Any] = {"base": once(f"commonsense-{name}-base", untuned), "profile": profile}
    for method in methods or METHODS:
        rates = profile["lr"][method]
        trials = {
            lr: once(f"commonsense-{name}-{method}-{lr:g}-validation", partial(run, profile, method, lr, 0, "train"))
            for lr in rates
        }
        best = max(rates, key=lambda lr: trials[lr]["mean"])
        runs = [
            once(f"commonsense-{name}-{method}-{best:g}-{s}", partial(run, profile, method, best, s, "test"))
            for s in profile["seeds"]
        ]
        means = [r["mean"] for r in runs]
        summary[method] = {
            "lr": best,
            "mean": mean(means),
            "standard_error": stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
            "sets": {n: mean(r["sets"][n] for r in runs) for n in SETS},
            "trainable_parameters": runs[0]["trainable_parameters"],
            "perplexity": mean(r["forgetting"]["value"] for r in runs),
            "validation_mean_by_lr": {f"{lr:g}": t["mean"] for lr, t in trials.items()},
        }
    record(f"commonsense-{name}", summary)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
