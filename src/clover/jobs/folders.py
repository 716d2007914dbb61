"""Folders that are whole or not there: filled under a hidden name, forced to disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clover.errors import CloverError

SYNCED = "r+b" if os.name == "nt" else "rb"
"""How a file is opened to be forced to disk: Windows wants to be able to write it."""
MADE = (errno.ENOTEMPTY, errno.EEXIST)
LONGEST = 240
"""Bytes in a name, with room for what a hidden folder beside it adds."""


@contextmanager
def fresh_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to fill, which gets its name at the end, or leaves no trace where filling it fails.

    Raises:
        CloverError: the folder exists, or can't be written.
    """
    target = check_writable(path)
    folder = None
    try:
        folder = target.parent / f".{target.name}.{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        yield folder
        sync(folder)
        folder.rename(target)
    except Exception as error:
        if not of_writing(error):
            raise
        if getattr(error, "errno", None) in MADE and target.exists():
            made, folder = folder, None  # as much work as the other's
            raise CloverError(f"{target} was made by another run meanwhile; this one's is in {made}") from error
        why = getattr(error, "strerror", None) or error
        raise CloverError(f"{target} can't be written: {why}; free space or choose another place") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def of_writing(error: Exception) -> bool:
    """Whether the system refused: safetensors and tokenizers say so in words, what transformers says has no number."""
    return (isinstance(error, OSError) and error.errno is not None) or "(os error " in str(error)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden file to write, which then is on disk under its name, or was never there: readers see the old or the new.

    Raises:
        OSError: it can't be written.
    """
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        yield part
        _force(part)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path of a folder that can be made.

    Raises:
        CloverError: it exists, or its parent can't be written.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):  # a link that leads nowhere, too
        raise CloverError(f"{target} exists; remove it or choose another folder")
    if len(os.fsencode(target.name)) > LONGEST:
        raise CloverError(f"the name {target.name[:40]}... is longer than {LONGEST} bytes; choose a shorter one")
    there = next(parent for parent in target.parents if os.path.lexists(parent))
    if not os.path.isdir(there):
        raise CloverError(f"{target} can't be written: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CloverError(f"{there} can't be written; choose another place")
    return target


def sync(folder: Path) -> None:
    """Force the files to disk, so that the rename is never ahead of what it names; they get the rights of the folder.

    safetensors writes for the user's eyes alone, whatever the umask.
    """
    rights = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            _force(file)
            file.chmod(rights)


def _force(file: Path) -> None:
    with open(file, SYNCED) as handle:
        os.fsync(handle.fileno())
