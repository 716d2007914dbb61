"""The attention module at work: caches, batches, padding, windows, positions, attention weights, implementations."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clover
from clover.attention.attention import CloverAttention
from clover.attention.ragged import attend_one
from families import (
    CASES,
    EAGER,
    GENERATIVE,
    GROWING,
    HYBRID,
    NARROW,
    REPEATING,
    SEQ2SEQ,
    SINKS,
    STILL,
    build,
    outputs,
    pruned,
)  # fmt: skip
from test_checkpoint import python

ROTARY = [n for n in GENERATIVE if n not in (*STILL, *GROWING)]
NEW = 9
Case = tuple[Any, dict[str, torch.Tensor]]


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name in NARROW else torch.float64


@cache
def case(name: str, kind: str) -> Case:
    """A dense, orthogonalised or pruned model; for reading only."""
    if kind == "pruned":
        return pruned(name, dtype=dtype_of(name))
    model, batch = build(name, dtype_of(name))
    return (clover.orthogonalize(model) if kind == "orthogonal" else model), batch


def prompts(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two prompts, one padded on the left; for encoder-decoders what the encoder reads, as it is."""
    if "decoder_input_ids" in batch:
        return {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    ids = batch["input_ids"].clone()
    ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(name: str, kind: str, **kwargs: Any) -> torch.Tensor:
    model, batch = case(name, kind)
    return model.generate(**prompts(batch), **greedy(name), **kwargs)


def greedy(name: str) -> dict[str, Any]:
    """Always as many tokens: an early end would hide what comes after it."""
    fixed: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return fixed | ({"no_repeat_ngram_size": 1} if name in REPEATING else {})


# --- generation ---


@pytest.mark.parametrize("kind", ["orthogonal", "pruned"])
@pytest.mark.parametrize("name", [*GENERATIVE, *SEQ2SEQ])
def test_cached_generation_equals_uncached(name: str, kind: str) -> None:
    plain = generate(name, kind, use_cache=False)
    assert len(set(plain[:, -NEW:].flatten().tolist())) > 2, "a constant would prove nothing"
    assert torch.equal(generate(name, kind), plain)
    assert torch.equal(generate(name, kind, cache_implementation="static"), plain)
    if kind == "orthogonal":
        assert torch.equal(plain, generate(name, "dense", use_cache=False))


@pytest.mark.parametrize("name", [*GENERATIVE, *SEQ2SEQ])
def test_tokens_that_round_a_length_up_are_not_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate(name, "pruned", use_cache=False)
    monkeypatch.setattr("clover.attention.cache.ANY_LENGTH", ())
    monkeypatch.setattr("clover.attention.cache.STEP", 8)
    assert torch.equal(generate(name, "pruned"), plain)


@pytest.mark.parametrize("kind", ["orthogonal", "pruned"])
@pytest.mark.parametrize("name", [*GENERATIVE, *SEQ2SEQ])
def test_beam_search(name: str, kind: str) -> None:
    beams = generate(name, kind, num_beams=3)
    assert torch.equal(beams, generate(name, kind, num_beams=3, use_cache=False))
    if kind == "orthogonal":
        assert torch.equal(beams, generate(name, "dense", num_beams=3))


@pytest.mark.parametrize("name", GENERATIVE)
def test_left_padding_changes_nothing(name: str) -> None:
    model, batch = case(name, "pruned")
    padded = generate(name, "pruned")[0, -NEW:]
    alone = model.generate(
        input_ids=batch["input_ids"][:1, 4:],
        attention_mask=torch.ones(1, 8).long(),
        **greedy(name),
    )
    assert torch.equal(alone[0, -NEW:], padded)


@pytest.mark.parametrize("name", GENERATIVE)
def test_prompt_in_pieces(name: str) -> None:
    model, batch = case(name, "pruned")
    ids, past = batch["input_ids"], DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        pieces = []
        for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            seen = past.get_seq_length()
            mask = torch.ones(2, seen + piece.shape[1]).long()
            pieces.append(model(input_ids=piece, attention_mask=mask, past_key_values=past, use_cache=True).logits)
    assert whole.isfinite().all()
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


def test_window_hides_what_is_beyond_it() -> None:
    """Mistral's window is 8: the last of 12 tokens sees two layers of it, 15 tokens back at most; one layer sees 8."""
    model, batch = pruned("mistral")
    ids = batch["input_ids"]
    seen: list[torch.Tensor] = []
    attention = next(m for m in model.modules() if isinstance(m, CloverAttention))
    hook = attention.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    other = ids.clone()
    other[:, :4] = (ids[:, :4] + 1) % 50 + 3
    with torch.no_grad():
        model(input_ids=ids)
        model(input_ids=other)
    hook.remove()
    before, after = seen
    torch.testing.assert_close(before[:, 11], after[:, 11])
    assert (before[:, 10] - after[:, 10]).abs().max() > 1e-6


# --- positions ---


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("kind", ["orthogonal", "pruned"])
@pytest.mark.parametrize("name", ROTARY)
def test_rotary_models_only_see_distances(name: str, kind: str) -> None:
    model, batch = case(name, kind)
    positions = torch.arange(12).expand(2, -1)
    with torch.no_grad():
        here = model(**batch, position_ids=positions).logits
        there = model(**batch, position_ids=positions + 97).logits
        stretched = model(**batch, position_ids=positions * 3).logits
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)  # the table of angles is float32
    assert (stretched - here).abs().max() > 1e-2
    if kind == "orthogonal":
        dense = case(name, "dense")[0](**batch, position_ids=positions * 3).logits
        torch.testing.assert_close(stretched, dense)


