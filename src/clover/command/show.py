"""How the command line talks: results as tables, mistakes and notes in one sentence."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from clover.command.report import Row
from clover.errors import CloverError, reason
from clover.jobs.crew import started_together
from clover.model.block import Block
from clover.planning.plan import Spectrum
from clover.progress import console

INTERRUPTED = 130  # what shells report for Ctrl-C
WIDE = 160
"""Columns of a file or a pipe."""
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What the system says where it can't write; any other error of it is a fault of ours, whose traceback is needed."""
SHARED = ("prune", "tune")
"""Commands whose work several processes share."""


class Commands(TyperGroup):
    """Tells a mistake in one sentence and exits with 2, whether the parser found it or the library."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; never returns."""
        with suppress(ValueError):  # only a main thread may
            for name in ("SIGTERM", "SIGHUP"):  # so that what is half done is cleared away; Windows has no SIGHUP
                number = getattr(signal, name, signal.SIGTERM)
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    signal.signal(number, signal.default_int_handler)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            print(end="", flush=True)  # what can't be written is to be told now
        except CloverError as error:
            _fail(str(error))
        except (torch.OutOfMemoryError, MemoryError) as error:
            _fail(f"{reason(error)} Try a smaller batch, --stream (of prune), or the CPU: CUDA_VISIBLE_DEVICES=")
        except OSError as error:
            if error.errno not in (errno.EPIPE, *UNWRITTEN):
                raise
            _forget_output()
            if error.errno == errno.EPIPE:
                sys.exit(1)
            place = "" if error.filename is None else f"{error.filename}: "
            _fail(
                f"{place}{error.strerror}; what is not said to be saved is not there: free space or choose another "
                "place"
            )
        except Exception as error:
            if "can't allocate memory" in str(error):  # torch's, on CPUs, has no class of its own
                _fail(f"{reason(error)}; try a smaller batch, or --stream (of prune)")
            if not hasattr(error, "format_message"):  # only what the parser raises has it
                raise
            command = getattr(getattr(error, "ctx", None), "command_path", "clover")
            _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
        if code == INTERRUPTED:
            note(
                "interrupted; what is not said to be saved is not there. tune and prune --stream go on if called again"
            )
        sys.exit(code or 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find a command, and refuse to have several processes do one's work side by side."""
        found = super().resolve_command(ctx, args)
        if started_together() and found[0] not in SHARED:
            raise CloverError(f"several processes share the work of {' and '.join(SHARED)} alone; start one process")
        return found


def _forget_output() -> None:
    """Of what is still to be written to standard output, or Python fails over it again as it ends."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str) -> None:
    note("error: " + " ".join(line.strip() for line in sentence.splitlines()))
    sys.exit(2)


def note(text: str) -> None:
    """Say something on standard error."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(block: Block, spectrum: Spectrum) -> dict[str, Any]:
    """One block's sizes and singular values, ready for JSON."""
    kv_heads, queries, qk, _ = block.heads().q.shape
    heads = {"query_heads": kv_heads * queries, "kv_heads": kv_heads}
    sizes = {"qk_size": qk, "vo_size": block.heads().v.shape[1]}
    return asdict(spectrum) | heads | sizes


def show(rows: Iterable[Row]) -> None:
    """Before, after and change, a line each."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    _print(table)


def show_blocks(blocks: Iterable[dict[str, Any]]) -> None:
    """A line a block: how many of its directions are not small, on average over its heads."""
    table = Table(box=box.SIMPLE_HEAD, caption="Q-K, V-O: values above 1 % of the head's largest, mean over heads")
    for name in ("block", "part", "heads", "KV heads", "Q-K", "V-O"):
        # Folded where there is no room: cut off, the names of all layers would be the same.
        table.add_column(name, justify="left" if name in ("block", "part") else "right", overflow="fold")
    for block in blocks:
        counts = [
            f"{_large(rows):.1f} of {len(rows[0])}" if (rows := block[side]) else "fixed by a norm"
            for side in ("qk", "vo")
        ]
        table.add_row(block["name"], block["part"], str(block["query_heads"]), str(block["kv_heads"]), *counts)
    _print(table)


def show_hints(hints: Iterable[dict[str, float]]) -> None:
    """What could go for a loss, a line each."""
    for hint in hints:
        shares = f"--qk {hint['qk']:.2f} --vo {hint['vo']:.2f}"
        print(f"for about {100 * hint['max_loss']:g} % loss: {shares}")


def show_runtime(result: dict[str, Any]) -> None:
    """A line for each measured figure and context."""
    table = Table(box=box.SIMPLE_HEAD, caption=f"{result['device']}, {result['dtype']}, batch {result['batch']}")
    for name in ("context", "", "dense", "pruned", "ratio"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for context, run in result["contexts"].items():
        for key, (dense, pruned) in run.items():
            scale, unit = (2**20, "MiB") if key.endswith("bytes") else (1, "")
            title = key.replace("_per_second", "/s").replace("_bytes", f", {unit}").replace("_", " ")
            figures = ("" if value is None else f"{value / scale:,.2f}" for value in (dense, pruned))
            ratio = result["ratios"][context].get(key) or (pruned / dense if dense and pruned else None)
            table.add_row(context, title, *figures, f"{ratio:.3f}" if ratio else "")
    _print(table)


def _print(table: Table) -> None:
    """On standard output; where that is no terminal, whose width is known, names need not be folded."""
    if sys.stdout is not None:  # as it is where it was closed
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _large(rows: tuple[tuple[float, ...], ...]) -> float:
    return sum(value > 0.01 * row[0] for row in rows for value in row) / len(rows)
