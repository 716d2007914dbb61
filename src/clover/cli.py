"""The command line. Results go to standard output, all else to standard error; a mistake is told in one sentence."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clover.errors import CloverError
from clover.progress import console
from clover.show import Commands, describe, note, show, show_blocks

if TYPE_CHECKING:
    from clover.budget import Rule


def _share(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is no share of the directions; it must be at least 0 and less than 1")
    return value


def _threshold(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is no threshold; it must be a finite number that is not negative")
    return value


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make the attention of trained transformers smaller in its own latent space, without training.",
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")]
Share = Annotated[
    float | None, typer.Option(metavar="R", callback=_share, help="Share of these directions to remove, 0 to 1.")
]
Threshold = Annotated[
    float | None, typer.Option(metavar="T", callback=_threshold, help="Instead: remove norm products of at most T.")
]
Part = Annotated[Literal["encoder", "decoder", "cross", "all"], typer.Option(help="Which attention blocks.")]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text .txt, questions .jsonl, audio manifest .tsv, or a folder of images."),
]
Metric = Annotated[
    Literal["activations", "weights"] | None,
    typer.Option(help="How directions are measured.", show_default="activations with --calibration, else weights"),
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="Rows of a manifest that are used.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use at most N windows of text, clips or images.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


def _version(wanted: bool | None) -> None:
    if wanted:
        from clover import __version__

        print(f"clover {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    warnings.showwarning = lambda message, *_: note(f"warning: {message}")


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
    """Show the singular values of every head, beside the norms that pruning without CLOVER goes by."""
    _check_metric(metric, calibration)
    if plot:
        _check_figure(plot)
    from clover.families import blocks
    from clover.pruning import inspect as look

    loaded, _ = _load(model)
    found = blocks(loaded, part)
    spectra = look(loaded, part=part, calibration=_batches(loaded, calibration, metric, split, limit), metric=metric)
    if plot:
        from clover.report import plot_spectra

        plot_spectra(spectra, plot)
    described = [describe(block, spectrum) for block, spectrum in zip(found, spectra, strict=True)]
    if as_json:
        print(json.dumps({"model": model, "blocks": described}))
    else:
        show_blocks(described)


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
    granularity: Annotated[Literal["head", "layer", "model"], typer.Option(help="What has ranks of its own.")] = "head",
    groups: Annotated[int, typer.Option(min=1, metavar="N", help="Most head sizes that a block may have.")] = 4,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sample of calibration queries.")] = 0,
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
    from clover.budget import Limits
    from clover.checkpoint import check_writable, save
    from clover.pruning import apply, find_bases, plan_of, plan_ranks, summary
    from clover.report import write_report

    check_writable(out)
    rules = _rule("qk", qk, qk_threshold), _rule("vo", vo, vo_threshold)
    cuts = any((qk, vo, qk_threshold, vo_threshold))
    if not cuts and None in (qk, vo):
        raise CloverError(
            "nothing is to be removed; give --qk, --vo or a threshold (--qk 0 --vo 0 only turns the basis)"
        )
    _check_metric(metric, calibration)
    if report:
        _check_figure(report)
    if cuts and (metric == "weights" or calibration is None):
        note("warning: pruning by the weights alone breaks most modern models; give --calibration FILE instead")
    if resume and not stream:
        raise CloverError("--resume goes on with a run of --stream; give both")
    if stream:
        if report:
            raise CloverError(f"--report {report} needs all blocks at once; leave out --report or --stream")
        from clover.streaming import prune_folder

        _quiet()
        weights = metric == "weights" or calibration is None
        sizes = prune_folder(
            model, out, qk=qk, vo=vo, part=part, qk_threshold=qk_threshold, vo_threshold=vo_threshold,
            granularity=granularity, limits=Limits(groups=groups), beside=_beside(model), resume=resume, seed=seed,
            calibration=None if weights else lambda shell: _batches(shell, calibration, metric, split, limit) or (),
        )  # fmt: skip
        _tell(sizes, f"saved {out.absolute()}", as_json)
        return

    loaded, dtype = _load(model)
    batches = _batches(loaded, calibration, metric, split, limit)
    bases = find_bases(loaded, part=part, calibration=batches, metric=metric, seed=seed)
    apply(loaded, bases, plan_ranks(bases, *rules, granularity=granularity, limits=Limits(groups=groups)))
    sizes = summary(loaded.to(dtype))
    target = save(loaded, out, beside=_beside(model))
    if report:
        spectra = [basis.spectrum() for basis in bases]
        write_report(report, title=f"{model}, pruned", spectra=spectra, plan=plan_of(loaded), summary=sizes)
    _tell(sizes, f"saved {target}" + (f" and {report}" if report else ""), as_json)


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
    from clover.evaluate import evaluate as measure

    _quiet()
    score = measure(model, data, task, split, limit)
    if as_json:
        print(json.dumps(score.to_dict()))
        return
    print(f"{score.task} {score.value:.4f}")
    for key, value in score.protocol.items():
        print(f"  {key}: {value}")


@app.command()
def tune(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder to make.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="A .jsonl of instruction and output, or a .txt; each may be .gz.")
    ],
    method: Annotated[str, typer.Option(help="clover, lora, dora or pissa, all on the same modules.")] = "clover",
    steps: Annotated[int, typer.Option(metavar="N", help="Optimiser steps.")] = 100,
    lr: Annotated[float, typer.Option(metavar="X", help="Largest learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option(metavar="N", help="Examples a step.")] = 8,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the order of the data and of LoRA's start.")] = 0,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens at most in an example.")] = 512,
    core: Annotated[
        Literal["full", "diagonal"], typer.Option(help="A matrix a head, or its singular values.")
    ] = "full",
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Of the LoRA methods.", show_default="as many parameters as clover")
    ] = None,
    match_parameters: Annotated[
        bool, typer.Option("--match-parameters", help="Take the rank nearest to clover's number of parameters.")
    ] = False,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure the loss on it, before and after.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tune a language model by an adapter. A run that was killed goes on when it is called again."""
    from clover.files import extra

    extra("peft", "tune")
    from clover.training import Recipe
    from clover.training import tune as run

    if rank is not None and match_parameters:
        raise CloverError(f"--rank {rank} and --match-parameters exclude each other; give one")
    _quiet()
    recipe = Recipe(method, steps, lr, batch, seed, length=length, core=core, rank=rank)
    result = run(model, adapter, data, recipe, eval_data=eval_data)
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
    from clover.files import extra

    extra("peft", "tune")
    from clover.training import merge as run

    _quiet()
    note(f"saved {run(model, adapter, out)}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    kind: Annotated[Literal["padded"], typer.Option("--format", help="padded: zeros for what was cut.")] = "padded",
) -> None:
    """Write a pruned model in its original class, which loads anywhere without clover and is no smaller."""
    from clover.checkpoint import check_writable, load, save
    from clover.export import pad

    check_writable(out)
    _quiet()
    note(f"saved {save(pad(load(model)), out, beside=_beside(model))}; padded with zeros, so it is no smaller")


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A causal language model: folder or hub name.", show_default="SmolLM2-135M")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")] = Path("clover-demo"),
    as_json: Json = False,
) -> None:
    """Prune a real model, compare it with the original, write a report: minutes on two cores."""
    from clover.demo import run
    from clover.report import table

    _quiet()
    result = run(model, out)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    show(table(result.summary, result.measurements))
    print(f"Report: {result.report}\n\nLoad the pruned model:\n")
    print(f"    import clover\n    model = clover.load({result.model!r})")


