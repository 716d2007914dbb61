"""Run a model as it is, or with parts of it computing otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

from torch import OutOfMemoryError, Tensor, nn

from clover.errors import CloverError, reason

GIVEN = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, without a cache.

    Raises:
        CloverError: the batch lacks something, or the model can't read it.
    """
    config: Any = model.config
    parts = (config, *(getattr(config, name, None) for name in config.sub_configs))
    known = "use_cache" in signature(model.forward).parameters or any(getattr(p, "use_cache", False) for p in parts)
    off = {"use_cache": False} if known else {}
    needed = [n for n, p in signature(model.forward).parameters.items() if p.default is p.empty and p.kind in GIVEN]
    if isinstance(batch, Mapping) and (lacking := [name for name in needed if name not in batch]):
        raise CloverError(
            f"{type(model).__name__} needs {', '.join(lacking)}, too; give batches of your own that have it"
        )
    try:
        return model(**off | dict(batch)) if isinstance(batch, Mapping) else model(batch, **off)
    except (CloverError, OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if "can't allocate memory" in str(error):
            raise
        given = batch if isinstance(batch, Mapping) else {"tensor": batch}
        shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in given.items() if isinstance(x, Tensor))
        raise CloverError(
            f"{type(model).__name__} can't read a batch of {shapes}: {reason(error)}; give what its forward takes"
        ) from error


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, modules compute otherwise; then each has the ``forward`` that it had, a hook's own one too."""
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before
