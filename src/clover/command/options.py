"""What the commands share: their options, and how models and data are taken in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from clover.command.report import table
from clover.command.show import note, show
from clover.errors import CloverError
from clover.jobs.crew import is_first
from clover.measure.data import calibration_batches, found_beside
from clover.measure.files import file_kind
from clover.model.precision import ready
from clover.progress import console
from clover.pruning import prune as pruning
from clover.pruning.checkpoint import check_there, load
from clover.pruning.lossbudget import keep_apart
from clover.streaming.shards import Checkpoint
from clover.streaming.stream import local


def _loss(text: str) -> float:
    number, percent = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no loss; write 2% or 0.02") from None
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{text!r} is no loss to stay under; it must be more than 0, such as 2%")
    if value >= 1 and not percent:
        raise typer.BadParameter(f"{text} would be {100 * value:g} percent; write {text}% or {100 * value:g}%")
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")]
Share = Annotated[
    float | None, typer.Option(metavar="R", help="Share of these directions to remove, at least 0, less than 1.")
]
Threshold = Annotated[float | None, typer.Option(metavar="T", help="Instead: remove norm products of at most T.")]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        parser=_loss, metavar="L",
        help="Instead: remove as much as costs at most this, 2% more perplexity say, measured on calibration data.",
    ),
]  # fmt: skip
Part = Annotated[pruning.Part, typer.Option(help="Which attention blocks.")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text .txt, questions .jsonl, audio manifest .tsv, or a folder of images."),
]
Metric = Annotated[
    pruning.Metric | None,
    typer.Option(help="How directions are measured.", show_default="activations with --calibration, else weights"),
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="Rows of a manifest that are used.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use at most N windows of text, clips or images.")]
TELLING = 0.02
"""Difference from the share that was asked for that is worth a word."""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


def flag(argument: str) -> str:
    """What an argument of the library is called here."""
    return "--" + argument.replace("_", "-")


def checked_metric(
    metric: pruning.Metric | None, calibration: Path | None, split: str | None, limit: int | None
) -> pruning.Metric:
    """The metric; finds out before the long work whether it and the data go together."""
    chosen = pruning.measured_by(metric, calibration, flag)
    for name, value in (("--split", split), ("--limit", limit)):
        if value is not None and calibration is None:
            raise CloverError(f"{name} {value} chooses from calibration data; give --calibration FILE, or leave it out")
    if calibration is not None:
        kind = file_kind(calibration)
        if split is not None and kind != "manifest":
            raise CloverError(f"--split {split}: only a manifest has splits, and {calibration} is none; leave it out")
        if chosen == "weights":
            note(f"warning: --metric weights makes no use of {calibration}")
    return chosen


def tell(sizes: dict[str, Any], sentence: str, as_json: bool) -> None:
    """What became of the model; once, where several processes made it."""
    if not is_first():
        return
    note(sentence)
    if as_json:
        print(json.dumps(sizes))
    else:
        show(table(sizes))


def tell_difference(sizes: dict[str, Any], **asked: float | None) -> None:
    """Where much more or less went than the shares that were asked for, by ``qk`` and ``vo``."""
    for which, share in asked.items():
        gone = sizes[f"{which}_removed"]
        if share and is_first() and abs(gone - share) > TELLING:
            note(
                f"warning: {flag(which)} {share:g} removes {gone:.3f}: heads keep a direction or a pair at least, "
                "large blocks whole tiles, and what a norm holds stays"
            )


def tell_loss(found: dict[str, Any]) -> None:
    """How a bound on the loss was kept."""
    if chosen := found["chosen"]:
        ends = f"{chosen['measured']:.2%}, 95 % upper bound {chosen['ceiling']:.2%}"
        note(f"loss on data kept out of the calibration: {ends}; {len(found['measured'])} cuts were measured")
    else:
        note(f"warning: every cut that was tried loses more than {100 * found['max_loss']:.3g} %; nothing was removed")


def quiet() -> None:
    """Keep transformers from talking beside results; its progress bars stay where someone can see them move."""
    logging.set_verbosity_error()
    if not console.is_terminal:
        logging.disable_progress_bar()


def load_ready(name: str) -> tuple[Any, Callable[[Any], Any]]:
    """The model, ready to be computed with, and what gives its tensors the dtypes of the checkpoint back."""
    quiet()
    model = load(name)
    return ready(model, _wide_in_memory_alone(name, model))


def _wide_in_memory_alone(name: str, model: Any) -> set[str]:
    """Modules that transformers makes float32 as it loads half precision, and that are not on disk."""
    made = set(model._keep_in_fp32_modules or ())
    try:
        entries = Checkpoint.open(local(name)).entries if made else {}
    except CloverError:  # no folder of safetensors
        return made
    return made.difference(*(key.split(".") for key, entry in entries.items() if entry.dtype == "F32"))


def batches_of(
    model: Any, calibration: Path | None, metric: str | None, split: str | None, limit: int | None, spare: bool = False
) -> Iterable[Any] | None:
    """Calibration batches for the model, where the metric has use for them; some to spare, where loss is measured."""
    if calibration is None or metric == "weights":
        return None
    sizes = {} if limit is None else {"sequences": limit, "limit": limit}
    sizes = ({"sequences": 24, "batch": 2, "joined": 0} if spare else {}) | sizes
    return calibration_batches(calibration, model, split=split, **sizes)


def apart(batches: Iterable[Any] | None) -> tuple[Iterable[Any] | None, list[Any]]:
    """Batches to calibrate on, and some to measure on if there are two at least."""
    whole = None if batches is None else list(batches)
    return keep_apart(whole) if whole and len(whole) > 1 else (whole, [])


def beside_of(name: str) -> tuple[Any, ...]:
    """What lies beside a model and must go with it: its processor or tokenizer."""
    check_there(name)  # else each reader that might be there is looked for, on the hub for minutes
    found = found_beside(name)
    if not found:
        note(f"warning: {name} has no tokenizer or processor that could be saved with the pruned model")
    return found