# --- what the commands share ---


def _rule(name: str, share: float | None, threshold: float | None) -> Rule:
    from clover.budget import Share, Threshold

    if None not in (share, threshold):
        raise CloverError(f"--{name} {share} and --{name}-threshold {threshold} exclude each other; give one")
    return Share(share or 0.0) if threshold is None else Threshold(threshold)


def _check_metric(metric: str | None, calibration: Path | None) -> None:
    from clover.files import file_kind

    if metric == "activations" and calibration is None:
        raise CloverError("--metric activations needs data; give --calibration FILE, or choose --metric weights")
    if calibration is not None:
        file_kind(calibration)
        if metric == "weights":
            note(f"warning: --metric weights makes no use of {calibration}")


def _check_figure(path: Path) -> None:
    """Find out before the long work whether a page or picture can be made."""
    from importlib.util import find_spec

    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise CloverError(f"{path} can't be written; name a file in an existing folder that you may write to")
    if find_spec("matplotlib") is None:
        raise CloverError('plots need matplotlib, which is missing: pip install "clover-attention[report]"')


def _tell(sizes: dict[str, float | int], sentence: str, as_json: bool) -> None:
    """What became of the model; once, where several processes made it."""
    from clover.report import table

    if os.environ.get("RANK", "0") != "0":
        return
    note(sentence)
    if as_json:
        print(json.dumps(sizes))
    else:
        show(table(sizes))


def _quiet() -> None:
    """Keep transformers from talking beside results; its progress bars stay where someone can see them move."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not console.is_terminal:
        logging.disable_progress_bar()


def _load(name: str) -> tuple[Any, Any]:
    """The model, ready to be computed with, and the dtype of its checkpoint."""
    from clover.checkpoint import load, ready

    _quiet()
    return ready(load(name, trust_remote_code=False))


def _batches(
    model: Any, calibration: Path | None, metric: str | None, split: str | None, limit: int | None
) -> Iterable[Any] | None:
    from clover.data import calibration_batches

    if calibration is None or metric == "weights":
        return None
    sizes = {} if limit is None else {"sequences": limit, "limit": limit}
    return calibration_batches(calibration, model, split=split, **sizes)


def _beside(name: str) -> tuple[Any, ...]:
    """What lies beside a model and must go with it: its processor or tokenizer."""
    from clover.data import load_processor

    for kind in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        with suppress(CloverError):
            return (load_processor(name, kind),)
    note(f"warning: {name} has no tokenizer or processor that could be saved with the pruned model")
    return ()


def main() -> None:
    """Entry point of the command ``clover``."""
    app()


if __name__ == "__main__":
    main()
