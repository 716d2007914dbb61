"""Speed and memory of pruned models beside the dense one: in turns, in one process, batch 1.

    python benchmarks/speed.py [smollm2] [encoder] [memory]     (all when left out)

smollm2: prefill and decode at contexts of 128 and 2048, Q-K and V-O cut by 25 % and by 50 %.
encoder: that of Whisper-base at the paper's shares and beyond.
memory: parameters on disk, KV-cache and peak memory of SmolLM2, each model in a process of its own, against the plan's
arithmetic.
Random inputs. Run it on a quiet machine.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import clover
import language
import speech
from clover.measure.cost import compare_throughput
from clover.model.block import Block
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.planning.plan import BlockPlan
from clover.pruning.prune import apply, find_bases, plan_ranks
from common import MODELS, SEED, apart, chosen, isolated, peak_memory, record, reset_peak_memory, text

CONTEXTS = (128, 2048)
NEW_TOKENS = 32
REPEATS = 25
CHUNK = 64
LANGUAGE = {"25 %": (0.25, 0.25), "50 %": (0.50, 0.50)}
ENCODER = {"56 % + 37 %": speech.PAPER, "75 % + 50 %": speech.BEYOND}


@contextmanager
def cut_all(
    model: nn.Module, bases: list, shares: Mapping[str, tuple[float, float] | None]
) -> Iterator[dict[str, str]]:
    """The dense model and its cuts, saved: folders by name. A cut by None is another copy of the dense model."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for number, (name, cut) in enumerate({"dense": None, **shares}.items()):
            made: Any = copy.deepcopy(model)
            if cut:
                apply(made, bases, plan_ranks(bases, Share(cut[0]), Share(cut[1])))
            folders[name] = str(clover.save(made, Path(scratch) / str(number)))
        yield folders


def loaded(folders: dict[str, str]) -> dict[str, Any]:
    """All copied: where weights lie in memory is worth 15 % of a CPU's speed."""
    return {name: copy.deepcopy(clover.load(folder, dtype=torch.float32)) for name, folder in folders.items()}


def throughput(folders: dict[str, str], runs: list[dict[str, Any]]) -> list[dict]:
    """Compare the speed of saved models; in a process of its own, for what ran before slows down all that follows."""
    models = loaded(folders)
    return [compare_throughput(models, **options) for options in runs]


@contextmanager
def language_models() -> Iterator[dict[str, str]]:
    model = language.load()
    tokens = AutoTokenizer.from_pretrained(MODELS / "smollm2")(text("train"), return_tensors="pt").input_ids[0]
    with cut_all(model, find_bases(model, calibration=language.calibration(tokens), seed=SEED), LANGUAGE) as folders:
        yield folders


def smollm2() -> dict:
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "repeats": REPEATS}
    with language_models() as folders:
        runs = apart(throughput, folders, [{"context": c, **options} for c in CONTEXTS])
    return {"batch": 1, "dtype": "float32", **options, "contexts": dict(zip(map(str, CONTEXTS), runs, strict=True))}


def encoder() -> dict:
    with cut_all(speech.dense(), speech.bases("encoder", "activations"), ENCODER) as folders:
        (run,) = apart(throughput, folders, [{"repeats": REPEATS}])
    return {"batch": 1, "dtype": "float32", "repeats": REPEATS, "throughput": run}


# --- memory ---


def stored(block: Block, plan: BlockPlan) -> int:
    """Numbers that a cut block stores, by the plan alone: weights, biases, under RoPE a frequency for each pair."""
    heads, n = block.heads(), plan.queries
    width, out = heads.q.shape[-1], heads.o.shape[-2]
    biased = heads.q_bias is not None or (heads.k_bias is not None and heads.rotary > 0)
    rows = (n + 1) * plan.qk_kept + plan.vo_kept  # of queries, keys and values, in one projection
    frequencies = (n + 1) * plan.qk_kept if heads.rotary else 0  # one a pair, int64: twice as wide as the weights
    return rows * (width + biased) + plan.vo_kept * n * out + plan.output_bias * out + frequencies


def planned(dense: Any, model: Any, tokens: int) -> dict[str, int]:
    """Bytes of parameters and of the KV-cache of a pruned model, from the dense model and the plan."""
    size, count = dense.dtype.itemsize, sum(p.numel() for p in dense.parameters())
    if model is dense:
        pairs = [b.heads() for b in blocks(dense)]
        columns = sum(h.k.shape[0] * (h.k.shape[1] + h.v.shape[1]) for h in pairs)
        return {"parameter_bytes": size * count, "cache_bytes": size * tokens * columns}
    plans = clover.plan_of(model).blocks
    count += sum(stored(b, p) - b.heads().parameters() for b, p in zip(blocks(dense), plans, strict=True))
    return {"parameter_bytes": size * count, "cache_bytes": size * tokens * sum(p.qk_kept + p.vo_kept for p in plans)}


@torch.inference_mode()
def use(folder: str, tokens: int) -> dict[str, int]:
    """Load a model and read ``tokens`` tokens into its cache, in pieces; runs in its own process."""
    empty = reset_peak_memory()
    model: Any = clover.load(folder, dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    cache: Any = None
    for piece in ids.split(CHUNK, 1):  # pieces, or the peak would be that of the activations
        cache = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"cache_bytes": held, "peak_rss_bytes": peak_memory() - empty}


def memory(tokens: int = max(CONTEXTS)) -> dict:
    result: dict[str, Any] = {"tokens": tokens, "dtype": "float32"}
    with language_models() as folders:
        dense = clover.load(folders["dense"], dtype=torch.float32)
        for name, folder in folders.items():
            disk = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            measured = {"file_bytes": disk, **isolated(use, folder, tokens)}
            model = dense if name == "dense" else clover.load(folder, dtype=torch.float32)
            result[name] = {"measured": measured, "planned": planned(dense, model, tokens)}
    whole = result["dense"]
    for name in LANGUAGE:
        saved = {key: whole["measured"][key] - value for key, value in result[name]["measured"].items()}
        due = {key: whole["planned"][key] - value for key, value in result[name]["planned"].items()}
        result[name]["saved"] = {
            "file_bytes": [saved["file_bytes"], due["parameter_bytes"]],
            "cache_bytes": [saved["cache_bytes"], due["cache_bytes"]],
            "peak_rss_bytes": [saved["peak_rss_bytes"], sum(due.values())],
        }
    return result


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {"smollm2": smollm2, "encoder": encoder, "memory": memory}
    for name in chosen(benchmarks):
        record(f"speed-{name}", benchmarks[name]())