# --- attention weights and implementations ---


def implement(model: Any, kind: str) -> None:
    """Let a model attend by another implementation; Falcon alone must be told by its config."""
    model.set_attn_implementation(kind)
    model.config._attn_implementation = kind


def weights(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Eager attention weights of every block that the outputs tell of."""
    model = copy.deepcopy(model)
    implement(model, "eager")
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    fields = ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions")
    parts = [out] if "text_model_output" not in out else [out["text_model_output"], out["vision_model_output"]]
    return [w for part in parts for f in fields for w in part.get(f) or ()]


WINDOWS = ["mistral", "qwen2", "exaone4", "qwen2-moe", "phimoe", "starcoder2", "gemma3", "olmo3", "mixtral", "cohere2"]


@pytest.mark.parametrize("name", WINDOWS)
def test_implementations_are_told_the_window_of_each_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take no mask (flash attention) know it from nothing else."""
    model, batch = build(name, torch.float32)
    sdpa, told = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def note(module: Any, *args: Any, **kwargs: Any) -> Any:
        told.append(kwargs.get("sliding_window"))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", note)
    outputs(model, batch)
    outputs(clover.orthogonalize(model), batch)
    assert len(told) == 4 and told[:2] == told[2:]


@pytest.mark.parametrize("name", CASES)
def test_attention_weights_in_the_order_of_the_heads(name: str) -> None:
    dense, batch = case(name, "dense")
    truth, found = weights(dense, batch), weights(case(name, "orthogonal")[0], batch)
    expected = {"clip": 4, "siglip": 4}.get(name, 6 if name in SEQ2SEQ else 1 if name in HYBRID else 2)
    assert len(found) == len(truth) == expected
    for a, b in zip(truth, found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    model, batch = case(name, "pruned")
    for a, b in zip(truth, weights(model, batch), strict=True):
        assert a.shape == b.shape
        total = b.sum(-1)  # 1, or 0 for a head that is gone; what a sink takes is missing
        assert (total < 1 + 1e-5).all()
        assert name in SINKS or ((total - 1).abs().minimum(total.abs()) < 1e-5).all()


def test_heads_that_are_gone_have_no_weights() -> None:
    model, batch = build("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, 96:112] *= 1e-6  # values of the first two of six heads
            block.attn.c_attn.bias[96:112] = 0
    clover.prune(model, vo=0.4, calibration=[batch])
    for block, found in zip(clover.plan_of(model).blocks, weights(model, batch), strict=True):
        kept = {h for g in block.groups for h in g.heads}
        assert not kept & {0, 1}
        for head in range(6):
            assert found[:, head].sum(-1).allclose(torch.full((), float(head in kept), dtype=found.dtype))


@pytest.mark.parametrize("name", ["bert", "vit", "llama-gqa"])
def test_attention_weights_asked_for_before_pruning(name: str) -> None:
    """Transformers hooks the attention modules at the first request; the hooks must follow the modules."""
    model, batch = build(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(**batch, output_attentions=True, output_hidden_states=True)
        clover.orthogonalize(model)
        after = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(after.attentions) == len(before.attentions) == 2
    assert len(after.hidden_states) == len(before.hidden_states) == 3
    torch.testing.assert_close(after.attentions[1], before.attentions[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n not in EAGER])
def test_implementations_agree(name: str) -> None:
    model, batch = case(name, "pruned")
    found = []
    for implementation in ("eager", "sdpa"):
        implement(model, implementation)
        found.append(outputs(model, batch))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "whisper"])
def test_dropout_only_in_training(name: str) -> None:
    model, batch = pruned(name)
    attention = [m for m in model.modules() if isinstance(m, CloverAttention)]
    for a in attention:
        a.attention_dropout = 0.5
    calm = outputs(model, batch)
    assert torch.equal(calm, outputs(model, batch))
    for a in attention:
        a.train()
    assert not torch.equal(outputs(model, batch), outputs(model, batch))


@pytest.mark.parametrize("name", ["llama-gqa", "bert"])
def test_it_can_be_trained_after_inference(name: str) -> None:
    model, batch = pruned(name)
    with torch.inference_mode():
        model(**batch)
    model(**batch)[0].square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tokens_that_are_added_between_layers_do_not_turn() -> None:
    """Some models put queries in front half-way, and hand on the rotations of the image alone."""
    model, batch = build("dinov3")
    found: list[Any] = []

    def keep(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["position_embeddings"])

    name = clover.model.survey.blocks(model)[0].name
    stock = copy.deepcopy(model).get_submodule(name)
    hook = stock.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        copied = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
        model(**batch)
        copied.remove()
        hook.remove()
        clover.orthogonalize(model)
        for tokens in (19, 23):
            x = torch.randn(2, tokens, 48, dtype=torch.float64)
            both = (block(x, position_embeddings=found[0])[0] for block in (model.get_submodule(name), stock))
            torch.testing.assert_close(*both)


def test_compiled_without_a_break_it_writes_into_a_static_cache() -> None:
    """In a process without the checks of shapes, which the compiler can't follow."""
    code = """
import copy
import inspect
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
import clover
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3)).eval()
ids = torch.randint(64, (2, 12))
clover.prune(model, qk=0.3, vo=0.3, calibration=[{"input_ids": ids}])
assert any(len(block.groups) > 1 for block in clover.plan_of(model).blocks)
first = copy.deepcopy(model)
try:
    torch.compile(first, fullgraph=True, backend="aot_eager")(input_ids=ids, use_cache=False)
except torch._dynamo.exc.Unsupported as error:
    assert "call the model before it is compiled" in str(error)
else:
    raise AssertionError("its tables were made in the graph")
torch._dynamo.reset()
broken = torch.compile(first, backend="aot_eager")(input_ids=ids, use_cache=False).logits
torch.testing.assert_close(broken, copy.deepcopy(model)(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
cache, pieces = StaticCache(config=model.config, max_cache_len=16), []
with torch.no_grad():
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(step(input_ids=ids, use_cache=False).logits, whole, rtol=1e-4, atol=1e-5)
    for i in range(ids.shape[1]):
        at = torch.full((len(ids), 1), i)
        out = step(input_ids=ids[:, i : i + 1], position_ids=at, past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :10], past_key_values=cache)
    for i in (10, 11):
        last = step(input_ids=ids[:, i : i + 1], position_ids=torch.full((len(ids), 1), i), past_key_values=cache)
    torch.testing.assert_close(last.logits, whole[:, 11:], rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_flash_mask_says_how_many_tokens_a_static_cache_holds() -> None:
    model, _ = pruned("llama-gqa", dtype=torch.float32)
    attention = next(m for m in model.modules() if isinstance(m, CloverAttention))
    queries, keys, values = (torch.randn(2, n, width) for n, width in zip((1, 9, 9), attention.sizes, strict=True))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    right = attend_one(attention._tables, queries, keys[:, :5], values[:, :5], mask[:, None, None].bool(), 5)
    torch.testing.assert_close(attend_one(attention._tables, queries, keys, values, mask, 9), right)


def test_models_fresh_from_a_folder_become_graphs() -> None:
    """No call has made the tables of their heads yet, and graphs know fewer operators."""
    code = """
import inspect, io, tempfile, warnings
import torch
import clover
from families import pruned
warnings.simplefilter("ignore", DeprecationWarning)  # tracing is, and still used

class First(torch.nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, *given):
        return self.model(**dict(zip(self.names, given, strict=True)), **self.options)[0]

for name in ("llama-gqa", "bert", "gpt2", "t5"):
    model, batch = pruned(name)
    with tempfile.TemporaryDirectory() as folder:
        clover.save(model, folder + "/m")
        for way in ("export", "trace"):
            first, given = First(clover.load(folder + "/m").float(), list(batch)), tuple(batch.values())
            with torch.no_grad():
                if way == "trace":
                    made = torch.jit.trace(first, given, check_trace=False)
                else:
                    made = torch.export.export(first, given).module()
                torch.testing.assert_close(made(*given), first(*given), msg=f"{name} {way}")
print("equal")
"""
    done = python(code)
    assert done.stdout.endswith("equal\n"), done.stderr
