"""Quantisation: adapters on quantised weights, pruned models with quantised weights, and with a quantised cache."""

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
    run(CODE, kind, package, tmp_path)


PRUNED = """
import sys
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig
import clover

kind, folder = sys.argv[1:]
if kind == "torchao":
    import torchao.quantization as torchao
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(24).view(2, 12)
clover.prune(model, qk=0.25, vo=0.25, calibration=[{"input_ids": ids}])
clover.save(model, folder + "/pruned")
attention = model.model.layers[0].self_attn
# Four bits go by blocks of 64 columns on some CPUs, and a cut projection has any number of them.
whole = [n for n, m in attention.named_children() if isinstance(m, torch.nn.Linear)] + ["lm_head"]
four = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=whole)
settings = {
    "4bit": lambda: BitsAndBytesConfig(**four),
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}[kind]()

def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits

small = clover.load(folder + "/pruned", quantization_config=settings, device_map="cpu", dtype=torch.float32)
clover.save(small, folder + "/small")  # before it runs: bitsandbytes 0.50 repacks four bits then, and can't go back
layer = small.model.layers[0]
changed = layer.mlp if kind == "4bit" else layer.self_attn
assert [p for p in changed.parameters() if p.dtype in (torch.int8, torch.uint8) or type(p.data) is not torch.Tensor]
gap = (logits(small) - logits(model)).norm() / logits(model).norm()
assert 0 < gap < (0.6 if kind == "4bit" else 0.1), gap
assert clover.plan_of(small) == clover.plan_of(model)
again = clover.load(folder + "/small", device_map="cpu")
assert torch.equal(logits(again), logits(small)), "what was saved is what was quantised"
written = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
assert torch.equal(written, small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
"""


@pytest.mark.parametrize(
    ("kind", "package"), [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("torchao", "torchao")]
)
def test_a_pruned_model_is_quantised_saved_and_loaded(kind: str, package: str, tmp_path: Path) -> None:
    run(PRUNED, kind, package, tmp_path)


CACHE = """
import sys
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache
import clover
from clover.planning.budget import Limits

kind, folder = sys.argv[1:]
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(26).view(2, 13)
clover.prune(model, qk=0.25, vo=0.25, calibration=[{"input_ids": ids}], limits=Limits(multiple=16))
options = {} if kind == "fp8" else dict(nbits=4, axis_key=0, axis_value=0, q_group_size=16, residual_length=1)

def read(cache):
    with torch.no_grad():
        model(input_ids=ids[:, :9], past_key_values=cache)
        return model(input_ids=ids[:, 9:], past_key_values=cache).logits

exact, rough = read(DynamicCache()), read(QuantizedCache(backend=kind, config=model.config, **options))
gap = (exact - rough).norm() / exact.norm()
assert 0 < gap < 0.3, gap
"""


@pytest.mark.parametrize(("kind", "package"), [("fp8", "torch"), ("hqq", "hqq")])
def test_a_pruned_model_writes_into_a_quantised_cache(kind: str, package: str, tmp_path: Path) -> None:
    run(CACHE, kind, package, tmp_path)


def run(code: str, kind: str, package: str, folder: Path) -> None:
    """In a process of its own: these packages warn when they are imported."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install {package}")
    done = subprocess.run([sys.executable, "-c", code, kind, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
