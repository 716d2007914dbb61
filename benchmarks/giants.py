"""Checkpoints of true sizes with random weights, made on disk a tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clover.streaming.shards import INDEX, Shard, form
from common import SEED

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


@contextmanager
def checkpoint(config: Any, model: Any, name: str) -> Iterator[Path]:
    """A folder of a model with random weights, made on disk a tensor at a time; gone afterwards.

    Weights are pieces of one stream of normal numbers at random places, which takes seconds instead of minutes.
    """
    folder, kept = SCRATCH / f"clover-{name}", "CLOVER_KEEP" in os.environ
    if not (kept and (folder / "whole").exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(config, model, folder)
        (folder / "whole").touch()
    try:
        yield folder
    finally:
        if not kept:
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
    places: dict[str, Any] = {}
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
