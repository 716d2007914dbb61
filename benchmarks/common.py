"""What every benchmark shares: where models and data are, and how a result is written down."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = Path(os.environ.get("CLOVER_MODELS", Path.home() / ".cache/clover-models"))
DATA = Path(os.environ.get("CLOVER_DATA", ROOT.parent / "shared" / "data"))
SEED = 0


def text(split: str) -> str:
    """One split of WikiText-2, whole."""
    with gzip.open(DATA / "wikitext2" / f"{split}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read()


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
        "machine": {"cpu": cpu, "threads": torch_threads, "python": platform.python_version()},
        "versions": {p: version(p) for p in ("torch", "transformers", "safetensors", "numpy")},
        "result": result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(entry, indent=1) + "\n")
    draft.replace(target)
    print(json.dumps(result))


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
