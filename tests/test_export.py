"""Padded models: the original class, no clover in them, the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import clover
from clover import CloverError, UnsupportedModelError
from clover.runtimes.export import pad
from families import CASES, build, outputs, pruned
from tiny import LM, VISION

NORMED = {"qwen3", "olmo2", "lfm2", "phi-norm", "qwen3-moe", "gemma3", "cohere-norm", "hunyuan", "llama4"}
"""A norm stands between their Q-K projections and the logit."""
NO_BIAS = {
    "mistral",
    "ministral3",
    "lfm2",
    "stablelm",
    "phi3",
    "phi3-partial",
    "mixtral",
    "falcon-mqa",
    "falcon-gqa",
    "t5",
}
"""Their classes have no bias, and no switch for one."""


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("name", CASES)
def test_a_padded_model_computes_the_same_in_the_original_class(name: str) -> None:
    model, batch = pruned(name)
    out = outputs(model, batch)
    if name in NO_BIAS:
        with pytest.raises(UnsupportedModelError, match="has no bias for the mean"):
            pad(model)
        return
    stock = pad(model)
    assert type(stock) is type(build(name)[0])
    assert not hasattr(stock.config, "clover")
    torch.testing.assert_close(outputs(stock, batch), out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs(model, batch), out, rtol=0, atol=0)


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("name", CASES)
def test_cut_by_the_weights_alone_every_class_can_be_padded(name: str) -> None:
    model, batch = build(name)
    clover.prune(model, vo=0.3, qk=0.0 if name in NORMED else 0.4)
    torch.testing.assert_close(outputs(pad(model), batch), outputs(model, batch), rtol=1e-9, atol=1e-9)


def test_it_loads_without_clover(tmp_path: Path) -> None:
    model, batch = pruned("llama-gqa", dtype=torch.float32)
    clover.save(pad(model), tmp_path / "padded")
    torch.save(batch, tmp_path / "batch.pt")
    code = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/padded")
assert "clover" not in sys.modules
ids = torch.load(sys.argv[1] + "/batch.pt")
with torch.no_grad():
    print(model(**ids).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model(**batch).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-4)
    assert "clover" not in json.loads((tmp_path / "padded" / "config.json").read_text())


def test_cached_generation_is_the_same() -> None:
    model, batch = pruned("llama-gqa")
    kwargs: Any = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(pad(model).generate(**batch, **kwargs), model.generate(**batch, **kwargs))


def test_a_quantised_model_is_refused() -> None:
    model, _ = pruned("llama-gqa")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CloverError, match="is quantised; export the unquantised model"):
        pad(model)


def test_a_model_that_was_not_rewritten_is_refused() -> None:
    with pytest.raises(CloverError, match="was not rewritten by clover"):
        pad(build("opt")[0])


def test_the_switch_for_a_bias_of_a_vision_language_model() -> None:
    """It is in the config of the text alone."""
    model, words = llava().double(), torch.randint(3, 58, (2, 12))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    image = torch.full((2, 16), model.config.image_token_index)
    batch = {"input_ids": torch.cat([image, words], 1), "pixel_values": pixels}
    clover.prune(model, qk=0.3, vo=0.3, part="decoder", calibration=[batch])
    stock = pad(model)
    assert stock.config.text_config.attention_bias and not model.config.text_config.attention_bias
    torch.testing.assert_close(outputs(stock, batch), outputs(model, batch), rtol=1e-9, atol=1e-9)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LM, num_key_value_heads=2), image_token_index=59,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()
