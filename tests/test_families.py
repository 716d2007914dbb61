"""One contract over every family: exact at full rank, really smaller when cut, and good in every dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import clover
from clover.attention.attention import CloverAttention
from clover.calibration.calibrate import Moments, calibrate
from clover.model.mla import projections
from clover.model.survey import blocks
from clover.pruning.basis import find_basis
from families import CASES, COPIES, GENERATIVE, HYBRID, LATENT, NARROW, SEQ2SEQ, build, outputs, pruned
from tiny import MLA, text, xglm

WIDTH = 48  # of every tiny model
TEXT = [*GENERATIVE, "bert", "roberta", "distilbert", "modernbert"]
LIMIT = 1e-9


def attentions(model: torch.nn.Module) -> list[CloverAttention]:
    return [m for m in model.modules() if isinstance(m, CloverAttention)]


def columns(model: torch.nn.Module, index: int) -> tuple[int, int, int]:
    """Query heads per KV head, Q-K and V-O columns that the plan keeps in one block, added up by hand."""
    block = clover.plan_of(model).blocks[index]
    qk = sum(len(g.heads) * (2 * g.pairs + g.plain) for g in block.groups)
    return block.queries, qk, sum(len(g.heads) * g.value for g in block.groups)


@pytest.mark.parametrize("name", ["mistral3", "llama4"])
def test_each_part_is_held_against_its_own_table_of_rotation(name: str) -> None:
    """A tower may turn another number of columns than the text beside it."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    text = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    tower = {**sizes, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if name == "mistral3":
        text, tower = text | {"model_type": "mistral"}, tower | {"model_type": "pixtral", "head_dim": 8}
        config: Any = transformers.Mistral3Config(text_config=text, vision_config=tower)
        kind: Any = transformers.Mistral3ForConditionalGeneration
    else:
        text |= {"intermediate_size_mlp": 64, "num_local_experts": 2, "pad_token_id": 0}
        tower |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
        config, kind = (
            transformers.Llama4Config(text_config=text, vision_config=tower),
            transformers.Llama4ForConditionalGeneration,
        )
    with torch.device("meta"):
        found = blocks(kind(config))
    assert {(b.part, b.rotary) for b in found} - {("decoder", 0)} == {("encoder", 8), ("decoder", 16)}


def test_biases_of_turned_columns_count_by_the_weights() -> None:
    """A pair may live of its biases, as some of Qwen2's do."""
    model, _ = build("qwen2")
    block = blocks(model)[0]
    pairs = block.rotary // 2
    best = int(find_basis(block).pair_order[0, -1])  # the first to go
    with torch.no_grad():
        for which in ("q_proj", "k_proj"):
            block.core.get_submodule(which).bias.view(-1, 2 * pairs)[:, best] += 100
    assert find_basis(block).pair_order[:, 0].eq(best).all()


# --- full rank ---


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "calibrated"])
@pytest.mark.parametrize("name", CASES | COPIES)
def test_full_rank_keeps_the_outputs(name: str, calibrated: bool) -> None:
    model, batch = build(name)
    dense = outputs(model, batch)
    if calibrated:
        clover.prune(model, qk=0.0, vo=0.0, calibration=[batch])
    else:
        clover.orthogonalize(model)
    assert (outputs(model, batch) - dense).abs().max() < LIMIT
    assert clover.summary(model)["qk_removed"] == clover.summary(model)["vo_removed"] == 0


@pytest.mark.usefixtures("exact_steps")
@pytest.mark.parametrize("name", CASES | COPIES)
def test_full_rank_keeps_every_block(name: str) -> None:
    """Blocks one by one: an error in one could make up for that of another."""
    model, batch = build(name)
    with torch.no_grad():
        original = copy.deepcopy(model)
        clover.orthogonalize(model)
        seen: dict[str, tuple[tuple, dict[str, Any], torch.Tensor]] = {}
        names = [block.name for block in clover.plan_of(model).blocks]
        hooks = [original.get_submodule(n).register_forward_hook(_keep(seen, n), with_kwargs=True) for n in names]
        original(**batch)
        assert sorted(seen) == sorted(names)
        for hook in hooks:
            hook.remove()
        for n, (args, kwargs, dense) in seen.items():
            kwargs = {k: None if k in ("past_key_values", "layer_past") else v for k, v in kwargs.items()}
            assert (_first(model.get_submodule(n)(*args, **kwargs)) - dense).abs().max() < LIMIT, n


def test_a_model_that_knows_no_float64() -> None:
    model, batch = xglm().eval(), text()
    dense = outputs(model, batch)
    assert (outputs(clover.orthogonalize(model), batch) - dense).abs().max() < 1e-5 * dense.abs().max()


