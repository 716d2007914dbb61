"""Checkpoints of safetensors, read and written a tensor at a time.

Files are read with ordinary reads, never mapped: mapped pages count as the process's memory, and a model may be larger
than that. A file is written at places known beforehand, so tensors may come in any order and from several processes.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clover.errors import CloverError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 2**20
"""Bytes copied at a time, through one buffer: a larger one leaves the processor's cache and takes twice as long."""
BINARY = getattr(os, "O_BINARY", 0)
"""Windows otherwise turns every byte that looks like the end of a line into two."""
HANDED = 2**27
"""Bytes that the system is asked to copy at once: few enough that Ctrl-C is noticed soon."""
UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What a system says that can't copy between these files."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Those that a tensor can be read in; others are only copied."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor's form, and where its bytes stand in which file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def expect(self) -> None:
        """Tell the system that the bytes will be read; does nothing where it has no such call, or the file is gone."""
        if hasattr(os, "posix_fadvise") and self.file.exists():
            with open(self.file, "rb", buffering=0) as handle:
                os.posix_fadvise(handle.fileno(), self.start, self.size, os.POSIX_FADV_WILLNEED)

    def equals(self, other: Entry) -> bool:
        """Whether the other holds the same tensor, bit for bit; a little of both is in memory at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with open(self.file, "rb") as mine, open(other.file, "rb") as theirs:
            mine.seek(self.start)
            theirs.seek(other.start)
            sizes = (min(CHUNK, self.size - at) for at in range(0, self.size, CHUNK))
            return all(mine.read(size) == theirs.read(size) for size in sizes)

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CloverError: the file can't be read, or the dtype is none that weights have.
        """
        if self.dtype not in DTYPES:
            raise CloverError(f"{name} in {self.file} has dtype {self.dtype}; prune the unquantised model")
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        view, at = _view(tensor), 0
        try:
            with open(self.file, "rb", buffering=0) as handle:
                handle.seek(self.start)
                while at < self.size:
                    count = handle.readinto(view[at:])
                    if not count:
                        raise CloverError(f"{self.file} ends inside {name}; it was cut off while being read")
                    at += count
        except OSError as error:
            raise CloverError(f"{self.file} can't be read: {error.strerror}; restore the file") from error
        return tensor


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors whose files were found whole and to agree with their index."""

    folder: Path
    entries: Mapping[str, Entry]
    indexed: bool

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers and check them; no tensor is read.

        Raises:
            CloverError: no safetensors there, a file is missing or damaged, or the index contradicts the files.
        """
        folder = Path(folder)
        index = folder / INDEX
        if os.path.exists(folder / SINGLE):  # transformers reads it, whatever else lies there
            places, files = None, [SINGLE]
        elif os.path.exists(index):
            places = read_index(index)
            files = sorted(set(places.values()))
        else:
            raise CloverError(
                f"{folder} holds no {SINGLE} and no {INDEX}; streaming reads safetensors alone: save the model so first"
            )
        entries: dict[str, Entry] = {}
        for file in files:
            found = _header(folder / file)
            if places is not None:
                _agree(index, places, file, found)
            entries |= found
        return cls(folder, entries, places is not None)

    @property
    def files(self) -> list[str]:
        """Names of the files, sorted."""
        return sorted({entry.file.name for entry in self.entries.values()})

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether these are still the same files."""
        stats = {file: (self.folder / file).stat() for file in self.files}
        return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def read_index(index: Path) -> dict[str, str]:
    """Names of tensors -> names of files.

    Raises:
        CloverError: it is damaged.
    """
    try:
        places = json.loads(index.read_text())["weight_map"]
        if isinstance(places, dict) and places and all(Path(f).name == f for f in places.values()):
            return places
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CloverError(f"{index} is no index of safetensors: it needs a weight_map from names to files; restore it")


def _agree(index: Path, places: Mapping[str, str], file: str, found: Mapping[str, Entry]) -> None:
    listed = {name for name, place in places.items() if place == file}
    if missing := sorted(listed - set(found)):
        raise CloverError(f"{index} says that {missing[0]} is in {file}, which does not hold it; restore the files")
    if extra := sorted(set(found) - listed):
        raise CloverError(f"{file} holds {extra[0]}, which {index} does not place there; restore the files")


def _header(file: Path) -> dict[str, Entry]:
    """Tensors of a file; safetensors itself checks that the header is sound and the file as long as it says."""
    try:
        with safe_open(file, "pt"):
            pass
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except FileNotFoundError as error:
        raise CloverError(f"{file} is missing; restore it") from error
    except (OSError, SafetensorError) as error:
        raise CloverError(f"{file} is damaged or cut off ({error}); restore it") from error
    header.pop("__metadata__", None)
    return {
        name: Entry(file, of["dtype"], tuple(of["shape"]), 8 + length + of["data_offsets"][0],
                    of["data_offsets"][1] - of["data_offsets"][0])
        for name, of in header.items()
    }  # fmt: skip


class Shard:
    """A safetensors file in the making: header first, then each tensor at its place, by whoever has it."""

    def __init__(self, file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
        """Lay the file out.

        Args:
            file: where it is, or will be after ``create``.
            tensors: dtype, shape and bytes of each, by name.
        """
        self.file = file
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        ordered = dict(sorted(tensors.items(), key=lambda item: -_width(item[1])))
        at = 0
        for name, (dtype, shape, size) in ordered.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self.size = len(self.head) + at
        at = len(self.head)
        self.entries: dict[str, Entry] = {}
        for name, (dtype, shape, size) in ordered.items():
            self.entries[name] = Entry(file, dtype, shape, at, size)
            at += size

    def read(self, name: str) -> Tensor:
        """A tensor that was written."""
        return self.entries[name].read(name)

    def exists(self) -> bool:
        """Whether the file is there and laid out like this; its tensors may not be written yet."""
        if not self.file.exists() or self.file.stat().st_size != self.size:
            return False
        with open(self.file, "rb") as handle:
            return handle.read(len(self.head)) == self.head

    def create(self) -> None:
        """Write the header and take the room for all of it."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | BINARY, 0o644)
        try:
            os.ftruncate(handle, 0)
            _take_room(handle, self.size)
            _write(handle, self.head, 0)
        finally:
            os.close(handle)

    def write(self, items: Iterable[tuple[str, Tensor | Entry]]) -> None:
        """Put tensors, or copies of another file's bytes, at their places, and force them to disk."""
        handle = os.open(self.file, os.O_WRONLY | BINARY)
        try:
            for name, value in items:
                at, size = self.entries[name].start, self.entries[name].size
                if (value.size if isinstance(value, Entry) else value.nbytes) != size:
                    raise CloverError(f"{name} is not of the {size} bytes that {self.file} has room for")
                if isinstance(value, Entry):
                    _copy(value, handle, at)
                else:
                    _write(handle, _view(value.detach().cpu().contiguous()), at)
            os.fsync(handle)
            _forget(handle, 0, 0)
        finally:
            os.close(handle)


