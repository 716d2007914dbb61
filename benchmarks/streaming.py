"""Pruning models larger than memory: memory and time of ``clover prune --stream``, on random weights of true sizes.

    python benchmarks/streaming.py [weights] [calibrated] [processes] [seventy] [whisper] [quality-CUT]   (default: all)

weights: a checkpoint of LLaMA-2-7B's shape (float16, 13.5 GB in three files) is pruned by its weights, beside the time
to read its files, to decompose its blocks alone, and to write as many bytes as the result has.
calibrated: layers of that shape on 16 x 512 tokens; the whole model by arithmetic.
processes: the same work by two processes, decompositions and moments apart, on smaller models.
seventy: a model of LLaMA-2-70B's shape by arithmetic, from one block of its shape and the speed of the disk above.
whisper: a checkpoint of Whisper-large-v3's sizes, in memory and streamed, and the speed of its encoder.
quality-CUT: perplexity of SmolLM2, calibrated in memory and streamed; CUT is vo25, vo50, qk25, qk50, both25 or both50.
Checkpoints are made in $CLOVER_SCRATCH (default: the system's temporary folder) and removed afterwards, unless
$CLOVER_KEEP is set: then they are there for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from clover import load, prune
from clover.jobs.draft import hidden
from clover.measure.data import calibration_batches
from clover.measure.evaluate import perplexity
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.pruning.basis import find_basis
from clover.pruning.prune import plan_ranks
from clover.streaming import layout, sequential
from clover.streaming import stream as streaming
from clover.streaming.pieces import Pieces, cut
from clover.streaming.shards import Checkpoint
from common import DATA, MODELS, SEED, chosen, peak_memory, record, reset_peak_memory, side_by_side, text, timed
from decompose import LARGE_V3
from giants import SCRATCH, SEVEN, SEVENTY, checkpoint

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; for what is timed alone
SOME, ROUNDS = 4, 3  # blocks that are timed alone; how often all is run
CUT = ("--qk", "0.25", "--vo", "0.25")
CHUNK = 2**26
STAGES: dict[str, tuple[Any, str]] = {
    "moments": (sequential, "observe"), "find_basis": (sequential, "find_basis"), "refit": (layout, "cut"),
    "decompose": (streaming.Weights, "survey"), "cut": (streaming.Weights, "cut"), "fill": (Pieces, "fill"),
}  # fmt: skip
"""What is timed inside a run; by the weights, ``cut`` holds the refit."""


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
    return [sys.executable, "-m", "clover", *map(str, arguments)]


def some_blocks(folder: Path) -> dict[str, float]:
    """Seconds a block, in memory: decomposed, and cut to half of its directions' share."""
    pieces = Pieces.open(folder)
    found = [pieces.real(block) for block in blocks(pieces.model, "all")[:SOME]]
    runs = []
    for block in found:
        basis, finding = timed(partial(find_basis, block))
        plan = plan_ranks([basis], Share(0.25), Share(0.25)).blocks[0]
        _, cutting = timed(partial(cut, block, basis, plan, torch.float16))
        runs.append((finding, cutting))
    return {"decompose": median(f for f, _ in runs[1:]), "cut": median(c for _, c in runs[1:])}


