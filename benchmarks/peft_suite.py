"""peft's own tests, run against CloverConfig and, beside it, against LoraConfig.

    python benchmarks/peft_suite.py CHECKOUT [pytest options]

CHECKOUT is a source tree of peft (with its ``tests``) of the installed version; none of its files is changed. Its lists
of cases are replaced while pytest collects: every case of LoRA on linear layers is repeated with CLOVER, and the
decoder models are tiny random ones made here (Llama, OPT, Qwen2, GPT-2), so nothing is downloaded. A failure counts
against CLOVER if LoRA passes the same test.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers as t
from peft import LoraConfig

from clover import CloverConfig
from common import record

FILES = ("tests/test_custom_models.py", "tests/test_decoder_models.py")
LINEAR = ("MLP", "EmbConv1D", "MhaLinear", "MLP_LayerNorm", "DeepMLP", "MLP2", "MLP_2")
SIZES: dict[str, Any] = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_models(folder: Path) -> list[str]:
    """Four tiny decoders, saved; the paths name the family as hub names do."""
    common = SIZES | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    models = {
        "tiny-random-OPTForCausalLM": t.OPTForCausalLM(
            t.OPTConfig(**SIZES, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=256)
        ),
        "tiny-random-GPT2LMHeadModel": t.GPT2LMHeadModel(t.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4)),
        "tiny-random-LlamaForCausalLM": t.LlamaForCausalLM(t.LlamaConfig(**common, num_key_value_heads=2)),
        "tiny-dummy-qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**common, num_key_value_heads=2)),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in models]


def settings(lora: dict[str, Any]) -> dict[str, Any]:
    """A LoRA case's settings as CLOVER's: the same modules, blocks of 2 rows; None where CLOVER has no such thing."""
    kept = {
        "target_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "exclude_modules",
    }
    renamed = {"init_weights": lora["init_lora_weights"]} if "init_lora_weights" in lora else {}
    return {k: v for k, v in lora.items() if k in kept} | renamed | {"block_size": 2}


class Inject:
    """The pytest plugin that swaps the cases and keeps the outcomes."""

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.done: set[int] = set()
        self.outcomes: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        module: Any = metafunc.module
        if id(module) in self.done:
            return
        self.done.add(id(module))
        if hasattr(module, "TEST_CASES"):
            lora = [c for c in module.TEST_CASES if c[2] is LoraConfig and self.fits(c)]
            ours = [(c[0].replace("LoRA", "CLOVER"), c[1], CloverConfig, settings(c[3])) for c in lora]
            module.TEST_CASES[:] = lora + ours
            pairs = [c for c in module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES if c[2] is LoraConfig and self.fits(c)]
            module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = pairs + [
                (c[0].replace("LoRA", "CLOVER"), "clover", CloverConfig, settings(c[3]), settings(c[4])) for c in pairs
            ]
        if hasattr(module, "PEFT_DECODER_MODELS_TO_TEST"):
            module.PEFT_DECODER_MODELS_TO_TEST[:] = self.models
            task = {"task_type": "CAUSAL_LM", "target_modules": None}
            module.ALL_CONFIGS[:] = [
                (LoraConfig, {**task, "r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}),
                (CloverConfig, {**task, "block_size": 2, "clover_dropout": 0.05, "bias": "none"}),
            ]

    @staticmethod
    def fits(case: tuple) -> bool:
        """Plain LoRA on linear layers: no convolution, embedding or MultiheadAttention, no variant of LoRA."""
        extra = {"use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "ensure_weight_tying"}
        targets = str([c.get("target_modules") for c in case[3:] if isinstance(c, dict)])
        return not any(extra & set(c) for c in case[3:] if isinstance(c, dict)) and not re.search(
            "conv|emb|mha", targets
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def alike(node: str) -> str:
    """The name of a test without the method."""
    return re.sub("clover|lora", "*", node, flags=re.IGNORECASE)


def main(checkout: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        plugin = Inject(tiny_models(Path(folder)))
        os.chdir(checkout)
        quiet = ["-q", "--no-header", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
        theirs = ["-o", "addopts=", "--import-mode=importlib", "-k", "(clover or lora) and not xlora and not adalora"]
        pytest.main([*FILES, *quiet, *theirs, *options], plugins=[plugin])
    ours = {n: o for n, o in plugin.outcomes.items() if "CLOVER" in n or "CloverConfig" in n}
    if not ours:
        sys.exit(f"no test ran; is {checkout} a source tree of peft {version('peft')} with its tests?")
    lora = {alike(n): o for n, o in plugin.outcomes.items() if n not in ours}
    failures = {n: lora.get(alike(n), "not run") for n, o in ours.items() if o == "failed"}
    result = {
        "peft": version("peft"),
        "files": FILES,
        **{o: sum(v == o for v in ours.values()) for o in ("passed", "failed", "skipped")},
        "failures (with LoRA's outcome)": {re.sub(r"/[^\[\] ]*/", "", n): o for n, o in failures.items()},
    }
    sys.argv[1] = "CHECKOUT"  # a path of this machine says nothing elsewhere
    record("peft-suite", result)
    return int(any(o == "passed" for o in failures.values()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
