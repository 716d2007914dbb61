"""The command line. Results go to standard output, all else to standard error; a mistake is told in one sentence."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clover import __version__
from clover.command.demo import run as run_demo
from clover.command.options import (
    Calibration,
    Json,
    Limit,
    MaxLoss,
    Metric,
    Model,
    Part,
    Share,
    Split,
    Threshold,
    apart,
    batches_of,
    beside_of,
    checked_metric,
    flag,
    load_ready,
    quiet,
    tell,
    tell_difference,
    tell_loss,
)
from clover.command.report import FORMATS, check_target, plot_spectra, table, write_report
from clover.command.show import Commands, describe, note, show, show_blocks, show_hints, show_runtime
from clover.errors import CloverError
from clover.extras import extra
from clover.jobs.crew import is_first, started_together
from clover.jobs.folders import check_writable
from clover.measure.bench import compare_runtime
from clover.measure.evaluate import evaluate as measure
from clover.planning.budget import Granularity, Limits
from clover.pruning.checkpoint import load, save
from clover.pruning.lossbudget import suggest
from clover.pruning.prune import NOTHING, apply, choose, find_bases, summary, wanted
from clover.runtimes.export import pad
from clover.runtimes.onnx import check_installed
from clover.runtimes.onnx import export as write_onnx
from clover.streaming.stream import prune_folder
from clover.tuning.recipe import METHODS, Recipe

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make the attention of trained transformers smaller in its own latent space, without training.",
)


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"clover {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    warnings.showwarning = lambda message, *_: note(f"warning: {message}")
    warnings.simplefilter("ignore", FutureWarning)  # between libraries; who runs a command can't heed it
    # Large tensors in large pages: torch asks when it makes the first, and where weights come and go, Linux otherwise
    # spends more time on handing out memory than the work takes.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@app.command()
def inspect(
    model: Model,
    plot: Annotated[Path | None, typer.Option(metavar="OUT.png", help="Draw the spectra (.png, .svg or .pdf).")] = None,
    part: Part = "all",
    calibration: Calibration = None,
    metric: Metric = None,
    split: Split = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Show the singular values of every head, and with data what could go for a loss of 1, 2 and 5 %."""
    metric = checked_metric(metric, calibration, split, limit)
    if plot:
        check_target(plot, *FORMATS)
    loaded, _ = load_ready(model)
    batches, kept_out = apart(batches_of(loaded, calibration, metric, split, limit, spare=True))
    bases = find_bases(loaded, part=part, calibration=batches, metric=metric)
    spectra = [basis.spectrum() for basis in bases]
    hints = [asdict(hint) for hint in suggest(loaded, bases, kept_out)] if kept_out else []
    if plot:
        plot_spectra(spectra, plot)
    described = [describe(basis.block, spectrum) for basis, spectrum in zip(bases, spectra, strict=True)]
    if as_json:
        print(json.dumps({"model": model, "blocks": described, "suggestions": hints}))
    else:
        show_blocks(described)
        show_hints(hints)
    if batches is not None and not kept_out:
        note(f"warning: {calibration} gives one batch alone, so none is left to measure what a cut loses; give more")


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")],
    qk: Share = None,
    vo: Share = None,
    part: Part = "all",
    calibration: Calibration = None,
    metric: Metric = None,
    qk_threshold: Threshold = None,
    vo_threshold: Threshold = None,
    max_loss: MaxLoss = None,
    granularity: Annotated[Granularity, typer.Option(help="What has ranks of its own.")] = "head",
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="Most head sizes that a block may have.")] = 4,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Of the sample of calibration queries.")
    ] = 0,
    report: Annotated[Path | None, typer.Option(metavar="OUT.html", help="Write spectra and ranks to a page.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="From file to file, a block at a time, for models larger than memory.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --stream: insist on going on with a run that was stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove the head directions that carry little, and save the smaller model as OUT."""
    shares: dict[str, Any] = {"qk": qk, "vo": vo, "qk_threshold": qk_threshold, "vo_threshold": vo_threshold}
    request = wanted(**shares, max_loss=max_loss, metric=metric, data=calibration, called=flag)
    check_writable(out)
    if request == NOTHING and None in (qk, vo):
        raise CloverError(
            "nothing is to be removed; give --qk, --vo, a threshold or --max-loss (--qk 0 --vo 0 only turns the basis)"
        )
    metric = checked_metric(metric, calibration, split, limit)
    if report:
        check_target(report, "html", "htm")
    if resume and not stream:
        raise CloverError("--resume goes on with a run of --stream; give both")
    if metric == "weights" and request != NOTHING:
        note("warning: pruning by the weights alone breaks most modern models; give --calibration FILE instead")

    def data(reader: Any) -> Iterable[Any] | None:
        return batches_of(reader, calibration, metric, split, limit, spare=max_loss is not None)

    if not stream and started_together():
        raise CloverError("several processes share the work of --stream alone; give it, or start one process")
    settings: dict[str, Any] = {"part": part, "granularity": granularity, "limits": Limits(groups=groups), "seed": seed}
    if stream:
        _check_streams(max_loss, report)
    quiet()
    beside = beside_of(model)  # whatever is wrong with it is found out before the work
    if stream:
        settings |= shares | {"calibration": None if metric == "weights" else data, "beside": beside}
        sizes = prune_folder(model, out, **settings, resume=resume)
        tell_difference(sizes, qk=qk, vo=vo)
        tell(sizes, f"saved {out.absolute()}", as_json)
        return
    loaded, restore = load_ready(model)
    found = choose(loaded, request, calibration=data(loaded), metric=metric, **settings)
    loss = {} if found.outcome is None else {"loss": found.outcome.to_dict()}
    if loss:
        tell_loss(loss["loss"])
    apply(restore(loaded), found.bases, found.plan)  # before: the cut is checked in what it is saved in
    sizes = summary(loaded)
    tell_difference(sizes, qk=qk, vo=vo)
    tell(sizes | loss, f"saved {save(loaded, out, beside=beside)}", as_json)
    if report:
        spectra = [basis.spectrum() for basis in found.bases]
        write_report(report, title=f"{model}, pruned", spectra=spectra, plan=found.plan, summary=sizes, **loss)
        note(f"saved {report}")


def _check_streams(max_loss: float | None, report: Path | None) -> None:
    """Refuse what can't be had from file to file."""
    if max_loss is not None:
        raise CloverError(f"--max-loss {max_loss:g} compares whole models; leave out it or --stream")
    if report:
        raise CloverError(f"--report {report} needs all blocks at once; leave out --report or --stream")


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="FILE", help="A .txt, a manifest .tsv or a .jsonl; each may be .gz.")],
    task: Annotated[Literal["perplexity", "wer", "choice"], typer.Option(help="What is measured.")],
    split: Split = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N tokens, utterances or questions.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model, pruned or not: perplexity of a text, word error rate of speech, or multiple choice."""
    quiet()
    score = measure(model, data, task, split, limit)
    if as_json:
        value = score.value if math.isfinite(score.value) else None  # JSON has no infinity
        print(json.dumps(score.to_dict() | {"value": value}))
        return
    print(f"{score.task} {score.value:.4f}")
    for key, value in score.protocol.items():
        print(f"  {key}: {value}")


def _tuning(module: str) -> Any:
    """A module that needs peft, which takes seconds to import."""
    extra("peft", "tune")
    try:
        return import_module(f"clover.tuning.{module}")
    except ImportError as error:
        raise CloverError(f"tuning needs peft 0.21 or later ({error}); pip install 'clover-attention[tune]'") from error


@app.command()
def tune(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder to make.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="A .jsonl of instruction and output, or a .txt; each may be .gz.")
    ],
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}, all on the same modules.")] = Recipe.method,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimiser steps.")] = Recipe.steps,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Largest learning rate.",
            show_default=", ".join(f"{m} {lr:g}" for m, lr in METHODS.items()),
        ),
    ] = Recipe.lr,
    batch: Annotated[int, typer.Option(metavar="N", help="Examples a step.")] = Recipe.batch,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the data and of LoRA's start.")] = Recipe.seed,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens at most in an example.")] = Recipe.length,
    core: Annotated[
        Literal["full", "diagonal"], typer.Option(help="A matrix a head, or its singular values.")
    ] = Recipe.core,  # type: ignore[assignment]
    block_size: Annotated[
        int, typer.Option(metavar="N", help="Rows in a block of an MLP; must divide them.")
    ] = Recipe.block_size,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Of the LoRA methods.", show_default="as many parameters as clover")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure the loss on it, before and after.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tune a language model by an adapter. A run that was killed goes on when it is called again."""
    run = _tuning("training").tune
    quiet()
    recipe = Recipe(method, steps, lr, batch, seed, length=length, core=core, block_size=block_size, rank=rank)
    result = run(model, adapter, data, recipe, eval_data=eval_data)
    if not is_first():
        return
    note(f"saved {adapter}")
    if as_json:
        print(json.dumps(result))
        return
    for key in ("method", "trainable_parameters", "loss", "eval_loss_before", "eval_loss_after"):
        if key in result:
            print(f"{key}: {result[key]}")


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="What clover tune wrote, or any peft adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
) -> None:
    """Merge an adapter into its model: the same outputs at the speed of the model alone."""
    run = _tuning("merging").merge
    quiet()
    note(f"saved {run(model, adapter, out)}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    kind: Annotated[
        Literal["padded", "onnx"],
        typer.Option("--format", help="padded: zeros for what was cut; onnx: for ONNX Runtime, checked there."),
    ] = "padded",
) -> None:
    """Write a pruned model for places that don't know clover: in its original class, no smaller, or as ONNX."""
    check_writable(out)
    quiet()
    if kind == "padded":
        beside = beside_of(model)
        note(f"saved {save(pad(load(model)), out, beside=beside)}; padded with zeros, so it is no smaller")
        return
    check_installed()
    beside = beside_of(model)
    seen = write_onnx(load(model, dtype="float32"), out, beside=beside)
    note(f"saved {out}: " + ", ".join(f"{k}.onnx within {v:.1g} of PyTorch" for k, v in seen.items()))


