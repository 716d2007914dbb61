"""Tuning over two processes on CPUs: the curve of one process, and weights that lie in pieces (FSDP2, ZeRO-3)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMON = """
import json, sys
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from clover import CloverConfig

def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))

def adapter():
    return CloverConfig(block_size=16, parts=("qk", "q", "vo", "up"))
"""

DDP = """
from pathlib import Path
from clover.tuning.recipe import Recipe
from clover.tuning.training import train
from transformers import trainer

ids = 8 * torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
data = [{"input_ids": row, "labels": row} for row in ids]
world = int(sys.argv[2])
model = get_peft_model(base(), adapter())
log = train(model, data, Recipe(steps=6, lr=3e-2, batch=4 // world, warmup=1), Path(sys.argv[1]) / "run")
if int(__import__("os").environ.get("RANK", 0)) == 0:
    (Path(sys.argv[1]) / f"{world}.json").write_text(json.dumps([e["loss"] for e in log]))
"""

FSDP = """
from pathlib import Path
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
ids = torch.arange(24).view(2, 12)
whole = get_peft_model(base(), adapter())
whole(input_ids=ids, labels=ids).loss.backward()
model = base()
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
model = get_peft_model(model, adapter())
found = model(input_ids=ids, labels=ids).loss
found.backward()
expected = {n: p for n, p in whole.named_parameters() if p.requires_grad}
seen = 0
for name, buffer in model.named_buffers():
    if name.endswith(("left", "right", "fingerprint")):
        torch.testing.assert_close(buffer, dict(whole.named_buffers())[name], rtol=1e-4, atol=1e-4)
        seen += 1
for name, p in model.named_parameters():
    if p.requires_grad:
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
        seen += 1
assert seen, "nothing was compared"
if dist.get_rank() == 0:
    (Path(sys.argv[1]) / "seen.json").write_text(json.dumps(seen))
dist.destroy_process_group()
"""

ZERO = """
from pathlib import Path
import deepspeed
from transformers.integrations import HfDeepSpeedConfig

deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))

def trained(model):
    return [p for p in model.parameters() if p.requires_grad]

def losses(model, ids, backward, step):
    found = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        found.append(loss.item())
        backward(loss)
        step()
    return found

whole = get_peft_model(base(), adapter())
expected = dict(whole.named_buffers())
optimiser = torch.optim.AdamW(trained(whole), lr=1e-2)
one = losses(whole, ids, lambda loss: loss.backward(), lambda: (optimiser.step(), optimiser.zero_grad()))

settings = {
    "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
enabled = HfDeepSpeedConfig(settings)  # as long as it lives, peft and transformers know of ZeRO-3
model = base()
with deepspeed.zero.Init(config_dict_or_path=settings, module=model):
    pass
assert not any(p.numel() for p in model.parameters()), "the weights should lie in pieces"
model = get_peft_model(model, adapter())
for name, buffer in model.named_buffers():
    torch.testing.assert_close(buffer, expected[name])
optimiser = torch.optim.AdamW(trained(model), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimiser, model_parameters=trained(model))
two = torch.tensor(losses(engine, ids[2 * rank : 2 * rank + 2], engine.backward, engine.step))
torch.distributed.all_reduce(two)
with torch.no_grad():
    apart = model(input_ids=ids).logits
    model.merge_adapter()
    merged = model(input_ids=ids).logits
torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)
if rank == 0:
    (Path(sys.argv[1]) / "losses.json").write_text(json.dumps([one, (two / 2).tolist()]))
torch.distributed.destroy_process_group()
"""


def launch(code: str, folder: Path, processes: int, port: int) -> None:
    """Run a script in so many processes; no process may fail."""
    script = folder / "script.py"
    script.write_text(COMMON + code)
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(processes)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
        command = [c for c in command if c not in ("-W", "ignore")]
    done = subprocess.run(command, env=common, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_train_along_the_curve_of_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        launch(DDP, tmp_path, processes, 29611)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=1e-5)


def test_bases_of_sharded_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    launch(FSDP, tmp_path, 2, 29612)
    assert json.loads((tmp_path / "seen.json").read_text()) > 20


def test_zero_3_trains_and_merges_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="ZeRO-3 is not tested: DeepSpeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch(ZERO, tmp_path, 2, 29613)
    one, two = json.loads((tmp_path / "losses.json").read_text())
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=1e-5)
