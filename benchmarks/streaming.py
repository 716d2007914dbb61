"""Pruning models larger than memory: memory and time of ``clover prune --stream``, on random weights of true sizes.

    python benchmarks/streaming.py [weights] [calibrated] [processes] [seventy] [whisper] [quality]    (all by default)

weights: a checkpoint of LLaMA-2-7B's shape (float16, 13.5 GB in three files) is pruned by its weights, beside the time
to read its files, to decompose its blocks alone, and to write as many bytes as the result has.
processes: the same work by two processes, decompositions and moments apart, on a smaller model.
seventy: a model of LLaMA-2-70B's shape by arithmetic, from one block of its shape and the speed of the disk above.
Checkpoints are made in $CLOVER_SCRATCH (default: the system's temporary folder) and removed afterwards.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from clover.basis import find_basis
from clover.pieces import Pieces, cut
from clover.shards import INDEX, Checkpoint, Shard, form
from common import SEED, chosen, record, timed

SCRATCH = Path(os.environ.get("CLOVER_SCRATCH", tempfile.gettempdir()))
SEVEN = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
SEVENTY = SEVEN | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
SHARD = 5 * 10**9
SOME = 4  # blocks that are timed alone
CUT = ("--qk", "0.25", "--vo", "0.25")
CHUNK = 2**26


@contextmanager
def checkpoint(config: Any, model: Any, name: str) -> Iterator[Path]:
    """A folder of a model with random weights, made on disk a tensor at a time; gone afterwards.

    Weights are pieces of one stream of normal numbers at random places, which takes seconds instead of minutes.
    """
    folder = SCRATCH / f"clover-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        write(config, model, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(config: Any, kind: Any, folder: Path) -> None:
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float16)
    model.config.architectures = [kind.__name__]
    model.config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    tensors = {key: value for key, value in model.state_dict().items() if key not in tied}
    groups: list[dict[str, Any]] = [{}]
    for key, value in tensors.items():
        if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + value.nbytes > SHARD:
            groups.append({})
        groups[-1][key] = value
    generator = torch.Generator().manual_seed(SEED)
    stream = (torch.randn(2**26, generator=generator) * 0.02).half()
    places = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        shard = Shard(folder / file, {key: form(value) for key, value in group.items()})
        shard.create()
        shard.write((key, drawn(value, stream, generator)) for key, value in group.items())
        places |= dict.fromkeys(group, file)
    if len(groups) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def drawn(like: torch.Tensor, stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers of a tensor's shape: norms are 1, all else comes from a random place of the stream."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    start = int(torch.randint(len(stream) - 1, (1,), generator=generator))
    repeats = math.ceil((start + like.numel()) / len(stream))
    return stream.repeat(repeats)[start : start + like.numel()].view(like.shape)


def forget(folder: Path) -> None:
    """Take files out of the system's cache, so that reading them is reading the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(folder: Path) -> int:
    """Read all tensors, in pieces; returns the bytes."""
    total, buffer = 0, bytearray(CHUNK)
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def put(file: Path, size: int) -> None:
    """Write so many bytes, down to the disk."""
    piece = os.urandom(CHUNK)
    with open(file, "wb", buffering=0) as handle:
        for start in range(0, size, CHUNK):
            handle.write(piece[: size - start])
        os.fsync(handle.fileno())
    file.unlink()


def alone(command: list[str], **env: str) -> dict[str, Any]:
    """Run ``clover`` in a process of its own: seconds, most memory resident at once, and what it printed as JSON."""
    run = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True, env=os.environ | env)

    def wait() -> tuple[str, int, int]:
        with run(command) as process:
            assert process.stdout is not None
            text = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return text, process.returncode, usage.ru_maxrss * 1024

    (text, code, peak), seconds = timed(wait)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return {"seconds": seconds, "peak_bytes": peak, "said": json.loads(text.splitlines()[-1])}


def clover(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "clover.cli", *map(str, arguments)]


def some_blocks(folder: Path) -> dict[str, float]:
    """Seconds a block, in memory: decomposed, and cut to half of its directions' share."""
    pieces = Pieces.open(folder)
    found = [pieces.real(block) for block in pieces.blocks("all")[:SOME]]
    from clover.budget import Share
    from clover.pruning import plan_ranks

    runs = []
    for block in found:
        basis, finding = timed(lambda b=block: find_basis(b))
        plan = plan_ranks([basis], Share(0.25), Share(0.25)).blocks[0]
        _, cutting = timed(lambda b=block, s=basis, p=plan: cut(b, s, p, torch.float16))
        runs.append((finding, cutting))
    return {"decompose": median(f for f, _ in runs[1:]), "cut": median(c for _, c in runs[1:])}


def weights() -> dict[str, Any]:
    with checkpoint(LlamaConfig(**SEVEN), LlamaForCausalLM, "seven") as folder:
        out = SCRATCH / "clover-seven-pruned"
        shutil.rmtree(out, ignore_errors=True)
        try:
            forget(folder)
            streamed = alone(clover("prune", folder, out, *CUT, "--stream", "--json"))
            size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
            check(out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        forget(folder)
        bytes_read, reading = timed(lambda: read(folder))
        _, writing = timed(lambda: put(SCRATCH / "clover-written", size))
        block = some_blocks(folder)
        layers = SEVEN["num_hidden_layers"]
        largest = 4 * SEVEN["hidden_size"] ** 2
    parts = {"read": reading, "decompose": layers * block["decompose"], "write": writing}
    return {
        "sizes": SEVEN, "dtype": "float16", "bytes_before": bytes_read, "bytes_after": size, "streamed": streamed,
        "alone": {**parts, "cut": layers * block["cut"]}, "block_seconds": block,
        "alone_method": f"blocks: median of {SOME - 1}, times {layers}",
        "over_parts": streamed["seconds"] / sum(parts.values()),
        "over_parts_with_cut": streamed["seconds"] / (sum(parts.values()) + layers * block["cut"]),
        "block_parameters": largest, "bound_bytes": 2 * 8 * largest + 2**30,
    }  # fmt: skip


def check(out: Path) -> None:
    """The result can be opened, and says of itself what is in it."""
    source = Checkpoint.open(out)
    config = AutoConfig.from_pretrained(out)
    assert hasattr(config, "clover")
    assert len(source.entries) > 100


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict[str, Any]]] = {"weights": weights}
    for name in chosen(benchmarks):
        record(f"streaming-{name}", benchmarks[name]())
