"""Cores on quantised base weights: the base stays as it is, the adapter trains, saves and loads there and elsewhere."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CODE = """
import sys
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from clover import CloverConfig

kind, folder = sys.argv[1:]
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
LlamaForCausalLM(config).save_pretrained(folder + "/base")
ids = torch.arange(24).view(2, 12)

def base():
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        settings = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "4bit":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder + "/base", quantization_config=settings, device_map="cpu", dtype=torch.float32
    ).train()  # in evaluation bitsandbytes packs 4-bit weights anew on a CPU, and can't train them any more

def logits(model):
    return model(input_ids=ids).logits.detach()

model = get_peft_model(base(), CloverConfig())
with model.disable_adapter():
    dense = logits(model)
assert torch.equal(logits(model), dense), "a new adapter must change nothing"
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
out = logits(model)
model.save_pretrained(folder + "/adapter")
assert torch.equal(logits(PeftModel.from_pretrained(base(), folder + "/adapter").train()), out)
exact = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter").eval()
assert (logits(exact) - out).norm() < 0.5 * out.norm(), "the adapter must fit the base before it was quantised"
merged = model.merge_and_unload()
assert (logits(merged) - out).norm() < 0.5 * out.norm(), "merging rounds once more, no worse"
"""


@pytest.mark.parametrize(
    ("kind", "package"), [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("torchao", "torchao")]
)
def test_quantised_base(kind: str, package: str, tmp_path: Path) -> None:
    """In a process of its own: these packages warn when they are imported."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install {package}")
    command = [sys.executable, "-c", CODE, kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
