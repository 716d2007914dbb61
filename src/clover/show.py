"""Results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from clover.families import Block
    from clover.plan import Spectrum
    from clover.report import Row


def describe(block: Block, spectrum: Spectrum) -> dict[str, Any]:
    """One block's sizes and singular values, ready for JSON."""
    kv_heads, queries, qk, _ = block.heads().q.shape
    heads = {"query_heads": kv_heads * queries, "kv_heads": kv_heads}
    sizes = {"qk_size": qk, "vo_size": block.heads().v.shape[1]}
    return {"name": spectrum.name, "part": spectrum.part, **heads, **sizes, **asdict(spectrum)}


def show(rows: Iterable[Row]) -> None:
    """Before, after and change, a line each."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def show_blocks(blocks: Iterable[dict[str, Any]]) -> None:
    """A line a block: how many of its directions are not small, on average over its heads."""
    table = Table(box=box.SIMPLE_HEAD, caption="Q-K, V-O: values above 1 % of the head's largest, mean over heads")
    for name in ("block", "part", "heads", "KV heads", "Q-K", "V-O"):
        table.add_column(name, justify="left" if name in ("block", "part") else "right")
    for block in blocks:
        counts = [f"{_large(block[side]):.1f} of {len(block[side][0])}" for side in ("qk", "vo")]
        table.add_row(block["name"], block["part"], str(block["query_heads"]), str(block["kv_heads"]), *counts)
    Console().print(table)


def _large(rows: tuple[tuple[float, ...], ...]) -> float:
    return sum(value > 0.01 * row[0] for row in rows for value in row) / len(rows)
