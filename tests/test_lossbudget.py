"""A bound on the loss: the forecast, what is measured, and that what is delivered stays under the bound."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import clover
from clover.command import curve
from clover.command.curve import loss_section
from clover.errors import CloverError
from clover.model.answers import Answer, answer
from clover.planning.budget import Share, make_plan
from clover.pruning.lossbudget import (
    Forecast,
    check_bound,
    compare,
    divergence,
    keep_apart,
    measure,
    relative_error,
    suggest,
    twin,
    within,
)
from clover.pruning.prune import find_bases, plan_of
from clover.pruning.surgery import operate
from commands import TEXT, refuse, run, succeed
from families import CASES, build, outputs
from samples import tokenizer
from test_budget import costs
from tiny import LM

NAMES = ["llama-gqa", "qwen3", "gpt2", "bert", "vit", "whisper"]


def batches(name: str, count: int = 3) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A tiny model, and batches of other tokens, pixels or frames each."""
    model, batch = build(name, torch.float32)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append({k: torch.randint_like(v, 3, 60) if not v.is_floating_point() else torch.randn_like(v)
                     for k, v in batch.items()})  # fmt: skip
    return model, made


# --- the forecast ---


def test_the_forecast_is_the_sum_of_what_is_cheapest() -> None:
    entries = [costs(pairs=3, plain=2, name="a"), costs(pairs=3, plain=2, name="b")]
    forecast = Forecast.of(entries)
    assert forecast.loss(0, 0) == 0
    everything = sum(float(c.pair_cost.sum() + c.plain_cost.sum() + c.value_cost.sum() / 2) for c in entries)
    assert forecast.loss(1, 1) == pytest.approx(everything)
    assert forecast.loss(0, 0.25) == pytest.approx(
        float(torch.cat([c.value_cost.flatten() for c in entries]).sort().values[:16].sum() / 2)
    )


def test_shares_and_reach_agree() -> None:
    forecast = Forecast.of([costs(name="a"), costs(name="b")])
    for nats in (0.1, 1.0, 5.0):
        total = forecast.reach(nats)
        assert forecast.loss(*forecast.shares(total)) <= nats * (1 + 1e-9)
        assert forecast.loss(*forecast.shares(total + 1.01 / 128)) > nats
    steps = [forecast.shares(t / 10) for t in range(10)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(steps))


def test_what_is_dear_stays() -> None:
    forecast = Forecast.of([costs()]).scaled(qk=1e9)
    qk, vo = forecast.shares(0.4)
    assert qk == 0 < vo


def test_blocks_with_fixed_queries_and_keys_offer_none() -> None:
    forecast = Forecast.of([costs(fixed_qk=True)])
    assert forecast.shares(0.5) == (0, 0.5)


# --- what is measured ---


def test_divergence_is_that_of_torch() -> None:
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    assert torch.allclose(divergence(p, q), expected, atol=1e-6)
    p[0, 0] = -math.inf  # a word that is ruled out
    assert divergence(p, q).isfinite().all()


def test_what_is_no_number_is_no_loss_of_nothing() -> None:
    p, q = torch.full((2, 7), math.nan), torch.randn(2, 7)
    assert divergence(p, q).isnan().all() and divergence(q, p).isnan().all()


def test_one_number_is_no_distribution() -> None:
    """A reranker's only logit would, as a distribution, be the same whatever it says."""
    ids = torch.randint(3, 60, (4, 8))
    sizes = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 1}
    torch.manual_seed(0)
    one, other = (
        transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=4)).eval()
        for _ in range(2)
    )
    assert compare(one, one, [{"input_ids": ids}]).nats == 0
    assert compare(one, other, [{"input_ids": ids}]).nats > 0.01


def test_an_output_without_names_is_refused() -> None:
    with pytest.raises(CloverError, match=r"returned a tuple; leave return_dict out of the batch"):
        answer((torch.zeros(1, 2, 3),), {}, nn.Identity())


