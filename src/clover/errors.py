"""The errors that a user can cause, and warnings. Each message names the value, the cause and the remedy."""

from __future__ import annotations

import sys
import warnings


class CloverError(ValueError):
    """A request, a model or a file that cannot be worked with; the command line prints it and exits with 2."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UnsupportedModelError(CloverError):
    """What a model is made of is not known, or has no place in a format or a runtime."""


def warn(text: str) -> None:
    """Warn of the line that called this package, from however deep in it."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "clover":
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