def _keep(seen: dict[str, Any], name: str) -> Any:
    def hook(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen[name] = args, kwargs, _first(output)

    return hook


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_a_model_that_asks_its_attention_how_much_an_image_takes() -> None:
    model, batch = build("git")
    given = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    told = given | {"labels": batch["input_ids"]}
    dense, loss = model.generate(**given, max_new_tokens=4), model(**told).loss
    clover.orthogonalize(model)
    assert model.generate(**given, max_new_tokens=4).equal(dense)
    torch.testing.assert_close(model(**told).loss, loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("part", ["encoder", "decoder", "cross"])
def test_one_part_of_an_encoder_decoder(part: str) -> None:
    model, batch = build("whisper")
    dense, untouched = outputs(model, batch), copy.deepcopy(model)
    clover.prune(model, qk=0.3, vo=0.3, part=part, calibration=[batch])
    plan = clover.plan_of(model)
    assert {b.part for b in plan.blocks} == {part} and len(plan.blocks) == len(attentions(model)) == 2
    home = {
        "encoder": ("encoder", "self_attn"),
        "decoder": ("decoder", "self_attn"),
        "cross": ("decoder", "encoder_attn"),
    }
    assert [b.name for b in plan.blocks] == [f"model.{home[part][0]}.layers.{i}.{home[part][1]}" for i in range(2)]
    assert (outputs(model, batch) - dense).abs().max() > 1e-6
    exact = clover.orthogonalize(untouched, part=part)
    assert (outputs(exact, batch) - dense).abs().max() < LIMIT


@pytest.mark.parametrize("name, writes, causal", [
    ("paligemma", "language_model", False), ("nllb-moe", "decoder", False), ("llava", "language_model", True),
    ("bart", "decoder", True), ("t5", "decoder", True), ("llama-gqa", "layers", True), ("bloom", "h", True),
    ("layoutlm", None, True), ("mpnet", None, True), ("clip", None, True),
])  # fmt: skip
def test_the_part_is_where_a_block_stands_not_what_it_sees(name: str, writes: str | None, causal: bool) -> None:
    """A prompt may be read in both directions by what writes; what has no cache is an encoder."""
    found = [block for block in blocks(build(name)[0]) if block.part != "cross"]
    for block in found:
        assert block.part == ("decoder" if writes in block.name.split(".") else "encoder"), block.name
        assert block.family.causal is (block.part == "decoder" and causal)
    assert writes is None or any(block.part == "decoder" for block in found)


def test_only_what_writes_has_a_cache() -> None:
    models = [build(name)[0] for name in ("paligemma", "layoutlm")]
    assert [clover.summary(clover.orthogonalize(m))["kv_bytes_per_token_before"] for m in models] == [2 * 2 * 16 * 8, 0]


def test_qk_norm_keeps_qk_whole_and_says_so() -> None:
    model, batch = build("qwen3")
    with pytest.warns(UserWarning, match="Q-K of 2 of 2 blocks stays whole"):
        clover.prune(model, qk=0.3, vo=0.3, calibration=[batch])
    summary = clover.summary(model)
    assert summary["qk_removed"] == 0 and summary["vo_removed"] >= 0.3


# --- smaller ---


@pytest.mark.parametrize("name", CASES)
def test_pruned_shapes_match_the_plan(name: str) -> None:
    dense, _ = build(name)
    model, _ = pruned(name)
    plan, summary, state = clover.plan_of(model), clover.summary(model), model.state_dict()
    kept = cached = 0
    for i, (block, attention) in enumerate(zip(plan.blocks, attentions(model), strict=True)):
        n, qk, vo = columns(model, i)
        kv = block.kv_heads
        assert qk <= kv * block.qk and vo <= kv * block.vo
        shapes = {"q": n * qk, "k": qk, "v": vo}
        held: dict[str, int] = {}
        for which, size in shapes.items():
            projection, rows = attention.rows(which)
            assert rows == slice(held.get(projection, 0), held.get(projection, 0) + size)
            held[projection] = rows.stop
        beside = attention.beside * len(attention.head_order()[0])
        widths = {"q_proj": MLA["q_lora_rank"] if hasattr(attention, "q_a_proj") and attention.q_a_proj else WIDTH}
        if name in LATENT:
            held["q_proj"] += beside
            widths["kv_proj"] = MLA["kv_lora_rank"]
        for projection, size in held.items():
            assert attention.get_submodule(projection).weight.shape == (size, widths.get(projection, WIDTH))
        names = [k for k in state if k.startswith(f"{block.name}.")]
        output = next(
            k
            for k in names
            if tuple(state[k].shape) == (WIDTH, n * vo) and k.endswith(("dense.weight", "o_proj.weight"))
        )
        assert state[output.replace("weight", "bias")].shape == (WIDTH,)  # holds the mean of what was cut
        biases = {p: attention.get_submodule(p).bias for p in held}
        assert block.part != "cross" or biases["kv_proj"] is None
        kept += sum(size * widths.get(projection, WIDTH) for projection, size in held.items())
        kept += WIDTH * n * vo + WIDTH + sum(len(b) for b in biases.values() if b is not None)
        kept += sum(p.numel() for way in projections(attention, attention.family.latent) for p in way.parameters())
        wide = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"] if name in LATENT else qk + vo
        cached += wide * (block.part != "encoder")
    before = sum(p.numel() for p in dense.parameters())
    original = sum(_attention_parameters(dense, block.name) for block in plan.blocks)
    assert summary["attention_parameters_before"] == original
    assert summary["attention_parameters_after"] == kept < original
    assert summary["parameters_before"] == before
    assert summary["parameters_after"] == before - original + kept == sum(p.numel() for p in model.parameters())
    assert summary["kv_bytes_per_token_after"] == 8 * cached  # bytes of a float64


def _attention_parameters(model: torch.nn.Module, block: str) -> int:
    """Projections of a block: all that it owns but what lies beside them."""
    beside = ("norm", "sinks", "relative_attention_bias")
    found = model.get_submodule(block).named_parameters()
    return sum(p.numel() for name, p in found if not any(word in name.lower() for word in beside))


@pytest.mark.parametrize("name", [*GENERATIVE, *SEQ2SEQ])
def test_cache_holds_what_the_summary_says(name: str) -> None:
    for (model, batch), when in ((build(name), "before"), (pruned(name), "after")):
        batch = {k: v[:, :5] if k.endswith("input_ids") else v for k, v in batch.items()}  # inside the sliding window
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
        halves = (
            [cache.self_attention_cache, cache.cross_attention_cache]
            if isinstance(cache, EncoderDecoderCache)
            else [cache]
        )
        measured = sum(_bytes_per_token(half) for half in halves)
        summary = clover.summary(model if when == "after" else clover.orthogonalize(model))
        assert summary[f"kv_bytes_per_token_{when}"] == measured


def _bytes_per_token(cache: DynamicCache) -> int:
    tensors = [t for layer in cache.layers if hasattr(layer, "keys") for t in (layer.keys, layer.values)]
    return sum(t.nbytes // (t.shape[0] * t.shape[2]) for t in tensors)


# --- trainable, every dtype ---


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name: str) -> None:
    dense, batch = build(name)
    model, _ = pruned(name)
    for m in (dense, model):
        out = m(**batch)
        wanted = [out[k] for k in ("logits", "last_hidden_state", "text_embeds", "image_embeds") if k in out]
        sum(x.square().sum() for x in wanted).backward()
    idle = {n for n, p in dense.named_parameters() if p.grad is None}  # poolers that these outputs don't read
    assert {n for n, p in model.named_parameters() if p.grad is None} == idle
    for n, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), n
    for attention in attentions(model):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_low_precision_models_calibrate_and_run(name: str, dtype: torch.dtype) -> None:
    model, batch = build(name, dtype)
    exact, inputs = build(name)
    low = calibrate(model, blocks(model)[:1], [batch])[0]
    high = calibrate(exact, blocks(exact)[:1], [inputs])[0]
    for field in ("query", "key", "pair", "output", "mean"):
        ours, truth = getattr(low, field), getattr(high, field)
        assert ours.dtype == torch.float64
        # What is left is the rounding of weights and activations; sums of 8 or 11 bits would be worse.
        assert (ours - truth).norm() <= (0.1 if name in HYBRID else 0.05) * truth.norm()
    model, batch = pruned(name, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert outputs(model, batch).isfinite().all()


# --- padding ---


@pytest.mark.parametrize(
    ("name", "side"),
    [(n, s) for n in TEXT for s in ("left", "right") if (n, s) != ("llama4", "left")],  # it counts from padding on
)
def test_padding_does_not_change_the_moments(name: str, side: str) -> None:
    model, batch = build(name, torch.float32 if name in NARROW else torch.float64)
    long, short = batch["input_ids"][:1], batch["input_ids"][1:, :7]
    gap = long.shape[1] - short.shape[1]
    padding = (gap, 0) if side == "left" else (0, gap)
    padded = torch.nn.functional.pad(
        short, padding, value=int(short[0, 0])
    )  # a token like any other, were it not masked
    mask = torch.stack([torch.ones(12), torch.nn.functional.pad(torch.ones(7), padding)]).long()
    both = {"input_ids": torch.cat([long, padded]), "attention_mask": mask}
    if side == "left" and name not in ("bloom", "opt"):  # those two count positions by the mask
        start = 1 if name == "roberta" else 0
        both["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0) + start
    alone = calibrate(model, blocks(model), [{"input_ids": long}, {"input_ids": short}])
    together = calibrate(model, blocks(model), [both])
    for a, b in zip(alone, together, strict=True):
        _assert_equal(a, b)


def _assert_equal(a: Moments, b: Moments) -> None:
    assert a.tokens == b.tokens
    for field in ("query", "key", "pair", "output", "mean"):
        expected, found = getattr(a, field), getattr(b, field)
        assert (expected - found).abs().max() <= 1e-4 * expected.abs().max() if expected.numel() else True, field