def test_what_a_model_answers() -> None:
    words, numbers = torch.zeros(2, 5, 7), torch.zeros(2, 5)
    ids = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    model = nn.Identity()
    assert (
        answer({"logits": words}, ids, model) == answer({"prediction_logits": words}, ids, model) == Answer(words, True)
    )
    assert answer({"logits": numbers}, {}, model) == Answer(numbers, True)
    assert answer({"logits": numbers}, ids, model)[0].shape == (2, 5, 1)  # one a token, as of a discriminator
    assert answer({"loss": words, "start_logits": numbers, "end_logits": numbers}, ids, model)[0].shape == (2, 5, 2)
    assert answer({"feature_maps": (numbers, words)}, {}, model).said is words


@pytest.mark.parametrize("name", CASES)
def test_pixels_of_a_patch_are_no_words_and_words_are(name: str) -> None:
    model, batch = build(name, torch.float32)
    with torch.no_grad():
        output = model(**batch)
    said, words, _ = answer(output, batch, model)
    head = None if not hasattr(output, "logits") else model.get_output_embeddings()
    if head is not None and said.dim() == 3 and said.shape[-1] > 1:
        assert words
    if said.dim() == 3:
        assert not answer({"logits": said[..., :1].expand(-1, -1, 777)}, batch, model).words


def test_relative_error() -> None:
    p = torch.tensor([[3.0, 4.0]])
    assert relative_error(p, p * 1.1).item() == pytest.approx(0.01)


