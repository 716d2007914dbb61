"""SmolLM2 on WikiText-2: perplexity of the whole test split, dense and pruned.

    python benchmarks/language.py CONFIG [CONFIG ...]     with CONFIG one of: dense, vo25, vo50, qk25, qk50, both25, both50
"""

from __future__ import annotations

import sys

import torch
from common import MODELS, record, text
from transformers import AutoModelForCausalLM, AutoTokenizer

from clover.evaluate import perplexity


def main(names: list[str]) -> None:
    folder = MODELS / "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text("test"), return_tensors="pt").input_ids[0]
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        record(f"language-{name}", perplexity(model, tokens).to_dict())


if __name__ == "__main__":
    main(sys.argv[1:])