bench = typer.Typer(help="Time and memory of a pruned model beside the original.")
app.add_typer(bench, name="bench")


@bench.command()
def runtime(
    model: Model,
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="A folder that clover prune made of MODEL.")],
    context: Annotated[list[int] | None, typer.Option(metavar="N", help="Tokens read before; can be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens written one by one.")] = 32,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Timed rounds, in turns; medians count.")] = 5,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of both models.")] = None,
    as_json: Json = False,
) -> None:
    """Prefill, decode, peak memory and KV-cache of both models, side by side in alternating rounds."""
    quiet()
    result = compare_runtime(
        model, pruned, contexts=context or [512], new_tokens=new_tokens, batch=batch, repeats=repeats, dtype=dtype
    )
    if as_json:
        print(json.dumps(result))
    else:
        show_runtime(result)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A causal language model: folder or hub name.", show_default="SmolLM2-135M")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")] = Path("clover-demo"),
    as_json: Json = False,
) -> None:
    """Prune a real model, compare it with the original, write a report: minutes on two cores."""
    quiet()
    result = run_demo(model, out)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    show(table(result.summary, result.measurements))
    print(f"Report: {result.report}\n\nLoad the pruned model:\n")
    print(f"    import clover\n    model = clover.load({result.model!r})")


def main() -> None:
    """Entry point of the command ``clover``."""
    app()


if __name__ == "__main__":
    main()