def classifier(problem: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model whose labels go up and down together, and data."""
    config = transformers.BertConfig(**LM, num_labels=3, problem_type=problem)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for weight in (p for p in model.bert.parameters() if p.dim() == 2):
            weight.mul_(6)
        model.classifier.weight.copy_(40 * model.classifier.weight[:1] + model.classifier.weight)
    return model, batches("bert", 6)[1]


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_labels_that_do_not_exclude_one_another(problem: str) -> None:
    model, data = classifier(problem)
    bases = find_bases(model, calibration=data[:3])
    plan = make_plan([b.costs() for b in bases], Share(0.5), Share(0.5))
    found = measure(model, bases, plan, data[3:])
    cut = twin(model)
    operate(cut, bases, plan)
    with torch.no_grad():
        p, q = (torch.cat([m(**b).logits for b in data[3:]]).double() for m in (model, cut))
    if problem == "regression":
        true = ((p - q).square().sum(-1) / p.square().sum(-1)).mean().item()
        assert math.expm1(found.nats) == pytest.approx(true, rel=1e-4)
    else:
        yes, no = p.sigmoid(), (-p).sigmoid()
        true = yes * (p.sigmoid().log() - q.sigmoid().log()) + no * ((-p).sigmoid().log() - (-q).sigmoid().log())
        assert found.nats == pytest.approx(true.mean().item(), rel=1e-4)
    as_classes = divergence(p.float(), q.float()).mean().item()
    assert found.nats > 3 * as_classes


def test_what_is_told_of_numbers_is_their_relative_error() -> None:
    body, data = batches("vit", 6)
    bases = find_bases(body, calibration=data[:3])
    outcome = within(body, bases, data[3:], 0.8)
    assert outcome.chosen is not None
    cut = twin(body)
    operate(cut, bases, outcome.plan)
    with torch.no_grad():
        pairs = [(body(**b).last_hidden_state, cut(**b).last_hidden_state) for b in data[3:]]
    true = torch.cat([relative_error(p.flatten(0, 1), q.flatten(0, 1)) for p, q in pairs]).mean().item()
    assert outcome.to_dict()["chosen"]["measured"] == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_shares_weights_and_is_cut_alone(name: str) -> None:
    model, (batch, other, _) = batches(name)
    before, names = outputs(model, batch), {n: type(m) for n, m in model.named_modules()}
    bases = find_bases(model, calibration=[batch])
    second = twin(model)
    assert {p.data_ptr() for p in second.parameters()} == {p.data_ptr() for p in model.parameters()}
    plan = make_plan([b.costs() for b in bases], Share(0.0), Share(0.5))
    found = measure(model, bases, plan, [other])
    assert found.nats > 0
    assert {n: type(m) for n, m in model.named_modules()} == names
    assert torch.equal(outputs(model, batch), before)


def test_nothing_cut_loses_nothing() -> None:
    model, (batch, other, _) = batches("gpt2")
    bases = find_bases(model, calibration=[batch])
    found = measure(model, bases, make_plan([b.costs() for b in bases], Share(0), Share(0)), [other])
    assert 0 <= found.nats < 1e-4
    assert compare(model, model, [other]).nats == 0


def test_padding_does_not_count() -> None:
    model, (batch, other, _) = batches("llama-gqa")
    second = copy.deepcopy(model)
    with torch.no_grad():
        second.lm_head.weight.add_(0.1 * torch.randn_like(second.lm_head.weight))
    mask = torch.ones_like(batch["input_ids"])
    padded = {k: torch.nn.functional.pad(v, (0, 4)) for k, v in {**other, "attention_mask": mask}.items()}
    assert compare(model, second, [padded]).nats == pytest.approx(compare(model, second, [other]).nats, rel=1e-4)


def test_the_ceiling_is_above_the_mean_where_sequences_differ() -> None:
    model, (_, other, _) = batches("llama-gqa")
    second = copy.deepcopy(model)
    with torch.no_grad():
        second.lm_head.weight.mul_(1.2)
    found = compare(model, second, [other])
    alone = compare(model, second, [{"input_ids": other["input_ids"][:1]}])
    assert found.ceiling > found.nats
    assert alone.ceiling == math.inf  # one sequence can't tell how far off its loss may be


# --- what is delivered ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_loss", [0.05, 1.0])
def test_the_delivered_cut_stays_within_the_bound(name: str, max_loss: float) -> None:
    model, (batch, other, third) = batches(name)
    bases = find_bases(model, calibration=[batch])
    found = within(model, bases, [other, third], max_loss)
    assert found.chosen is not None
    again = measure(model, bases, found.plan, [other, third])
    assert again.ceiling == pytest.approx(found.chosen.ceiling)
    assert math.expm1(again.ceiling) <= max_loss
    under = [p.removed for p in found.points if p.ceiling <= found.bound]
    assert found.chosen.removed == max(under) > 0
    assert len({(p.qk, p.vo, p.measured) for p in found.points}) == len(found.points)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_larger_bound_removes_more() -> None:
    model, (batch, other, third) = batches("gpt2")
    bases = find_bases(model, calibration=[batch])
    small, large = (within(model, bases, [other, third], b).chosen for b in (0.02, 1.0))
    assert small is not None and large is not None
    assert small.removed < large.removed


def test_if_nothing_can_go_nothing_goes() -> None:
    model, (batch, other, third) = batches("llama-gqa")
    found = within(model, find_bases(model, calibration=[batch]), [other, third], 1e-12)
    assert found.chosen is None
    assert found.plan.qk_removed == found.plan.vo_removed == 0
    assert "nothing was removed" in loss_section(found.to_dict())


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_granularity_is_kept(granularity: Any) -> None:
    model, made = batches("gpt2")
    clover.prune(model, max_loss=0.5, calibration=made, granularity=granularity)
    assert all(len(block.groups) == 1 for block in plan_of(model).blocks)


def test_prune_takes_a_bound() -> None:
    model, made = batches("gpt2")
    dense = copy.deepcopy(model)
    clover.prune(model, max_loss=0.5, calibration=made)
    assert plan_of(model).vo_removed > 0
    assert math.expm1(compare(dense, model, made[1::3]).ceiling) <= 0.5


def test_suggestions_grow_with_the_loss() -> None:
    model, (batch, other, _) = batches("gpt2")
    hints = suggest(model, find_bases(model, calibration=[batch]), [other])
    assert [h.max_loss for h in hints] == [0.01, 0.02, 0.05]
    assert 0 < hints[0].qk + hints[0].vo <= hints[1].qk + hints[1].vo <= hints[2].qk + hints[2].vo


# --- mistakes ---


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_bounds_that_are_none(value: float) -> None:
    with pytest.raises(CloverError, match="max_loss is"):
        check_bound(value)


def test_mistakes_leave_the_model_as_it_is() -> None:
    model, made = batches("llama-gqa")
    with pytest.raises(CloverError, match="needs calibration data"):
        clover.prune(model, max_loss=0.02)
    with pytest.raises(CloverError, match="needs calibration data"):
        clover.prune(model, max_loss=0.02, calibration=made, metric="weights")
    with pytest.raises(CloverError, match="by itself"):
        clover.prune(model, max_loss=0.02, qk=0.1, calibration=made)
    with pytest.raises(CloverError, match="of 1 batches none can be spared"):
        clover.prune(model, max_loss=0.02, calibration=made[:1])
    assert not hasattr(model.config, "clover")


def test_every_third_batch_is_kept_apart() -> None:
    assert keep_apart(range(6)) == ([0, 2, 3, 5], [1, 4])


def test_nothing_to_measure_on() -> None:
    model, _ = batches("gpt2")
    with pytest.raises(CloverError, match="nothing to measure"):
        compare(model, model, [])


# --- the command line ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with its tokenizer."""
    made = tmp_path_factory.mktemp("models") / "llama"
    build("llama-gqa", torch.float32)[0].save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def test_prune_within_a_loss(folder: Path, tmp_path: Path) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(TEXT * 4)
    arguments = ["--max-loss", "20%", "--calibration", text, "--limit", 6, "--report", page]
    sizes, said = succeed("prune", folder, tmp_path / "out", *arguments)
    loss = sizes.pop("loss")
    assert clover.summary(clover.load(tmp_path / "out")) == sizes
    assert loss["max_loss"] == pytest.approx(0.2)
    assert loss["chosen"]["ceiling"] <= 0.2
    assert "loss on data kept out of the calibration" in said
    shown = page.read_text()
    assert "What a cut costs" in shown
    assert f"{len(loss['measured'])} measured cuts" in shown and 'class="loss"' in shown
    assert len(curve._figure(loss).axes[0].containers) == len(loss["measured"])
    assert isinstance(clover.load(tmp_path / "out"), transformers.PreTrainedModel)


def test_inspect_suggests(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    found, _ = succeed("inspect", folder, "--calibration", text, "--limit", 4)
    assert [hint["max_loss"] for hint in found["suggestions"]] == [0.01, 0.02, 0.05]
    assert "for about 2 % loss: --qk" in run("inspect", folder, "--calibration", text, "--limit", 4).out
    assert succeed("inspect", folder)[0]["suggestions"] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--max-loss", "2%"), "--calibration"),
        (("--max-loss", "2%", "--qk", "0.1"), "by itself"),
        (("--max-loss", "2%", "--vo-threshold", "0.1"), "by itself"),
        (("--max-loss", "-2%"), "more than 0"),
        (("--max-loss", "0"), "more than 0"),
        (("--max-loss", "nan"), "more than 0"),
        (("--max-loss", "two"), "write 2% or 0.02"),
        (("--max-loss", "2"), "write 2% or 200%"),
    ],
)
def test_bounds_that_the_command_refuses(
    arguments: tuple[str, ...], sentence: str, folder: Path, tmp_path: Path
) -> None:
    assert sentence in refuse("prune", folder, tmp_path / "out", *arguments)


@pytest.mark.parametrize("more", [("--stream",), ("--metric", "weights")])
def test_bounds_that_other_options_contradict(more: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    sentence = refuse("prune", folder, tmp_path / "o", "--max-loss", "2%", "--calibration", text, *more)
    assert "--max-loss 0.02" in sentence and more[-1].strip("-") in sentence