def _forget(handle: int, start: int, size: int) -> None:
    """Tell the system that these bytes are of no more use here: its memory is for what will be read again."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, size, os.POSIX_FADV_DONTNEED)


def _width(of: tuple[str, tuple[int, ...], int]) -> int:
    """Bytes of a number: wide ones come first, so that each stands at a multiple of its width."""
    return of[2] // max(math.prod(of[1]), 1)


def form(tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes of a tensor, for ``Shard``."""
    return NAMES[tensor.dtype], tuple(tensor.shape), math.prod(tensor.shape) * tensor.element_size()


def _view(tensor: Tensor) -> memoryview:
    buffer: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(buffer)


def _copy(entry: Entry, handle: int, at: int) -> None:
    """Put the bytes of a tensor at a place in another file: by the system itself where it can, else through a buffer.

    Raises:
        CloverError: the source ends before.
    """
    done = 0
    with open(entry.file, "rb", buffering=0) as source:
        while count := _hand_over(source.fileno(), entry.start + done, handle, at + done, entry.size - done):
            done += count
        buffer = memoryview(bytearray(min(CHUNK, entry.size - done)))
        source.seek(entry.start + done)
        while done < entry.size:
            count = source.readinto(buffer[: entry.size - done])
            if not count:
                raise CloverError(f"{entry.file} was cut off while being read; restore it")
            _write(handle, buffer[:count], at + done)
            done += count
        _forget(source.fileno(), entry.start, entry.size)


def _hand_over(source: int, start: int, target: int, at: int, size: int) -> int:
    """Let the system copy bytes from file to file; how many it did, 0 where it has no means to or there are none."""
    try:
        return os.copy_file_range(source, target, min(size, HANDED), start, at)
    except AttributeError:  # not Linux
        return 0
    except OSError as error:
        if error.errno not in UNABLE:
            raise
        return 0


def _take_room(handle: int, size: int) -> None:
    """Make the file so long, and hold the room for it where the system and the file system can."""
    try:
        os.posix_fallocate(handle, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(handle, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, size)


def _write(handle: int, piece: bytes | memoryview, at: int) -> None:
    view = memoryview(piece)
    os.lseek(handle, at, os.SEEK_SET)  # Windows has no pwrite
    while view:
        view = view[os.write(handle, view) :]
