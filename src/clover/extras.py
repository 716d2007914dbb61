"""Packages that only some of the work needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from clover.errors import CloverError, reason


def extra(module: str, name: str = "eval") -> ModuleType:
    """Import a module of an extra, see ``pyproject.toml``.

    Raises:
        CloverError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of the system that it needs
        remedy = f'pip install "clover-attention[{name}]"'
        raise CloverError(f"this needs {module}, which is missing: {remedy} ({reason(error)})") from error
