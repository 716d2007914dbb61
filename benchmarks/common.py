"""What every benchmark shares: where models and data are, how it is timed, and how a result is written down."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = Path(os.environ.get("CLOVER_MODELS", Path.home() / ".cache/clover-models"))
DATA = Path(os.environ.get("CLOVER_DATA", ROOT.parent / "shared" / "data"))
SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where quality is measured; time is measured where a benchmark says."""


def text(split: str) -> str:
    """One split of WikiText-2, whole."""
    with gzip.open(DATA / "wikitext2" / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read()


def chosen(names: Iterable[str]) -> list[str]:
    """The configurations on the command line, or all ``names`` where there are none."""
    names, asked = list(names), sys.argv[1:]
    if unknown := [name for name in asked if name not in names]:
        raise SystemExit(f"unknown configuration {unknown[0]}; choose from {', '.join(names)}")
    return asked or names


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def in_turns(calls: Mapping[str, Callable[[], float]], repeats: int) -> list[dict[str, float]]:
    """Seconds that each call returns, turn by turn, so that a slow spell slows all; one turn before them warms up."""
    turns = [{name: call() for name, call in calls.items()} for _ in range(repeats + 1)]
    return turns[1:]


def side_by_side(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of the seconds that each call returns, see ``in_turns``."""
    turns = in_turns(calls, repeats)
    return {name: median(turn[name] for turn in turns) for name in calls}


def apart(call: Callable[..., T], *args: object) -> T:
    """Call in a fresh process, as ``isolated`` does, with its memory managed as anywhere."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def isolated(call: Callable[..., T], *args: object) -> T:
    """Call in a fresh process, so that its memory is its own; it gives freed memory back to the system at once.

    ``call`` is a function at the top of a benchmark; what goes in and comes out is pickled.
    """
    # glibc reads these when the process starts.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return apart(call, *args)


def reset_peak_memory() -> int:
    """Forget this process's peak memory; returns the bytes that it holds now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """Most bytes that this process held since ``reset_peak_memory``."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def record(name: str, result: object) -> None:
    """Write ``benchmarks/results/NAME.json``: the result and what is needed to run it again."""
    torch_threads = torch.get_num_threads()
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    entry = {
        "command": " ".join(["python", *(str(Path(a).name) if a == sys.argv[0] else a for a in sys.argv)]).replace(
            "python ", "python benchmarks/", 1
        ),
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "machine": {"cpu": cpu, **_gpu(), "threads": torch_threads, "python": platform.python_version()},
        "versions": {p: version(p) for p in ("torch", "transformers", "safetensors", "numpy")},
        "result": result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(entry, indent=1) + "\n")
    draft.replace(target)
    print(json.dumps(result))


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
