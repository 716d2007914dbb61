"""Progress bars on standard error; standard output belongs to results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as _track

T = TypeVar("T")
console = Console(stderr=True)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield ``items`` under a progress bar named ``what``; silent where standard error is no terminal."""
    yield from _track(items, what, console=console, transient=True, disable=not console.is_terminal)
