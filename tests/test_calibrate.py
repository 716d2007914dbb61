"""Moments gathered by hooks against slow, explicit sums over eager attention weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rope

import clover
from clover.calibration.calibrate import Moments, Watcher, calibrate
from clover.calibration.visible import SOFTMAX_WEIGHT, bias_of, in_other_texts
from clover.errors import CloverError
from clover.model import answers
from clover.model.survey import blocks
from families import build, outputs
from tiny import LM

ALL = 1000
"""More queries than any sequence here has."""


class Seen(NamedTuple):
    """What one attention module did in one call: heads apart, queries and keys rotated where the model does."""

    q: Tensor  # (batch, heads, tokens, d)
    k: Tensor  # (batch, kv, source, d)
    weights: Tensor  # (batch, heads, tokens, source)
    z: Tensor  # (batch, tokens, heads * e)
    rotary: int


def _split(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _llama(caught: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, int]:
    return *rope(_split(caught["q_proj"], size), _split(caught["k_proj"], size), *caught["position_embeddings"]), size


def _neox(caught: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, int]:
    q, k, _ = _split(caught["query_key_value"], 3 * size).chunk(3, -1)
    table = caught["position_embeddings"]
    return *partial_rope(q, k, *table), table[0].shape[-1]


def _bloom(caught: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, int]:
    q, k, _ = _split(caught["query_key_value"], 3 * size).chunk(3, -1)
    return q, k, 0


def _whisper(caught: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor, int]:
    return _split(caught["q_proj"], size), _split(caught["k_proj"], size), 0


READERS: dict[str, Callable[[dict[str, Any], int], tuple[Tensor, Tensor, int]]] = {
    "llama-gqa": _llama, "llama-mqa-bias": _llama, "llama-mha": _llama, "mistral": _llama,
    "gpt-neox": _neox, "bloom": _bloom, "whisper": _whisper,
}  # fmt: skip
OUTPUTS = {"o_proj", "out_proj", "dense"}


@contextmanager
def watching(module: nn.Module, caught: dict[str, Any]) -> Iterator[None]:
    """Catch what the children of an attention module return, what goes into its output projection, and its weights."""

    def child(name: str) -> Callable[..., None]:
        return lambda _, args, out: caught.update({name: out, "z": args[0]} if name in OUTPUTS else {name: out})

    handles = [layer.register_forward_hook(child(name)) for name, layer in module.named_children()]
    handles.append(module.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True))
    handles.append(module.register_forward_hook(lambda _, args, out: caught.update(weights=out[1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(name: str, model: nn.Module, path: str, size: int, batch: dict[str, Tensor]) -> Seen:
    caught: dict[str, Any] = {}
    with watching(model.get_submodule(path), caught), torch.no_grad():
        model(**batch)
    q, k, rotary = READERS[name](caught, size)
    return Seen(q.double(), k.double(), caught["weights"].double(), caught["z"].double(), rotary)


def covariance(rows: Tensor, weights: Tensor) -> Tensor:
    """Of ``rows`` (t, c) under ``weights`` (t), term by term."""
    mean = sum(w * row for w, row in zip(weights, rows, strict=True))
    return sum(w * (row - mean).outer(row - mean) for w, row in zip(weights, rows, strict=True))


def pair_features(q: Tensor, keys: Tensor) -> Tensor:
    """``(t, 2 * pairs)``: real and imaginary part of each pair of one query and all keys."""
    z = torch.complex(*q.chunk(2, -1)) * torch.complex(*keys.chunk(2, -1)).conj()
    return torch.cat([z.real, z.imag], -1)


def reference(seen: Seen, valid: Tensor) -> dict[str, Tensor]:
    """All moments of one block from one batch by loops; ``valid`` (batch, tokens) says which tokens count."""
    n = seen.q.shape[1] // seen.k.shape[1]
    sums: dict[str, dict[tuple[int, int], list[Tensor]]] = {k: defaultdict(list) for k in ("query", "key", "pair")}
    for b, i in valid.nonzero().tolist():
        for head in range(seen.q.shape[1]):
            at, q, keys = divmod(head, n), seen.q[b, head, i], seen.k[b, head // n]
            p = seen.weights[b, head, i]
            visible = p > 0
            w = SOFTMAX_WEIGHT * p + (1 - SOFTMAX_WEIGHT) * visible / visible.sum()
            r = seen.rotary
            sums["query"][at].append(q[r:].outer(q[r:]))
            sums["key"][at].append(covariance(keys[:, r:], w))
            sums["pair"][at].append(covariance(pair_features(q[:r], keys[:, :r]), w))
    kv = seen.k.shape[1]
    means = {
        name: torch.stack([torch.stack([torch.stack(by[g, i]).mean(0) for i in range(n)]) for g in range(kv)])
        for name, by in sums.items()
    }
    z = seen.z[valid]
    return {
        "query": means["query"].sum(1), "key": means["key"].mean(1), "pair": means["pair"], "mean": z.mean(0),
        "output": torch.cov(z.T, correction=0),
    }  # fmt: skip


def assert_near(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Sums are of float32 products, so the scale is that of the largest entry."""
    assert found.shape == expected.shape, what
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    atol = tolerance * max(scale, 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def eager(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    model, batch = build(name, dtype)
    model.set_attn_implementation("eager")
    return model, batch


def check(name: str, model: Any, batch: dict[str, Tensor], valid: Callable[[Seen], Tensor]) -> None:
    found = blocks(model)
    for block, moments in zip(found, calibrate(model, found, [batch], queries=ALL), strict=True):
        seen = observe(name, model, block.name, block.heads().q.shape[2], batch)
        answers = batch["decoder_input_ids"].numel() if "decoder_input_ids" in batch else None
        each = float(valid(seen).sum()) / answers if answers else 1.0  # tokens read for each that the model says
        for field, expected in reference(seen, valid(seen)).items():
            weight = each if field in ("query", "pair") else 1.0
            assert_near(getattr(moments, field), weight * expected, f"{block.name} {field}")
        assert moments.tokens == int(valid(seen).sum())


@pytest.mark.parametrize("name", READERS)
def test_moments_equal_a_slow_reference(name: str) -> None:
    model, batch = eager(name)
    check(name, model, batch, lambda seen: torch.ones(seen.z.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-neox", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_out_of_the_statistics(name: str, side: str) -> None:
    model, batch = eager(name, torch.float32)  # in float64 its own eager softmax makes NaN of wholly masked rows
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    check(name, model, batch | {"attention_mask": mask}, lambda _: mask.bool())


@pytest.mark.parametrize("name", ["t5", "bart", "nllb-moe"])
def test_each_side_of_an_encoder_decoder_has_its_own_padding(name: str) -> None:
    """Also where both texts have as many tokens: each side's moments are those of its own tokens alone."""
    model, _ = build(name)
    ids, said = torch.randint(3, 60, (1, 7)), torch.randint(3, 60, (1, 9))
    wide, long = (torch.cat([x, torch.full((1, 12 - x.shape[1]), 1)], 1) for x in (ids, said))
    masks = {
        "attention_mask": (torch.arange(12) < 7).long()[None],
        "decoder_attention_mask": (torch.arange(12) < 9).long()[None],
    }
    found = blocks(model)
    alone = calibrate(model, found, [{"input_ids": ids, "decoder_input_ids": said}], queries=ALL)
    padded = calibrate(model, found, [{"input_ids": wide, "decoder_input_ids": long} | masks], queries=ALL)
    for block, one, other in zip(found, alone, padded, strict=True):
        assert one.tokens == other.tokens == (7 if block.part == "encoder" else 9)
        for field in ("query", "output", "mean"):
            assert_near(getattr(one, field), getattr(other, field), field)


def alike(one: list[Moments], other: list[Moments]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.tokens == b.tokens
        for field in ("query", "key", "output", "mean"):
            assert_near(getattr(a, field), getattr(b, field), field, 1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_say_what_of_the_decoder_is_padding(name: str) -> None:
    model, _ = build(name)
    ids, said = torch.randint(3, 60, (1, 7)), torch.randint(3, 60, (1, 9))
    padded = torch.cat([said, torch.full((1, 4), -100)], 1)
    found = blocks(model)
    alone, both = (calibrate(model, found, [{"input_ids": ids, "labels": x}], queries=ALL) for x in (said, padded))
    alike(alone, both)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "unispeech", "data2vec-audio"])
def test_silence_behind_a_sound_stays_out_of_the_statistics(name: str) -> None:
    """The mask is of samples, what is read is of frames."""
    model, batch = build(name)
    sound = batch["input_values"]
    padded = {"input_values": torch.nn.functional.pad(sound, (0, 160)), "attention_mask": torch.ones(2, 560).long()}
    padded["attention_mask"][:, 400:] = 0
    found = blocks(model)
    alone, both = (calibrate(model, found, [given], queries=ALL) for given in (batch, padded))
    assert {m.tokens for m in both} == {m.tokens for m in alone}


@pytest.mark.parametrize("name", READERS)
def test_the_attention_implementation_makes_no_difference(name: str) -> None:
    model, batch = build(name)
    found = blocks(model)
    fused = calibrate(model, found, [batch], queries=ALL)
    model.set_attn_implementation("eager")
    for one, other in zip(fused, calibrate(model, found, [batch], queries=ALL), strict=True):
        for field in ("query", "key", "pair", "output", "mean", "gradient"):
            assert_near(getattr(one, field), getattr(other, field), field)


@pytest.mark.parametrize("name", ["llama-gqa", "whisper"])
def test_one_batch_equals_several(name: str) -> None:
    model, batch = build(name)
    found = blocks(model)
    together = calibrate(model, found, [batch], queries=ALL)
    apart = calibrate(model, found, ({k: v[i : i + 1] for k, v in batch.items()} for i in range(2)), queries=ALL)
    for one, other in zip(together, apart, strict=True):
        assert one.tokens == other.tokens
        for field in ("query", "key", "pair", "output", "mean"):  # the gradient depends on what is drawn
            assert_near(getattr(one, field), getattr(other, field), field)


def test_tensors_go_to_the_first_argument() -> None:
    model, batch = build("llama-gqa")
    found = blocks(model)
    by_name, bare = calibrate(model, found, [batch]), calibrate(model, found, [batch["input_ids"]])
    for one, other in zip(by_name, bare, strict=True):
        assert torch.equal(one.pair, other.pair) and torch.equal(one.output, other.output)


def equal(one: list[Moments], other: list[Moments], *fields: str) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for a, b in zip(one, other, strict=True) for f in fields)


def test_a_seed_gives_equal_samples() -> None:
    model, batch = build("llama-gqa")
    first, again, other = (calibrate(model, blocks(model), [batch], queries=3, seed=s) for s in (0, 0, 1))
    assert equal(first, again, "query", "key", "pair", "output", "mean", "gradient")
    assert equal(first, other, "output", "mean")
    assert not equal(first, other, "pair") and not equal(first, other, "gradient")


def test_the_global_random_state_is_left_alone() -> None:
    model, batch = build("llama-gqa")
    before = torch.random.get_rng_state()
    calibrate(model, blocks(model), [batch], queries=3)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- the Fisher information at the block's output ---


def exact_fisher(model: Any, path: str, ids: Tensor) -> Tensor:
    """``E[g g^T]`` over tokens and over all that the model could say at each place, weighted by its probability."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, out: Tensor) -> None:
        kept.append(out.requires_grad_() if out.is_leaf else out)

    handle = model.get_submodule(path).register_forward_hook(keep)
    model.requires_grad_(False)
    likelihood = model(input_ids=ids).logits[0].log_softmax(-1)
    handle.remove()
    total = torch.zeros(kept[0].shape[-1], kept[0].shape[-1], dtype=torch.float64)
    for row in likelihood:
        for word in row:
            g = torch.autograd.grad(word, kept[0], retain_graph=True)[0][0]
            total += word.detach().exp() * g.T @ g
    return total / ids.shape[1]


def sampled_fisher(model: Any, batch: dict[str, Tensor], draws: int) -> list[Tensor]:
    runs = [calibrate(model, blocks(model), [batch], queries=1, seed=s) for s in range(draws)]
    return [torch.stack([m.gradient for m in of_block]).mean(0) for of_block in zip(*runs, strict=True)]


def test_gradient_moment_is_the_fisher_information() -> None:
    model, batch = build("llama-gqa")
    ids = batch["input_ids"][:1, :4]
    for block, found in zip(blocks(model), sampled_fisher(model, {"input_ids": ids}, 150), strict=True):
        exact = exact_fisher(model, f"{block.name}.o_proj", ids)
        assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=0.15)
        assert (found - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_adds_no_gradient(side: str) -> None:
    model, batch = build("llama-gqa")
    ids = batch["input_ids"][:1, :4]
    pad = torch.zeros(1, 8, dtype=torch.long)
    order = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat([torch.ones_like(t) if t is ids else torch.zeros_like(t) for t in order], 1)
    padded = sampled_fisher(model, {"input_ids": torch.cat(order, 1), "attention_mask": mask}, 100)
    for found, plain in zip(padded, sampled_fisher(model, {"input_ids": ids}, 100), strict=True):
        assert float(found.trace()) == pytest.approx(float(plain.trace()), rel=0.25)


# --- the model is left as it was ---


def hook_count(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(training: bool, fails: bool) -> None:
    model, batch = build("llama-gqa")
    model.train(training)
    model.lm_head.requires_grad_(False)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]

    def batches() -> Iterator[dict[str, Tensor]]:
        yield batch
        assert hook_count(model) > 0 and not model.training
        if fails:
            raise RuntimeError("the disk is gone")

    if fails:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            calibrate(model, blocks(model), batches())
    else:
        calibrate(model, blocks(model), batches())
    assert hook_count(model) == 0 and model.training is training
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_dropout_is_off_while_calibrating() -> None:
    model, batch = build("whisper")
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    still = calibrate(model, blocks(model), [batch])
    assert equal(still, calibrate(model.train(), blocks(model), [batch]), "pair", "key", "output", "gradient")


def test_parts_frozen_in_evaluation_mode_stay_so() -> None:
    model, batch = build("llama-gqa")
    model.train().model.layers[0].eval()
    calibrate(model, blocks(model), [batch])
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


# --- mistakes ---


def test_no_batches_are_refused() -> None:
    model, _ = build("llama-gqa")
    with pytest.raises(CloverError, match="calibration data is empty; give at least one batch"):
        calibrate(model, blocks(model), [])
    assert hook_count(model) == 0


@pytest.mark.parametrize("kind", [dict, t.BatchEncoding, lambda batch: batch["input_ids"]])
def test_one_batch_in_place_of_a_list_is_refused(kind: Callable[[Any], Any]) -> None:
    model, batch = build("llama-gqa")
    with pytest.raises(CloverError, match=r"the calibration data is one \w+; give a list of batches: \[batch\]"):
        clover.prune(model, vo=0.25, calibration=kind(batch))


@pytest.mark.parametrize("bad, said", [
    ("input_ids", "a str; give"), ([torch.ones(2, 3)] * 2, "a list; give"), (torch.arange(5), r"a Tensor of .* \(5,\)")
])  # fmt: skip
def test_what_is_no_batch_is_refused(bad: Any, said: str) -> None:
    model, _ = build("llama-gqa")
    with pytest.raises(CloverError, match=f"a calibration batch is {said}"):
        calibrate(model, blocks(model), [bad])
    assert hook_count(model) == 0


def test_batches_as_loaders_and_tokenizers_give_them() -> None:
    model, batch = build("llama-gqa")
    ids, found = batch["input_ids"], blocks(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    plain = calibrate(model, found, [ids])
    assert equal(plain, calibrate(model, found, loader), "pair", "output", "gradient")
    without = [batch | {"attention_mask": None}]
    assert equal(plain, calibrate(model, found, without), "pair", "output", "gradient")


def test_inference_mode_is_named() -> None:
    model, batch = build("llama-gqa")
    with torch.inference_mode(), pytest.raises(CloverError, match=r"inference_mode\(\) rules out; call it outside"):
        calibrate(model, blocks(model), [batch])
    assert hook_count(model) == 0 and all(p.requires_grad for p in model.parameters())


def test_a_part_that_runs_without_gradients_is_refused() -> None:
    """As the towers of CLIPSeg do; no gradient there would be taken for no influence."""
    model, batch = build("llava")
    tower = model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)
    with pytest.raises(CloverError, match=r"the model runs model\.vision_tower\..*torch.no_grad.*prune another part"):
        calibrate(model, blocks(model), [batch])
    calibrate(model, blocks(model, "decoder"), [batch])


def test_weights_that_no_gradient_passes_are_refused() -> None:
    model, batch = build("llama-gqa")
    model.hf_quantizer = type("Mxfp4HfQuantizer", (), {"is_trainable": False})()
    with pytest.raises(CloverError, match="no gradient comes back through Mxfp4 weights; load the model dequantised"):
        calibrate(model, blocks(model), [batch])


def test_padding_of_several_choices_stays_out_of_the_statistics() -> None:
    config = t.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = t.BertForMultipleChoice(config).eval()
    ids, mask = torch.randint(64, (2, 3, 7)), torch.ones(2, 3, 7, dtype=torch.long)
    mask[..., 5:] = 0
    (moments,) = calibrate(model, blocks(model), [{"input_ids": ids, "attention_mask": mask}])
    assert moments.tokens == 2 * 3 * 5


def test_a_tower_that_has_an_output_of_its_own_is_not_cut_unseen() -> None:
    model, batch = build("clip")
    inner = model.forward

    def forward(**inputs: Any) -> Any:
        out = inner(**inputs)
        return type(out)(image_embeds=out.image_embeds, text_embeds=out.text_embeds)

    model.forward = forward
    with pytest.raises(CloverError, match=r"(text|vision)_model\..* do not influence the output that is scored"):
        calibrate(model, blocks(model), [batch])


def test_an_effect_of_zero_is_no_effect() -> None:
    model, batch = build("llama-gqa")
    model.model.layers[1].self_attn.register_forward_hook(lambda _, __, out: (0 * out[0], *out[1:]))
    with pytest.warns(UserWarning, match=r"does not depend on model\.layers\.1\.self_attn"):
        first, second = calibrate(model, blocks(model), [batch])
    assert 0 < second.gradient.trace() < 1e-6 * first.gradient.trace()


def test_blocks_that_no_batch_reaches_are_refused() -> None:
    model, batch = build("whisper")
    batch = {"encoder_outputs": (torch.randn(2, 20, 48).double(),), "decoder_input_ids": batch["decoder_input_ids"]}
    calibrate(model, blocks(model, "cross"), [batch])
    for part in ("all", "encoder"):
        with pytest.raises(CloverError, match=r"reached model\.encoder\.layers\.0\.self_attn; give batches that run"):
            calibrate(model, blocks(model, part), [batch])


@pytest.mark.parametrize("name, part", [("llava", "decoder"), ("paligemma", "decoder"), ("clip", None)])
def test_the_part_that_was_reached_is_named(name: str, part: str | None) -> None:
    model, batch = build(name)
    batch = {"input_ids": batch["input_ids"].clamp_max(50)}
    found, end = blocks(model), f", or choose part='{part}'" if part else ""
    if part is None:  # its towers are both of the same part, and its text runs alone only as a model of its own
        model.forward = model.text_model.forward
    with pytest.raises(CloverError, match=rf"reached .*vision_.*; give batches that run that part of the model{end}$"):
        calibrate(model, found, [batch])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_block_without_influence_costs_next_to_nothing(share: float) -> None:
    """As the last layer of the tower in front of a LLaVA, whose default is to read the layer before."""
    model, batch = build("llava")
    model.config.vision_feature_layer = -2
    before, tower = outputs(model, batch), model.model.vision_tower
    seen = tower(batch["pixel_values"]).last_hidden_state
    with pytest.warns(
        UserWarning, match=r"does not depend on model\.vision_tower\.encoder\.layers\.1\.self_attn; most"
    ):
        clover.prune(model, qk=share, vo=share, calibration=[batch])
    plan = clover.plan_of(model)
    idle = next(block for block in plan.blocks if block.name.endswith("vision_tower.encoder.layers.1.self_attn"))
    assert outputs(model, batch).isfinite().all() and clover.summary(model)["vo_removed"] >= share
    if share:
        assert idle.vo_kept == min(block.vo_kept for block in plan.blocks)
    else:  # it is whole, for whoever reads it one day
        assert (outputs(model, batch) - before).abs().max() < 1e-9
        assert (tower(batch["pixel_values"]).last_hidden_state - seen).abs().max() < 1e-9


def test_a_model_without_any_influence_is_refused() -> None:
    model, batch = build("llava")
    model.config.vision_feature_layer = -2
    last = [block for block in blocks(model) if "vision_tower.encoder.layers.1" in block.name]
    with pytest.raises(
        CloverError, match=r"does not influence the model's output on the calibration data; prune another"
    ):
        calibrate(model, last, [batch])


def test_all_padding_is_refused() -> None:
    model, batch = build("llama-gqa")
    mask = torch.zeros_like(batch["input_ids"])
    with pytest.raises(CloverError, match=r"all that reached model\.layers\.0\.self_attn is padding; check"):
        calibrate(model, blocks(model), [batch | {"attention_mask": mask}])


@pytest.mark.parametrize(
    "bad, dtype, remedy",
    [
        (torch.nan, torch.float32, "$"),
        (torch.inf, torch.float32, "$"),
        (torch.inf, torch.bfloat16, ", or use float32$"),
    ],
)
def test_activations_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype, remedy: str) -> None:
    model, batch = build("llama-gqa", dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[batch["input_ids"][0, 0], 0] = bad
    with pytest.raises(CloverError, match=rf"layers\.0\.self_attn: .* not finite; check the data{remedy}"):
        calibrate(model, blocks(model), [batch])
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["layoutlm", "sew", "plbart", "marian", "bert"])
def test_full_rank_is_exact_though_moments_are_sums_of_float32(name: str) -> None:
    """Rounding leaves moments with eigenvalues below zero, above all of outputs that hardly vary."""
    model, batch = build(name, torch.float32)
    if name == "bert":
        for layer in model.encoder.layer:
            layer.attention.self.value.bias.data.mul_(100)
    before = outputs(model, batch)
    clover.prune(model, qk=0.0, vo=0.0, calibration=[batch])
    assert (outputs(model, batch) - before).norm() < 1e-4 * before.norm()


def test_a_table_that_contradicts_the_config() -> None:
    model, batch = build("llama-gqa", torch.float32)
    model.config.rope_parameters["partial_rotary_factor"] = 0.5  # which Llama's own table does not know
    with pytest.raises(CloverError, match=r"the model rotates 8 columns of a head, but its config says 4"):
        clover.prune(model, vo=0.25, calibration=[batch])


# --- what is seen, what is said ---


@pytest.mark.parametrize("name", ["clip", "metaclip2"])
def test_text_that_is_told_to_be_causal(name: str) -> None:
    """CLIP's attention is not causal by itself: its text side says so in each call, and makes no mask for it."""
    model, batch = build(name)
    found = [block for block in blocks(model) if "text" in block.name]
    watcher = Watcher(found[0], ALL, torch.Generator())
    seen: list[Tensor] = []
    with mock.patch.object(Watcher, "_observe", lambda self, q, k, bias: seen.append(bias)):
        hooks = watcher.attach()
        model(**batch)
        for hook in hooks:
            hook.remove()
    assert seen
    for bias in seen:
        assert torch.equal(bias[0, 0] > -torch.inf, torch.ones(bias.shape[-2:], dtype=torch.bool).tril())


def test_flash_attention_says_only_what_is_padding() -> None:
    rows = torch.tensor([1, 3])
    hidden = torch.arange(5) > rows[:, None]
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    found = bias_of(mask, None, 0, rows, hidden)
    assert (found[0] > -torch.inf).tolist() == [[False, True, False, False, False], [False, True, True, True, False]]
    with pytest.raises(CloverError, match=r"can't read a object; load the model with attn_implementation='sdpa'"):
        bias_of(object(), None, 0, rows, hidden)


def test_a_window_holds_where_no_mask_says_so() -> None:
    model, _ = build("mistral")  # its window is 8
    watcher = Watcher(blocks(model)[0], ALL, torch.Generator())
    hidden = watcher._hidden(None, torch.tensor([0, 9, 11]), 12)
    assert (~hidden).sum(-1).tolist() == [1, 8, 8] and not hidden[1, 9] and not hidden[1, 2] and hidden[1, 1]
    both_ways = watcher._hidden(False, torch.tensor([0, 5]), 12)
    assert (~both_ways).sum(-1).tolist() == [8, 12]


def test_a_loss_is_not_what_a_model_says() -> None:
    torch.manual_seed(0)
    model = t.BertForSequenceClassification(t.BertConfig(**LM, num_labels=3)).double().eval()
    batch = {"input_ids": torch.randint(3, 60, (2, 9))}
    plain = calibrate(model, blocks(model), [batch])
    told = calibrate(model, blocks(model), [batch | {"labels": torch.tensor([0, 2])}])
    for one, other in zip(plain, told, strict=True):
        assert torch.equal(one.gradient, other.gradient)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_score_of_a_drawn_token_is_that_of_its_likelihood(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are looked at together, and as automatic differentiation gives it."""
    monkeypatch.setattr(answers, "ROWS", rows)
    logits = torch.randn(2, 5, 7, requires_grad=True)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, :2] = False
    found = answers.score(logits, True, valid, torch.Generator().manual_seed(3))
    points = torch.rand(8, 1, generator=torch.Generator().manual_seed(3))
    chance = logits[valid].log_softmax(-1)
    mass = chance.exp().cumsum(-1)
    drawn = torch.searchsorted(mass, points * mass[:, -1:]).clamp_max(6)
    (expected,) = torch.autograd.grad(chance.gather(-1, drawn).sum(), logits)
    torch.testing.assert_close(found, expected)


# --- what the model is run under ---


def test_neither_autocast_nor_the_default_device_nor_shortened_products_change_what_is_seen() -> None:
    (model, batch), (other, _) = build("llama-gqa", torch.float32), build("llama-gqa", torch.float32)
    exact = calibrate(model, blocks(model), [batch])
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = calibrate(other, blocks(other), [batch])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    for name in ("output", "pair"):
        rounded, right = getattr(found[0], name), getattr(exact[0], name)
        assert not torch.equal(rounded, rounded.bfloat16().double()), name
        assert (rounded - right).norm() < 0.1 * right.norm(), name


def test_texts_that_share_a_row_do_not_see_one_another() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    apart = in_other_texts(positions, 0, torch.tensor([1, 3]))
    assert apart.tolist() == [[False, False, False, True, True], [True, True, True, False, False]]
    assert not in_other_texts(None, 0, torch.tensor([1])).any()


@pytest.mark.parametrize("least", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_whatever_a_mask_adds_to_hide_a_key(least: float) -> None:
    mask = torch.tensor([0.0, least, -500.0])[None, None, None]
    found = bias_of(mask, None, 0, torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool))
    assert found.flatten().tolist() == [0.0, -torch.inf, -500.0]


def test_features_of_a_large_head_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, batch), (other, _) = build("llama-gqa"), build("llama-gqa")
    whole = calibrate(model, blocks(model), [batch])[0].pair
    monkeypatch.setattr("clover.calibration.calibrate.LARGEST", 500)
    torch.testing.assert_close(calibrate(other, blocks(other), [batch])[0].pair, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("default:.* tokens reached")
def test_too_little_data_is_told() -> None:
    model, batch = build("llama-gqa")
    with pytest.warns(UserWarning, match="24 tokens reached model.layers.0.self_attn, fewer than the 48 columns"):
        clover.prune(model, qk=0.2, vo=0.2, calibration=[batch])
