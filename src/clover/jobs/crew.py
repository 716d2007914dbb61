"""The processes of one run: alone, or as many as ``torchrun`` or ``accelerate launch`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clover.errors import CloverError, reason

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """This process among its equals. With one process, every method does nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Of torch.distributed; carries tensors on CPUs."""

    @property
    def leads(self) -> bool:
        """Whether this process does what must be done once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the work that is this process's own."""
        return items[self.rank :: self.size]

    def meet(self) -> None:
        """Wait for all.

        Raises:
            CloverError: one of them died.
        """
        if self.size > 1:
            with _together():
                dist.barrier(self.group)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over all processes, in place; alike in all of them afterwards, to the last bit.

        Raises:
            CloverError: one of the processes died.
        """
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    dist.all_reduce(tensor, group=self.group)


def started_together() -> bool:
    """Whether this is one of several processes that ``torchrun`` or accelerate started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1  # schedulers set the latter alone


def is_first() -> bool:
    """Whether this is the process that speaks for all."""
    return not started_together() or os.environ["RANK"] == "0"


@contextmanager
def crew() -> Iterator[Crew]:
    """Join the processes that were started together, for as long as the block runs."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if dist.is_available() and dist.is_initialized():
        own = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        yield Crew(dist.get_rank(), dist.get_world_size(), own)
    elif started_together():
        with _together():
            dist.init_process_group("gloo")
        try:
            yield Crew(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Crew()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CloverError(
            f"another process of this run died or can't be reached ({reason(error)}); start all again to go on"
        ) from error
