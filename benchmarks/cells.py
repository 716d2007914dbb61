"""What all tables are made of: result files by name, Markdown, and the names that tables share."""

from __future__ import annotations

from collections.abc import Iterable

Results = dict[str, dict]
"""Result files by name."""
CUTS = {"vo25": "V-O 25 %", "vo50": "V-O 50 %", "qk25": "Q-K 25 %", "qk50": "Q-K 50 %",
        "both25": "Q-K and V-O 25 %", "both50": "Q-K and V-O 50 %"}  # fmt: skip
METHODS = {"clover": "CLOVER", "lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the columns of ``header`` are separated by bars."""
    columns = [c.strip() for c in header.split("|")]
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def result(results: Results, name: str) -> dict:
    return results.get(name, {}).get("result", {})
