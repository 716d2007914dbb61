"""What must hold for any input: plans over random costs, damage to files, and memory that is given back."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import clover
from clover.errors import CloverError, UnsupportedModelError
from clover.measure.files import read_manifest, read_questions
from clover.model.heads import finite
from clover.model.survey import blocks
from clover.planning.budget import Costs, Limits, Share, make_plan
from clover.planning.plan import Plan
from clover.pruning.prune import find_bases
from families import build, outputs
from families import pruned as cut
from test_budget import SEEDS, SHARES, costs
from tiny import LM

# --- calibration data of few different inputs ---


def _letters() -> Any:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
    ))  # fmt: skip


def _residues() -> Any:
    return EsmForMaskedLM(EsmConfig(
        vocab_size=33, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        position_embedding_type="rotary", token_dropout=False, pad_token_id=1, mask_token_id=32,
    ))  # fmt: skip


@pytest.mark.parametrize("make", [_letters, _residues])
@pytest.mark.parametrize("tokens", [16, 512, 2048])
def test_a_small_alphabet_is_cut_without_loss(make: Any, tokens: int) -> None:
    """Head outputs fill few of their columns, and the sums of their moments, in float32, leave noise in the others."""
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(4, 8 if make is _letters else 24, (max(tokens // 128, 1), min(tokens, 128)))
    before, largest = outputs(model, {"input_ids": ids}), max(p.abs().max() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ tokens reached")
        clover.prune(model, vo=0.25, calibration=[{"input_ids": ids}])
    assert (outputs(model, {"input_ids": ids}) - before).norm() < 0.01 * before.norm()
    assert max(p.abs().max() for p in model.parameters()) < 10 * largest


# --- heads that do nothing ---


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "whisper", "vit"])
def test_a_constant_is_kept_whole(name: str) -> None:
    """By the weights too: what a bias of the values puts out is no direction that could go."""
    model, batch = build(name)
    for block in blocks(model):
        values, bias = block.heads().v, block.heads().v_bias
        assert bias is not None
        with torch.no_grad():
            values.zero_()
            bias.normal_()
    before = outputs(model, batch)
    assert clover.summary(clover.prune(model, vo=0.5))["vo_removed"] >= 0.5
    torch.testing.assert_close(outputs(model, batch), before)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_heads_that_do_nothing_go_first(scale: float, calibrated: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LM)).double().eval()
    for layer in model.model.layers:
        attention, dead = layer.self_attn, slice(0, 24)
        with torch.no_grad():
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[dead] = 0
            attention.v_proj.weight *= scale
            attention.o_proj.weight /= scale
    batch = {"input_ids": torch.randint(3, 60, (8, 12))}
    before = outputs(model, batch)
    clover.prune(model, qk=0.4, vo=0.5, calibration=[batch] if calibrated else None)
    torch.testing.assert_close(outputs(model, batch), before, rtol=0, atol=1e-6)


# --- plans ---

SHAPES = st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 6), st.integers(1, 7)).filter(
    lambda s: s[1] + s[2] > 0
)
LIMITS = st.builds(
    Limits, groups=st.integers(1, 4), multiple=st.integers(1, 4), minimum=st.integers(1, 3), drop_heads=st.booleans()
)


def charged(plan: Plan, entries: list[Costs]) -> tuple[int, int]:
    """Columns of Q-K and V-O that a plan stores, counted head by head."""
    qk = sum(2 * g.pairs + g.plain for b in plan.blocks for g in b.groups for _ in g.heads)
    vo = sum(g.value for b in plan.blocks for g in b.groups for _ in g.heads)
    assert len(plan.blocks) == len(entries)
    return qk, vo


@given(SEEDS, st.lists(SHAPES, min_size=1, max_size=3), SHARES, SHARES, LIMITS)
def test_any_plan_is_paid_for_and_survives_json(
    seed: int, shapes: list[tuple[int, int, int, int]], qk: float, vo: float, limits: Limits
) -> None:
    torch.manual_seed(seed)
    entries = [costs(kv, pairs, plain, value, f"b{i}") for i, (kv, pairs, plain, value) in enumerate(shapes)]
    plan = make_plan(entries, Share(qk), Share(vo), limits=limits)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    stored = charged(plan, entries)
    assert stored == (sum(b.qk_kept for b in plan.blocks), sum(b.vo_kept for b in plan.blocks))
    for block, entry in zip(plan.blocks, entries, strict=True):
        assert len(block.groups) <= max(1, limits.groups)
        assert sorted({h for g in block.groups for h in g.heads}) == sorted(h for g in block.groups for h in g.heads)
        for group in block.groups:
            assert 0 <= group.pairs <= entry.count("pair")
            assert 0 <= group.plain <= entry.count("plain")
            assert 0 < group.value <= entry.count("value")
        if not limits.drop_heads:
            assert sum(len(g.heads) for g in block.groups) == entry.kv_heads
    whole = [sum(c.kv_heads * size(c) for c in entries) for size in (lambda c: c.qk, lambda c: c.count("value"))]
    # What must stay whatever the budget says: the smallest size of every head that can't go, in its coarsest steps.
    must = [sum(c.kv_heads * min(size(c), least) for c in entries) for size, least in
            ((lambda c: c.qk, 4 * max(limits.minimum, limits.multiple)),
             (lambda c: c.count("value"), 4 * max(limits.minimum, limits.multiple)))]  # fmt: skip
    for kept, all_of, share, least in zip(stored, whole, (qk, vo), must, strict=True):
        assert kept <= max((1 - share) * all_of + 1e-6, least)


# --- damaged plans ---


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pruned"
    model, batch = build("llama-gqa", torch.float32)
    clover.prune(model, qk=0.3, vo=0.5, calibration=[batch])
    return clover.save(model, folder)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


JUNK = st.sampled_from([None, -1, 0, 1, 3, 10**9, 1.5, "", "x", True, [], [0], [[0]], {}, {"heads": 1}])


@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_plan_is_told_as_one(data: st.DataObject) -> None:
    """What is read is a plan that says what the damaged data says, or there is a ``CloverError``; nothing else."""
    torch.manual_seed(0)
    whole = json.loads(
        json.dumps(make_plan([costs(name="a"), costs(pairs=2, name="b")], Share(0.3), Share(0.5)).to_dict())
    )
    damaged = copy.deepcopy(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        spots = places(damaged)
        if not spots:
            break
        *path, key = data.draw(st.sampled_from(spots))
        parent = damaged
        for step in path:
            parent = parent[step]
        if data.draw(st.booleans()):
            del parent[key]
        else:
            parent[key] = data.draw(JUNK)
    try:
        plan = Plan.from_dict(damaged)
    except CloverError:
        return
    again = json.loads(json.dumps(plan.to_dict()))
    assert again == damaged
    assert all(0 <= share <= 1 for share in (plan.qk_removed, plan.vo_removed))


@given(data=st.data())
@settings(max_examples=40)
def test_a_folder_with_a_damaged_plan_is_refused_or_loads(pruned: Path, data: st.DataObject) -> None:
    file = pruned / "config.json"
    intact = file.read_text()
    config = json.loads(intact)
    *path, key = data.draw(st.sampled_from(places(config["clover"])))
    parent = config["clover"]
    for step in path:
        parent = parent[step]
    parent[key] = data.draw(JUNK)
    file.write_text(json.dumps(config))
    try:
        clover.load(pruned)
    except CloverError:
        pass
    finally:
        file.write_text(intact)


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=40)
def test_a_config_with_damaged_bytes_is_refused_or_loads(pruned: Path, junk: bytes, at: int) -> None:
    file = pruned / "config.json"
    intact = file.read_bytes()
    file.write_bytes(intact[:at] + junk + intact[at + len(junk) :])
    try:
        clover.load(pruned)
    except CloverError:
        pass
    finally:
        file.write_bytes(intact)


# --- damaged data ---


@given(st.binary(max_size=200), st.booleans())
def test_any_manifest_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes, header: bool) -> None:
    file = tmp_path_factory.mktemp("m") / "manifest.tsv"
    file.write_bytes((b"file\ttext\tsplit\n" if header else b"") + junk)
    try:
        rows = read_manifest(file)
    except CloverError:
        return
    assert rows and all(row.text is not None for row in rows)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.dictionaries(
            st.sampled_from(["instruction", "output", "answer", "x"]),
            st.one_of(st.text(max_size=20), st.none(), st.integers(), st.lists(st.integers(), max_size=2)),
        ).map(lambda d: json.dumps(d).encode()),
    ),
    max_size=4,
)


@given(LINES)
def test_any_questions_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.mktemp("q") / "questions.jsonl"
    file.write_bytes(b"\n".join(lines))
    try:
        found = read_questions(file)
    except CloverError:
        return
    assert all(0 <= q.answer < len(q.labels) for q in found)


@given(st.binary(max_size=100))
def test_any_packed_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    packed = gzip.compress(b'{"instruction": "a", "answer": "b"}\n' * 5)
    file = tmp_path_factory.mktemp("g") / "questions.jsonl.gz"
    file.write_bytes(packed[:20] + junk + packed[20 + len(junk) :])
    try:
        read_questions(file)
    except CloverError:
        return


# --- memory ---


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_loop_of_prune_save_load_generate_keeps_nothing(name: str, tmp_path: Path) -> None:
    """Every module of every model dies with its model: the ones replaced, the ones pruned and the ones loaded."""
    alive: list[weakref.ref[torch.nn.Module]] = []
    for turn in range(3):
        model, batch = build(name, torch.float32)
        alive += [weakref.ref(module) for module in model.modules()]
        clover.prune(model, qk=0.3, vo=0.5, calibration=[batch])
        alive += [weakref.ref(module) for module in model.modules()]
        folder = clover.save(model, tmp_path / str(turn))
        loaded = clover.load(folder)
        alive += [weakref.ref(module) for module in loaded.modules()]
        loaded.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
        del model, loaded
        gc.collect()
        left = [ref() for ref in alive if ref() is not None]
        assert not left, f"after turn {turn} there still are {sorted({type(m).__name__ for m in left})}"


def test_measuring_a_loss_keeps_nothing() -> None:
    model, batch = build("gpt2", torch.float32)
    clover.prune(model, max_loss=0.5, calibration=[batch, {"input_ids": batch["input_ids"].flip(1)}])
    alive = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_bases_are_found_beside_the_weights_not_in_a_copy() -> None:
    model, _ = build("llama-gqa", torch.float32)
    for basis, block in zip(find_bases(model), blocks(model), strict=True):
        for which in "qkvo":
            weight, seen = block.projection(which).weight, getattr(basis.heads, which)
            assert seen.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() and not seen.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(3, 50, 7).to(dtype)[:, 1:]
    assert finite(tensor) and finite(tensor[:0])
    tensor[2, 31, 4] = bad
    assert not finite(tensor)


# --- models and data at the edge ---


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "phi"])
def test_sequences_of_one_token_say_nothing_of_attention(name: str, count: int) -> None:
    """And what nothing is known of isn't lost."""
    model, batch = build(name)
    whole = model(**batch).logits
    texts = [{"input_ids": batch["input_ids"][:1, :1] + i} for i in range(count)]
    cut = clover.prune(copy.deepcopy(model), qk=0.25, vo=0.25, calibration=texts)
    assert cut(**batch).logits.isfinite().all()
    full = clover.prune(model, qk=0.0, vo=0.0, calibration=texts)
    torch.testing.assert_close(full(**batch).logits, whole, rtol=1e-6, atol=1e-6)


def test_an_odd_number_of_columns_beside_pairs() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    sizes = {"hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    config = StableLmConfig(**sizes, vocab_size=60, intermediate_size=16, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="4 columns of a head turn and 7 don't"):
        clover.prune(StableLmForCausalLM(config), vo=0.5)


def test_a_table_of_biases_may_be_offloaded() -> None:
    model, batch = cut("t5")
    right = outputs(model, batch)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(outputs(model, batch), right)
