"""Two saved models side by side: speed in alternating rounds, peak memory in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from clover.errors import CloverError, warn
from clover.measure.cost import compare_throughput, sizes
from clover.model.precision import ready
from clover.model.traits import reads_text_alone, writes_text
from clover.pruning.checkpoint import load

SIDES = ("dense", "pruned")


def compare_runtime(
    dense: str,
    pruned: str,
    *,
    contexts: Sequence[int] = (512,),
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Compare a pruned model with the original.

    Args:
        dense, pruned: folders or hub names.
        contexts: tokens read before the first is written, or at once by what writes none; what reads sound or images is
            run once, on inputs of its own size.
        new_tokens: tokens written one at a time.
        batch: sequences at once.
        repeats: timed rounds after one to warm up; the models take turns, medians are returned.
        dtype: of both; by default float32 on a CPU, and on a GPU that of their files.

    Returns:
        ``device``, ``dtype``, ``batch`` and ``contexts``: for each context (an empty one for sound or images)
        pairs of the figures of both models. ``kv_bytes`` are those of the cache once everything is written,
        ``peak_bytes`` the most that a process held that only ran this model (None if it was killed, or the system can't
        tell); ``decode_bound`` has for the pruned model how many times faster it could write if time went to reading
        weights and cache alone. ``ratios``: for each context the medians of the pruned model's rates over those of the
        original in the same turn.

    Raises:
        CloverError: no model there, a count below 1, or more tokens than the model has positions for.
    """
    models: dict[str, Any] = {}
    for side, name in zip(SIDES, (dense, pruned), strict=True):
        models[side] = load(name, dtype=getattr(torch, dtype)) if dtype else ready(load(name))[0]
        models[side] = models[side].to("cuda" if torch.cuda.is_available() else "cpu")
    held = {side: sizes(model) for side, model in models.items()}
    first = models["dense"]
    if writes_text(first) != writes_text(models["pruned"]):
        raise CloverError(f"{dense} and {pruned} are models of different kinds; compare a model with its own cut")
    result: dict[str, Any] = {"device": str(first.device), "dtype": str(first.dtype).removeprefix("torch.")}
    result |= {"batch": batch, "new_tokens": new_tokens, "repeats": repeats, "contexts": {}, "ratios": {}}
    for context in contexts if writes_text(first) or reads_text_alone(first) else [None]:
        rates = compare_throughput(models, repeats=repeats, **_work(context, new_tokens, batch))
        run = {key: [rates[side][key] for side in SIDES] for key in rates["dense"]}
        if context is not None and writes_text(first):
            cache = [(held[side]["kv_bytes_per_token"] or 0) * batch * (context + new_tokens) for side in SIDES]
            moved = [(held[side]["bytes"] or 0) + kv for side, kv in zip(SIDES, cache, strict=True)]
            run |= {"kv_bytes": cache, "decode_bound": [1.0, moved[0] / moved[1]]}
        run["weight_bytes"] = [held[side]["bytes"] for side in SIDES]
        name = "" if context is None else str(context)
        result["contexts"][name], result["ratios"][name] = run, rates["ratio"]["pruned"]
    del first
    models.clear()  # what is run in processes of their own needs the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for context, run in result["contexts"].items():
        options = _work(int(context) if context else None, new_tokens, batch)
        run["peak_bytes"] = [_peak(name, result["dtype"], options) for name in (dense, pruned)]
    return result


def _work(context: int | None, new_tokens: int, batch: int) -> dict[str, Any]:
    return {"context": 1 if context is None else context, "new_tokens": new_tokens, "batch": batch}


def _peak(name: str, dtype: str, options: dict[str, Any]) -> int | None:
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(peak_bytes, name, dtype, options).result()
    except BrokenProcessPool:
        warn(f"the process that measured the memory of {name} was killed, perhaps for want of it")
        return None


def peak_bytes(name: str, dtype: str, options: dict[str, Any]) -> int | None:
    """Load a model, run it, and tell the most bytes that were held, on the GPU or else by this process.

    None where the system can't tell.
    """
    logging.disable_progress_bar()  # of the process that it runs in
    model: Any = load(name, dtype=getattr(torch, dtype))
    if torch.cuda.is_available():
        model = model.cuda()
    compare_throughput({name: model}, repeats=1, **options)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells is at least what the parent process held
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
