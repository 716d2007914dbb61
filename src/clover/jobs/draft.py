"""A folder in the making: hidden beside its place until it is whole, and taken up again after a kill.

``.OUT.draft`` holds a lock, the request that it answers, the decompositions that are done, marks of the pieces of
``out`` that are on disk, and ``out``, which is renamed to ``OUT`` at the end. That of a tuning run is ``.OUT.tuning``,
with checkpoints.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from clover.errors import CloverError
from clover.jobs.crew import Crew
from clover.jobs.folders import check_writable, of_writing, sync, whole_file

try:
    import fcntl
except ImportError:  # there are none of these locks on Windows; nobody is kept out there
    fcntl = None  # type: ignore[assignment]

TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Draft:
    """The hidden folder of one request. Made by ``draft``."""

    def __init__(self, target: Path, ending: str = "draft") -> None:
        self.target = target
        self.folder = hidden(target, ending)
        self.out = self.folder / "out"

    def has(self, kind: str, name: str) -> bool:
        """Whether a piece was finished, by this run or one before."""
        return self._path(kind, name).exists()

    def keep(self, kind: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Finish a piece with what must be remembered of it; it then is on disk, or wasn't finished."""
        with whole_file(self._path(kind, name)) as part:
            save_file({key: value.contiguous() for key, value in tensors.items()}, part)

    def load(self, kind: str, name: str) -> dict[str, Tensor]:
        """What ``keep`` kept."""
        return load_file(self._path(kind, name))

    def forget(self, kind: str) -> None:
        """Drop the pieces of a kind."""
        shutil.rmtree(self.folder / kind)
        (self.folder / kind).mkdir()

    def finish(self) -> Path:
        """Give the folder its name.

        Raises:
            CloverError: something else took that name meanwhile.
        """
        sync(self.out)
        if self.target.exists():
            raise CloverError(f"{self.target} was made by someone else meanwhile; the result is in {self.out}")
        self.out.rename(self.target)
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.target

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.safetensors"


def hidden(target: Path, ending: str = "draft") -> Path:
    """Where the draft of a folder lies."""
    return target.parent / f".{target.name}.{ending}"


@contextmanager
def draft(
    path: str | os.PathLike[str],
    request: Mapping[str, Any],
    crew: Crew,
    *,
    kinds: tuple[str, ...],
    resume: bool = False,
    ending: str = "draft",
) -> Iterator[Draft]:
    """Begin a draft, or go on with the one of the same request.

    Args:
        path: the folder to make.
        request: data, compared as JSON tells it; a draft of any other request is refused.
        crew: all processes that write to it; the folder must be one for all.
        kinds: of the pieces that will be kept.
        resume: insist on a draft that is there.
        ending: of the hidden folder's name.

    Raises:
        CloverError: the folder exists or is being made by another run, there is a draft of another request, or none to
            resume, or the disk is full (what was done is kept).
    """
    target = check_writable(path) if crew.leads else Path(path).absolute()
    made = Draft(target, ending)
    lock = None
    try:
        if crew.leads:
            if resume and not (made.folder / "request.json").exists():
                raise CloverError(f"there is no draft of {target} to resume; leave out --resume to begin")
            made.out.mkdir(parents=True, exist_ok=True)
            for kind in kinds:
                (made.folder / kind).mkdir(exist_ok=True)
            lock = _lock(made.folder / "lock", target)
            _agree(made, kinds, request)
        crew.meet()
        yield made
    except Exception as error:
        if not of_writing(error):
            raise
        number = getattr(error, "errno", None)
        reason = str(getattr(error, "strerror", None) or error)  # the error itself would keep its frames alive
        full = number in FULL or any(word in reason for word in ("space", "quota", "too large"))
        remedy = "free space" if full else "make the place writable"
        raise CloverError(
            f"{target} can't be written: {reason}; {remedy} and give the same command again, what was done is kept"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)


def _lock(file: Path, target: Path) -> int:
    """Hold the draft against other runs; the system lets go of it when this process ends, however it ends."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == file.stat().st_ino:
            return lock
    except OSError as error:
        if error.errno not in (*TAKEN, errno.ENOENT):  # a file system without locks
            return lock
    os.close(lock)
    raise CloverError(f"{target} is being made by another run; wait for it, or choose another folder")


def _agree(made: Draft, kinds: tuple[str, ...], request: Mapping[str, Any]) -> None:
    """Begin anew if the draft is of an unknown run or holds no piece; else its request must be this one."""
    request = json.loads(json.dumps(request, default=str))  # as it will be read again
    file = made.folder / "request.json"
    if not file.exists() or not any(any((made.folder / kind).iterdir()) for kind in kinds):
        for kind in (*kinds, made.out.name):
            made.forget(kind)
        with whole_file(file) as part:
            part.write_text(json.dumps(request, indent=1))
        return
    try:
        there = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise CloverError(f"{file} is damaged; remove {file.parent} and begin anew") from error
    if different := sorted(key for key in {*request, *there} if request.get(key) != there.get(key)):
        key = different[0]
        raise CloverError(
            f"{file.parent} is the draft of another request ({key} {there.get(key)!r} there, {request.get(key)!r} "
            "here); remove it, or choose another folder"
        )