def streamed_to(folder: Path, out: Path) -> tuple[dict[str, Any], int]:
    """Prune into ``out``, from the disk: what ``alone`` found, and the bytes of the result, which is removed again."""
    for old in (out, hidden(out)):  # a draft would be gone on with
        shutil.rmtree(old, ignore_errors=True)
    forget(folder)
    try:
        found = alone(clover("prune", folder, out, *CUT, "--stream", "--json"))
        check(out)
        return found, sum(f.stat().st_size for f in out.glob("*.safetensors"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def weights() -> dict[str, Any]:
    with checkpoint(LlamaConfig(**SEVEN), LlamaForCausalLM, "seven") as folder:
        rounds: dict[str, list[float]] = {"streamed": [], "read": [], "write": [], "peak_bytes": []}
        for _ in range(ROUNDS):  # a shared disk is twice as quick in one minute as in the next
            streamed, size = streamed_to(folder, SCRATCH / "clover-seven-pruned")
            rounds["streamed"].append(streamed["seconds"])
            rounds["peak_bytes"].append(streamed["peak_bytes"])
            forget(folder)
            bytes_read, reading = timed(lambda: read(folder))
            rounds["read"].append(reading)
            rounds["write"].append(timed(partial(put, SCRATCH / "clover-written", size))[1])
        block = some_blocks(folder)
        layers = SEVEN["num_hidden_layers"]
        largest = 4 * SEVEN["hidden_size"] ** 2
    streamed |= {"seconds": median(rounds["streamed"]), "peak_bytes": max(rounds["peak_bytes"])}
    parts = {
        "read": median(rounds["read"]), "decompose": layers * block["decompose"], "write": median(rounds["write"]),
    }  # fmt: skip
    return {
        "sizes": SEVEN, "dtype": "float16", "bytes_before": bytes_read, "bytes_after": size, "streamed": streamed,
        "alone": {**parts, "cut": layers * block["cut"]}, "block_seconds": block, "rounds": rounds,
        "alone_method": f"medians of {ROUNDS} rounds; blocks: median of {SOME - 1}, times {layers}",
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


def watch(places: dict[str, tuple[Any, str]]) -> dict[str, float]:
    """Count the seconds that functions take, by name, from now on."""
    spent = dict.fromkeys(places, 0.0)

    def timing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            result, seconds = timed(lambda: call(*args, **kwargs))
            spent[name] += seconds
            return result

        return timed_call

    for name, (owner, attribute) in places.items():
        setattr(owner, attribute, timing(name, getattr(owner, attribute)))
    return spent


def job(folder: str, out: str, batches: str, report: str) -> None:
    """One process of a run, alone or under ``torchrun``: prunes and writes down what took how long.

    Args:
        batches: calibration batches of one sequence of 512 random tokens each; 0 prunes by the weights.
    """
    count = int(batches)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    ids = torch.randint(vocabulary, (max(count, 1), 1, 512), generator=torch.Generator().manual_seed(SEED))
    spent = watch(STAGES)
    calibration = [{"input_ids": row} for row in ids] if count else None
    before = reset_peak_memory()
    _, seconds = timed(lambda: streaming.prune_folder(folder, out, qk=0.25, vo=0.25, calibration=calibration))
    if os.environ.get("RANK", "0") == "0":
        found = {"seconds": seconds, **spent, "bytes_before": before, "peak_bytes": peak_memory()}
        Path(report).write_text(json.dumps(found))


def run(folder: Path, batches: int, processes: int, threads: int) -> tuple[dict[str, Any], Path]:
    """Prune in so many processes; what the first of them counted, and the folder made."""
    out, report = folder.parent / f"{folder.name}-{processes}-{threads}", folder.parent / "report.json"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(Path(__file__)), "job", str(folder), str(out), str(batches), str(report)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29655"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    return json.loads(report.read_text()), out


def difference(a: Path, b: Path) -> float:
    """Largest difference of two results' tensors, relative to the tensor's largest entry."""
    left, right = Checkpoint.open(a), Checkpoint.open(b)
    assert left.entries.keys() == right.entries.keys()
    largest = 0.0
    for name in left.entries:
        x, y = (side.entries[name].read(name).double() for side in (left, right))
        if not x.numel():  # a head that went whole leaves nothing to rotate
            continue
        largest = max(largest, float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)))
    return largest


def processes() -> dict[str, Any]:
    """Two processes against one, on layers of LLaMA-2-7B's shape (weights), of a quarter of its width (calibrated)."""
    deep = SEVEN | {"num_hidden_layers": 4, "vocab_size": 1000}
    narrow = deep | {"hidden_size": 1024, "intermediate_size": 2816}
    narrow |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    result: dict[str, Any] = {}
    for name, sizes, batches in (("weights", deep, 0), ("calibrated", narrow, 16)):
        with checkpoint(LlamaConfig(**sizes), LlamaForCausalLM, name) as folder:
            result[name] = {"sizes": sizes, "sequences": batches, "length": 512, **compared(folder, batches)}
    return result


def compared(folder: Path, batches: int) -> dict[str, Any]:
    """One process of one thread and of two, and two processes of one thread."""
    runs = {f"{p} x {t}": run(folder, batches, p, t) for p, t in ((1, 1), (1, 2), (2, 1))}
    one, threads, two = (out for _, out in runs.values())
    found: dict[str, Any] = {"runs": {name: spent for name, (spent, _) in runs.items()}}
    found["difference"] = {"threads": difference(one, threads), "processes": difference(one, two)}
    for out in (one, threads, two):
        shutil.rmtree(out)
    return found


def calibrated(layers: int = 2) -> dict[str, Any]:
    """Layers of LLaMA-2-7B's shape with its vocabulary, 16 x 512 tokens; the other layers by arithmetic."""
    with checkpoint(LlamaConfig(**SEVEN | {"num_hidden_layers": layers}), LlamaForCausalLM, "two") as folder:
        spent, out = run(folder, 16, 1, 2)
        shutil.rmtree(out)
    whole = spent["seconds"] / layers * SEVEN["num_hidden_layers"]
    return {
        "sizes": SEVEN, "sequences": 16, "length": 512, "layers_run": layers, **spent,
        "whole_model_seconds": whole, "whole_model_method": f"seconds of {layers} layers, times 32 / {layers}",
    }  # fmt: skip


def seventy() -> dict[str, Any]:
    """One block of LLaMA-2-70B's shape is pruned; the whole model is it times its layers, and bytes over disk speed."""
    with checkpoint(LlamaConfig(**SEVENTY | {"num_hidden_layers": 1}), LlamaForCausalLM, "seventy") as folder:
        spent, out = run(folder, 0, 1, 1)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        shutil.rmtree(out)
        forget(folder)
        _, reading = timed(lambda: read(folder))
        _, writing = timed(lambda: put(SCRATCH / "clover-written", size))
    with torch.device("meta"):
        whole = LlamaForCausalLM._from_config(LlamaConfig(**SEVENTY), dtype=torch.float16)
    total, layers = sum(p.nbytes for p in whole.parameters()), SEVENTY["num_hidden_layers"]
    seconds = {
        "read_and_write": total / size * (reading + writing), "decompose": layers * spent["decompose"],
        "cut": layers * spent["cut"],
    }  # fmt: skip
    return {
        "sizes": SEVENTY, "block": spent, "bytes_run": size, "bytes_whole": total, "by_arithmetic": seconds,
        "by_arithmetic_total": sum(seconds.values()),
        "method": "times of one block, times 80; bytes over the disk's speed while reading and writing this file",
    }  # fmt: skip


def whisper() -> dict[str, Any]:
    """A model of Whisper-large-v3's sizes, from folder to folder in memory and streamed, and its encoder's speed."""
    config = WhisperConfig(**LARGE_V3, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    result: dict[str, Any] = {"sizes": LARGE_V3, "dtype": "float16", "qk": 0.5, "vo": 0.5}
    with checkpoint(config, WhisperForConditionalGeneration, "whisper") as folder:
        outs = {name: folder.parent / f"clover-whisper-{name}" for name in ("memory", "streamed")}
        for name, out in outs.items():
            shutil.rmtree(out, ignore_errors=True)
            flags = ["--stream"] if name == "streamed" else []
            result[name] = alone(clover("prune", folder, out, "--qk", 0.5, "--vo", 0.5, *flags, "--json"))
        result["difference"] = difference(*outs.values())
        result["encoder"] = encoders(folder, outs["streamed"])
        for out in outs.values():
            shutil.rmtree(out)
    return result


@torch.inference_mode()
def encoders(dense: Path, pruned: Path) -> dict[str, float]:
    """Seconds of one forward of each encoder, float32, in turns."""
    models = {name: load(path).get_encoder().float() for name, path in (("dense", dense), ("pruned", pruned))}
    frames = torch.randn(1, LARGE_V3["num_mel_bins"], 3000, generator=torch.Generator().manual_seed(SEED))
    calls = {name: partial(lambda m: timed(lambda: m(frames))[1], model) for name, model in models.items()}
    seconds = side_by_side(calls, 2)
    return {**seconds, "ratio": seconds["dense"] / seconds["pruned"]}


QUALITY = {
    "vo25": (0.0, 0.25), "vo50": (0.0, 0.5), "qk25": (0.25, 0.0), "qk50": (0.5, 0.0), "both25": (0.25, 0.25),
    "both50": (0.5, 0.5),
}  # fmt: skip
FIRST = 24_576


def quality(name: str) -> dict[str, Any]:
    """SmolLM2 calibrated on 16 x 512 tokens of WikiText-2 train, streamed and in memory: perplexity on test."""
    qk, vo = QUALITY[name]
    folder, out = MODELS / "smollm2", SCRATCH / f"clover-{name}"
    make = partial(calibration_batches, DATA / "wikitext2" / "train.txt.gz")
    shutil.rmtree(out, ignore_errors=True)
    _, seconds = timed(lambda: streaming.prune_folder(folder, out, qk=qk, vo=vo, calibration=make))
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text("test"), verbose=False).input_ids[:FIRST])
    streamed = perplexity(load(out).float(), tokens).value
    shutil.rmtree(out)
    model = load(folder).float()
    _, memory_seconds = timed(lambda: prune(model, qk=qk, vo=vo, calibration=make(model)))
    return {
        "qk": qk, "vo": vo, "tokens": FIRST, "streamed": streamed, "streamed_seconds": seconds,
        "memory": perplexity(model, tokens).value, "memory_seconds": memory_seconds,
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(*sys.argv[2:])
        raise SystemExit
    benchmarks: dict[str, Callable[[], dict[str, Any]]] = {
        "weights": weights, "calibrated": calibrated, "processes": processes, "seventy": seventy, "whisper": whisper,
    }  # fmt: skip
    benchmarks |= {f"quality-{cut}": partial(quality, cut) for cut in QUALITY}
    for name in chosen(benchmarks):
        record(f"streaming-{name}", benchmarks[name]())
