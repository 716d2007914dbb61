"""What a GPU does must be what the CPU does, without waiting for one another."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DynamicCache

import clover
from clover import CloverConfig
from clover.measure.cost import compare_throughput
from clover.streaming import stream as streaming
from commands import succeed
from families import CASES, GENERATIVE, SEQ2SEQ, build, outputs, pruned
from test_attention import greedy

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here: nothing of one was tried", allow_module_level=True)

torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # for convolutions it is the default

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # of a thread that has no context yet

NEAR = 1e-2
"""Relative: rotations and norms are computed in float32, and where a value that is kept nearly equals one that is not,
directions turn by much more than what made them differ."""


def put(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def waits(call: Callable[[], Any]) -> int:
    """How often a call makes the processor wait for the GPU."""
    call()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in found)


# --- every family ---


@pytest.mark.filterwarnings("ignore:Q-K of . of . blocks stays whole")
@pytest.mark.parametrize("name", CASES)
def test_a_cut_is_that_of_the_cpu(name: str) -> None:
    model, batch = build(name)
    there = copy.deepcopy(model).cuda()
    clover.prune(model, qk=0.3, vo=0.3, calibration=[batch])
    clover.prune(there, qk=0.3, vo=0.3, calibration=[put(batch)])
    assert clover.plan_of(there) == clover.plan_of(model)
    here = outputs(model, batch)
    assert (outputs(there, put(batch)).cpu() - here).abs().max() < NEAR * here.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", CASES)
def test_half_precision(name: str) -> None:
    model, batch = pruned(name, dtype=torch.float32)
    right = outputs(model, batch)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in put(batch).items()}
    found = outputs(model.to("cuda", torch.bfloat16), half)
    assert found.isfinite().all()
    assert (found.cpu() - right).norm() < 0.2 * right.norm()


@pytest.mark.parametrize("name", [*GENERATIVE, *SEQ2SEQ])
def test_every_cache_gives_the_same_text(name: str) -> None:
    model, batch = pruned(name)
    prompts = put({k: v for k, v in batch.items() if k != "decoder_input_ids"})
    model.cuda()
    plain = model.generate(**prompts, **greedy(name), use_cache=False)
    assert torch.equal(model.generate(**prompts, **greedy(name)), plain)
    still = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**prompts, **greedy(name), **still), plain)


@pytest.mark.parametrize("name", CASES)
def test_a_tuned_model_is_that_of_the_cpu(name: str, tmp_path: Path) -> None:
    model, batch = build(name, torch.float32)
    there = get_peft_model(copy.deepcopy(model).cuda(), CloverConfig(block_size=16)).eval()
    for parameter in there.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    found = outputs(there, put(batch))
    there.save_pretrained(tmp_path)
    here = outputs(PeftModel.from_pretrained(model, tmp_path).eval(), batch)
    close = 2e-3 * here.abs().max().clamp_min(1)
    assert (found.cpu() - here).abs().max() < close
    there.merge_adapter()
    assert (outputs(there, put(batch)).cpu() - here).abs().max() < close


# --- speed ---


def test_writing_waits_no_more_than_the_dense_model() -> None:
    dense, batch = build("llama-gqa", torch.float32)
    cut, ids = pruned("llama-gqa", dtype=torch.float32)[0], batch["input_ids"].cuda()

    def writing(model: Any) -> Callable[[], None]:
        @torch.inference_mode()
        def run() -> None:
            cache = DynamicCache(config=model.config)
            token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(3):
                token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)

        return run

    assert waits(writing(cut.cuda())) <= waits(writing(dense.cuda()))


def test_training_waits_no_more_than_the_dense_model() -> None:
    model, batch = build("llama-gqa", torch.float32)
    batch = put(batch) | {"labels": batch["input_ids"].cuda()}

    def step(model: Any) -> Callable[[], None]:
        @torch.autocast("cuda", torch.bfloat16)
        def run() -> None:
            model(**batch).loss.backward()

        return run

    dense = waits(step(copy.deepcopy(model).cuda()))
    tuned = get_peft_model(model.cuda(), CloverConfig(block_size=16)).train()
    assert waits(step(tuned)) <= dense
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.parameters() if p.requires_grad)


def test_compiled_into_one_graph() -> None:
    """In a process without the checks of shapes, which the compiler can't follow."""
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
import clover
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3)).eval().cuda()
ids = torch.randint(64, (2, 12)).cuda()
clover.prune(model, qk=0.3, vo=0.3, calibration=[{"input_ids": ids}])
step = torch.compile(model, fullgraph=True, mode="reduce-overhead", dynamic=False)
cache = StaticCache(config=model.config, max_cache_len=16)
at = torch.zeros(len(ids), 1, dtype=torch.long).cuda()
with torch.no_grad():
    whole = model(input_ids=ids).logits  # before compilation: index tables and the cache must be there
    pieces = [model(input_ids=ids[:, :1], position_ids=at, past_key_values=cache, use_cache=True).logits]
    for i in range(1, ids.shape[1]):
        torch.compiler.cudagraph_mark_step_begin()
        at = torch.full((len(ids), 1), i).cuda()
        out = step(input_ids=ids[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True)
        pieces.append(out.logits.clone())
torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_sides_are_compared_on_it() -> None:
    dense, batch = build("llama-gqa", torch.float32)
    models = {"dense": dense.cuda(), "pruned": pruned("llama-gqa", dtype=torch.float32)[0].cuda()}
    found = compare_throughput(models, context=8, new_tokens=4, repeats=1, inputs=put(batch))
    assert found["pruned"]["decode_tokens_per_second"] > 0


# --- from file to file ---


def test_streaming_gives_the_model_that_memory_gives(tmp_path: Path) -> None:
    model, batch = build("llama-gqa", torch.float32)
    model.save_pretrained(tmp_path / "dense")
    streaming.prune_folder(tmp_path / "dense", tmp_path / "streamed", qk=0.3, vo=0.3)
    there = clover.load(tmp_path / "streamed", device_map="cuda")
    assert there.device.type == "cuda"
    clover.prune(model.cuda(), qk=0.3, vo=0.3)
    assert clover.plan_of(there) == clover.plan_of(model)
    torch.testing.assert_close(outputs(there, put(batch)), outputs(model, put(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("calm")
def test_the_commands_use_it(narrow: Path, words: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    succeed("prune", narrow, cut, "--qk", "0.3", "--vo", "0.3", "--calibration", words)
    succeed("prune", narrow, tmp_path / "streamed", "--qk", "0.3", "--calibration", words, "--stream")
    found, _ = succeed("bench", "runtime", narrow, cut, "--context", "8", "--new-tokens", "2", "--repeats", "1")
    assert found["device"].startswith("cuda")
    assert found["dtype"] == "float16"
    assert all(peak > 0 for run in found["contexts"].values() for peak in run["peak_bytes"])
    succeed("eval", cut, "--task", "perplexity", "--data", words)
