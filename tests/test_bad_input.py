"""A user's mistakes: each is refused in one sentence that names it, and leaves the model as it was."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import unwrap
from linecache import getline
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import clover
from clover.errors import CloverError, UnsupportedModelError, warn
from clover.measure.data import load_processor
from clover.model.families import FAMILIES, REFUSED
from clover.model.survey import blocks
from clover.planning.budget import Share
from clover.planning.plan import Group, Plan
from clover.pruning import prune as pruning
from clover.streaming.stream import prune_folder
from families import build, outputs
from test_checkpoint import python
from test_export import llava


@contextmanager
def refused(model: Any, batch: dict[str, torch.Tensor], match: str) -> Iterator[None]:
    """The body raises a one-line CloverError that matches; class, weights and outputs of the model stay as is."""
    kind, state, before = type(model), {k: v.clone() for k, v in model.state_dict().items()}, outputs(model, batch)
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CloverError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert type(model) is kind and not hasattr(model.config, "clover") and not model.training
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) or v.isnan().any() for k, v in state.items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(outputs(model, batch).nan_to_num(), before.nan_to_num())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- requests ---


@pytest.mark.parametrize("which", ["qk", "vo"])
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, 25.0, math.nan, math.inf])
def test_ratio_outside_its_range(which: str, ratio: float) -> None:
    model, batch = build("llama-gqa")
    with refused(model, batch, rf"share to remove is {ratio}; it must be at least 0 and less than 1"):
        clover.prune(model, **{which: ratio})


@pytest.mark.parametrize("which", ["qk", "vo"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_threshold_that_is_none(which: str, value: float) -> None:
    model, batch = build("gpt2")
    with refused(model, batch, rf"threshold is {value}; it must be a finite number"):
        clover.prune(model, **{f"{which}_threshold": value})


@pytest.mark.parametrize("value", [0.0, -0.5, 1.1, math.nan])
def test_energy_outside_its_range(value: float) -> None:
    model, batch = build("gpt2")
    with refused(model, batch, rf"energy to keep is {value}; it must be more than 0 and at most 1"):
        clover.prune(model, vo_energy=value)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("which", ["qk", "vo"])
def test_threshold_that_removes_everything(name: str, which: str) -> None:
    model, batch = build(name)
    with refused(model, batch, r"would lose every.*; lower the (ratio or the )?threshold"):
        clover.prune(model, **{f"{which}_threshold": 1e9})


def test_two_rules_for_one_thing() -> None:
    model, batch = build("gpt2")
    with refused(model, batch, "qk is given share .* and threshold .*; give one"):
        clover.prune(model, qk=0.1, qk_threshold=0.1)


@pytest.mark.parametrize("asked", [{"vo": 0.3}, {"max_loss": 0.1}])
def test_metric_that_is_none(asked: dict[str, float]) -> None:
    model, batch = build("gpt2")
    with refused(model, batch, "metric is 'taste'; it must be activations or weights"):
        unwrap(clover.prune)(model, calibration=[batch, batch], metric="taste", **asked)  # past the types


def test_mistakes_name_the_argument_as_the_caller_knows_it() -> None:
    for given in ({"qk": 2.0}, {"vo_threshold": -1.0}, {"qk_energy": 0.0}, {"max_loss": 0.1}, {"metric": "taste"}):
        with pytest.raises(CloverError, match=f"^the {next(iter(given))}[: ]"):
            pruning.wanted(**given, called="the {}".format)


def test_a_warning_names_the_line_that_called() -> None:
    caller = {"__name__": "clover.somewhere", "warn": unwrap(warn)}
    exec("def deep(): warn('so it is')\ndef prune(): deep()", caller)
    with pytest.warns(UserWarning, match="so it is") as caught:
        caller["prune"]()  # this line
    assert caught[0].filename == __file__
    assert "# this line" in getline(__file__, caught[0].lineno)


def test_part_that_the_model_lacks() -> None:
    model, batch = build("gpt2")
    with refused(model, batch, "no attention block in part 'cross'; it has decoder"):
        clover.prune(model, part="cross")
    with refused(model, batch, "no attention block in part 'middle'"):
        blocks(model, "middle")


# --- calibration ---


def test_activations_without_calibration() -> None:
    model, batch = build("gpt2")
    with refused(model, batch, "metric activations needs calibration data; give calibration, or metric weights"):
        clover.prune(model, metric="activations")


@pytest.mark.parametrize("batches", [list, lambda: iter(())], ids=["list", "generator"])
def test_empty_calibration(batches: Callable[[], Any]) -> None:
    model, batch = build("gpt2")
    with refused(model, batch, "calibration data is empty; give at least one batch"):
        clover.prune(model, vo=0.3, calibration=batches())


def test_calibration_that_misses_a_part() -> None:
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=6, n_positions=32, add_cross_attention=True)
    model, batch = t.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(3, 60, (2, 12))}
    with refused(model, batch, r"no calibration batch reached transformer\.h\.0\.crossattention"):
        clover.prune(model, vo=0.3, calibration=[batch])  # no other sequence to attend to


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"input_ids": torch.tensor([[3, 999]])}, r"can't read a batch of input_ids \(1, 2\): index out of range"),
        ({"input_ids": torch.zeros(1, 4)}, r"can't read a batch of input_ids \(1, 4\): Expected tensor for argument"),
        ({"return_dict": False}, "leave return_dict out of the batch"),
    ],
)
def test_calibration_that_the_model_cant_read(wrong: dict[str, Any], told: str) -> None:
    model, batch = build("llama-gqa")
    with refused(model, batch, told):
        clover.prune(model, vo=0.3, calibration=[batch | wrong])


def test_words_for_numbers() -> None:
    """In a process of its own, where types in signatures are not enforced."""
    code = """
import clover, numpy
from clover.planning.budget import Limits
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
for given in ({"qk": "0.5"}, {"vo": [0.1]}, {"qk": "1", "qk_energy": 0.5}, {"max_loss": "2%", "calibration": []}):
    try:
        clover.prune(model, **given)
    except clover.CloverError as error:
        print(error)
clover.prune(model, vo=numpy.float32(0.5), limits=Limits(groups=numpy.int64(2)))
print(clover.summary(model)["vo_removed"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "qk is '0.5'; it must be a number, such as 0.25",
        "vo is [0.1]; it must be a number, such as 0.25",
        "qk is given share 1 and energy 0.5; give one",
        "max_loss is '2%'; it must be more than 0, such as 0.02 for 2 % more perplexity",
        "0.5",
    ], done.stderr


def test_calibration_with_values_that_are_not_finite() -> None:
    model, batch = build("vit")
    bad = {"pixel_values": batch["pixel_values"].clone()}
    bad["pixel_values"][0, 0, 0, 0] = math.nan
    with refused(model, batch, r"calibration moment of \w+ is not finite; check the data"):
        clover.prune(model, vo=0.3, calibration=[batch, bad])


@pytest.mark.parametrize("row", [[1, 2, 3], torch.tensor([1, 2, 3])])
def test_rows_of_a_dataset_are_no_batches(row: Any) -> None:
    model, _ = build("gpt2")
    with pytest.raises(CloverError, match=r"input_ids of a calibration batch is a .* of one row; give batches"):
        clover.prune(model, vo=0.3, calibration=[{"input_ids": row}])


def test_calibration_that_the_model_refuses() -> None:
    """The error is the model's own; hooks and weights are put back all the same."""
    model, batch = build("gpt2")
    before = outputs(model, batch)
    with pytest.raises(ValueError, match="specify either input_ids"):
        clover.prune(model, vo=0.3, calibration=[batch, {"pictures": batch["input_ids"]}])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(outputs(model, batch), before)


# --- models ---


@pytest.mark.parametrize(
    ("name", "path", "match"),
    [
        (
            "llama-gqa",
            "model.layers.1.self_attn.k_proj.weight",
            r"model\.layers\.1\.self_attn: the weights of k contain",
        ),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", r"transformer\.h\.0\.attn: the weights of q_bias contain"),
        ("bloom", "transformer.h.1.self_attention.dense.weight", r"h\.1\.self_attention: the weights of o contain"),
        ("bert", "encoder.layer.0.attention.output.dense.bias", r"layer\.0\.attention: the weights of o_bias contain"),
    ],
)
@pytest.mark.parametrize(("value", "what"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_weights_that_are_not_finite(name: str, path: str, match: str, value: float, what: str) -> None:
    model, batch = build(name)
    with torch.no_grad():
        model.get_parameter(path).view(-1)[7] = value
    with refused(model, batch, f"{match} {what}.*repair or reload"):
        clover.prune(model, vo=0.3, calibration=[batch])


def test_weights_that_are_not_finite_on_disk(tmp_path: Path) -> None:
    model, batch = build("llama-gqa", torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "model")
    for name, calibration in {"weights": None, "calibrated": [batch]}.items():
        with pytest.raises(CloverError, match=r"layers\.1\.self_attn: the weights of k contain NaN"):
            clover.prune_folder(tmp_path / "model", tmp_path / name, vo=0.3, calibration=calibration)


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=48, n_layer=1, n_head=6))
    with pytest.raises(CloverError, match=r"h\.0\.attn: q is on the meta device; load the model's weights first"):
        clover.prune(model, vo=0.3)


def test_cut_that_overflows_its_dtype() -> None:
    model, batch = build("gpt2", torch.float16)
    with torch.no_grad():  # both biases fit; the value bias folded into the output's does not
        model.transformer.h[1].attn.c_proj.bias.fill_(6e4)
        model.transformer.h[1].attn.c_attn.bias[96:] = 6e3
    with refused(model, batch, r"h\.1\.attn\.o_proj\.bias overflows torch\.float16; load the model in"):
        clover.prune(model, vo=0.0)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("llama-gqa", {"num_key_value_heads": 4}, r"6 query heads can't share 4 KV heads; correct the head counts"),
        ("llama-gqa", {"num_key_value_heads": 0}, r"6 query heads can't share 0 KV heads; correct the head counts"),
        (
            "llama-gqa",
            {"num_key_value_heads": 3},
            r"has 16 rows, but 6 query heads and 3 KV heads of 8 make 24; correct",
        ),
        (
            "llama-mha",
            {"num_attention_heads": 12},
            r"has 96 rows, but 12 query heads and 6 KV heads of 16 make 192; correct",
        ),
        ("phi3", {"num_key_value_heads": 6}, r"has 80 rows, but 6 query heads and 6 KV heads of 8 make 144; correct"),
    ],
)
def test_wrong_head_counts_in_the_config(name: str, change: dict[str, int], match: str) -> None:
    model, _ = build(name)
    for key, value in change.items():
        setattr(model.config, key, value)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CloverError, match=match):
        clover.prune(model, vo=0.3)
    assert list(model.state_dict()) == list(state) and not hasattr(model.config, "clover")


def test_code_of_a_repository_runs_only_when_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question was asked"))
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config", "AutoModel": "odd.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    for attempt in (clover.load, lambda path: load_processor(path, "AutoTokenizer")):
        with pytest.raises(CloverError, match="contains custom code"):
            attempt(tmp_path)
    with pytest.raises(CloverError, match=r"odd\.py"):  # which isn't there, but was looked for
        clover.load(tmp_path, trust_remote_code=True)


def test_unknown_family() -> None:
    model = t.SwinModel(t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2]))
    with pytest.raises(UnsupportedModelError, match=r"attention of class SwinAttention, .*CONTRIBUTING\.md"):
        clover.prune(model, vo=0.3)
    assert not hasattr(model.config, "clover")


def test_a_part_beside_attention_that_nobody_knows(tmp_path: Path) -> None:
    """What is known can be cut, saved and loaded, if it is asked for by its part; the rest stays as it is."""
    sees = t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2])
    writes = t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, writes)
    model = t.VisionEncoderDecoderModel(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "decoder_input_ids": torch.randint(3, 60, (2, 7))}
    with pytest.raises(UnsupportedModelError, match=r"SwinAttention, .*; or give a part \(cross or decoder\), and it"):
        clover.prune(model, qk=0.3, vo=0.3, calibration=[batch])
    with pytest.raises(
        CloverError,
        match=r"in part 'encoder' that is known: .*SwinAttention.*; it has cross, d",
    ):
        clover.prune(model, qk=0.3, vo=0.3, calibration=[batch], part="encoder")
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="some attention stays as it is: VisionEncoderDecoderModel has attention of"):
        clover.prune(model, qk=0.3, vo=0.3, calibration=[batch], part="decoder")
        prune_folder(tmp_path / "dense", tmp_path / "streamed", qk=0.3, vo=0.3, calibration=[batch], part="decoder")
    assert clover.summary(clover.load(tmp_path / "streamed"))["vo_removed"] > 0.2
    clover.save(model, tmp_path / "model")
    assert torch.equal(outputs(clover.load(tmp_path / "model"), batch), outputs(model, batch))


def test_a_model_without_a_forward_of_its_own() -> None:
    class Silent(t.LlamaPreTrainedModel):
        def __init__(self) -> None:
            inner = build("llama-gqa")[0]
            super().__init__(inner.config)
            self.model = inner.model

    with pytest.raises(CloverError, match="Silent has no forward of its own; give the part of it that reads"):
        clover.prune(Silent(), vo=0.3, calibration=[build("llama-gqa")[1]])


def test_weights_that_are_packed_in_a_tensor_of_their_own() -> None:
    class Packed(torch.Tensor):
        pass

    model, _ = build("llama-gqa")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.data.as_subclass(Packed))
    with pytest.raises(CloverError, match=r"the weight of a projection is a .*; prune before quantising"):
        clover.prune(model, vo=0.3)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_that_no_row_can_describe(kind: str) -> None:
    """By its name, wherever it stands; the reason is in the sentence."""
    model = torch.nn.ModuleDict({"block": type(kind, (torch.nn.Module,), {"__module__": "transformers.models.some"})()})
    with pytest.raises(
        UnsupportedModelError, match=rf"block is of class {kind}, .* exactly: {re.escape(REFUSED[kind])}; choose"
    ):
        blocks(model)
    assert kind not in FAMILIES


def test_refused_classes_of_real_models() -> None:
    model = t.GPTJForCausalLM(t.GPTJConfig(vocab_size=60, n_embd=48, n_layer=1, n_head=6, rotary_dim=4, n_positions=32))
    with pytest.raises(UnsupportedModelError, match=r"GPTJAttention.*table of its rotation"):
        clover.prune(model, vo=0.3)
    model = t.GPTNeoForCausalLM(t.GPTNeoConfig(
        vocab_size=60, hidden_size=48, num_layers=2, num_heads=6, attention_types=[[["global", "local"], 1]],
    ))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.attn is of class GPTNeoAttention.*local layers mask"):
        clover.prune(model, vo=0.3)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("olmo", "clip_qkv", 8.0),
        ("olmoe", "clip_qkv", 8.0),
        ("falcon-mqa", "alibi", True),
        ("bloom", "slow_but_exact", True),
    ],
)
def test_a_setting_with_which_the_row_is_not_true(name: str, setting: str, value: Any) -> None:
    model, _ = build(name)
    setattr(model.config, setting, value)
    with pytest.raises(UnsupportedModelError, match=setting):
        clover.prune(model, vo=0.3)


def test_namesake_from_elsewhere() -> None:
    """A class of one's own that is only called like one of transformers is no known family."""
    model, _ = build("llama-gqa")
    own = type("LlamaAttention", (type(model.model.layers[0].self_attn),), {"__module__": "somewhere"})
    model.model.layers[0].self_attn.__class__ = own
    with pytest.raises(UnsupportedModelError, match="LlamaAttention"):
        clover.prune(model, vo=0.3)


def test_no_attention_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention block of a known class"):
        clover.prune(t.MobileNetV1Model(t.MobileNetV1Config(image_size=32, depth_multiplier=0.25)))


@pytest.mark.parametrize("again", [clover.prune, clover.orthogonalize, clover.inspect])
def test_pruned_twice(again: Callable[[Any], Any]) -> None:
    model, batch = build("llama-gqa")
    clover.prune(model, vo=0.3)
    before, plan = outputs(model, batch), clover.plan_of(model)
    with pytest.raises(CloverError, match=r"self_attn was rewritten by clover before; start from the original model"):
        again(model)
    assert torch.equal(outputs(model, batch), before) and clover.plan_of(model) == plan


def test_never_pruned() -> None:
    with pytest.raises(CloverError, match="was not rewritten by clover; prune or orthogonalize it first"):
        clover.summary(build("gpt2")[0])


def test_quantised_projection() -> None:
    class Linear8bit(nn.Linear):
        """Stands for the classes of quantisers: a Linear whose weight is not its matrix."""

    model, batch = build("llama-gqa")
    model.model.layers[1].self_attn.q_proj.__class__ = Linear8bit
    with refused(
        model,
        batch,
        r"layers\.1\.self_attn: a projection is a .*Linear8bit, not torch.s Linear.*prune before quantising",
    ):
        clover.prune(model, vo=0.3)


def test_adapter_that_is_not_merged() -> None:
    peft = pytest.importorskip("peft")
    model, batch = build("llama-gqa")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    before = outputs(wrapped, batch)
    message = r"self_attn: a projection is a peft.*Linear, not torch.s Linear.*merge adapters first"
    with pytest.raises(CloverError, match=message):
        clover.prune(model, vo=0.3)
    assert torch.equal(outputs(wrapped, batch), before)


# --- parts of models, and what wraps them ---


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip", "vision_model"),
        ("t5", "encoder"),
        ("whisper", "model"),
        ("whisper", "model.encoder"),
        ("bart", "model.decoder"),
        ("llama-gqa", "model"),
        ("llava", "model.language_model"),
    ],
)
def test_a_model_of_which_a_part_was_pruned(name: str, part: str, tmp_path: Path) -> None:
    """Its folder would be loaded with that part drawn at random, or not at all."""
    model, batch = build(name) if name != "llava" else (llava(), None)
    clover.prune(model.get_submodule(part), vo=0.3)
    called = re.escape(part)
    said = rf"only {called} was pruned.*; prune the whole model with part=\.\.\., or save its {called} by itself"
    for attempt in (lambda: clover.save(model, tmp_path / "m"), lambda: clover.summary(model),
                    lambda: clover.plan_of(model)):  # fmt: skip
        with pytest.raises(CloverError, match=said):
            attempt()
    assert not (tmp_path / "m").exists()
    assert clover.summary(model.get_submodule(part))["vo_removed"] > 0.2
    if batch:
        assert outputs(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("name", "part"),
    [("t5", "encoder"), ("whisper", "model.encoder"), ("bart", "model.decoder"), ("bart", "model.encoder")],
)
def test_a_part_without_a_class_at_the_top_of_transformers_is_saved_by_itself(
    name: str, part: str, tmp_path: Path
) -> None:
    model, batch = build(name)
    side = clover.prune(model.get_submodule(part), vo=0.3)
    loaded = clover.load(clover.save(side, tmp_path / "m"))
    assert type(loaded) is type(side)
    torch.save(loaded, tmp_path / "pickled.pt")
    code = "import sys, torch, clover; print(type(torch.load(sys.argv[1], weights_only=False)).__name__)"
    assert python(code, tmp_path / "pickled.pt").stdout.strip() == type(side).__name__
    given = {"input_features": batch["input_features"]} if name == "whisper" else {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        assert torch.equal(loaded(**given)[0], side(**given)[0])


def test_a_class_that_transformers_does_not_have_is_told_as_it_is_saved(tmp_path: Path) -> None:
    class Own(t.LlamaForCausalLM): ...

    model = clover.prune(Own(build("llama-gqa")[0].config), vo=0.3)
    with pytest.warns(UserWarning, match=r"no Own by name"):
        clover.save(model, tmp_path / "own")


def test_a_part_that_was_pruned_is_saved_by_itself(tmp_path: Path) -> None:
    model, batch = build("clip")
    part = clover.prune(model.vision_model, vo=0.3)
    loaded = clover.load(clover.save(part, tmp_path / "m"))
    pixels = {"pixel_values": batch["pixel_values"]}
    torch.testing.assert_close(outputs(loaded, pixels), outputs(part, pixels))


def test_a_part_of_what_was_pruned(tmp_path: Path) -> None:
    model, _ = build("llama-gqa")
    part = clover.prune(model, vo=0.3).model
    for attempt in (lambda: clover.save(part, tmp_path / "m"), lambda: clover.summary(part)):
        with pytest.raises(CloverError, match=r"LlamaModel is a part of a pruned model.*save that model whole"):
            attempt()


def test_a_model_made_from_the_config_of_a_pruned_one(tmp_path: Path) -> None:
    config = clover.prune(build("gpt2")[0], vo=0.3).config
    with pytest.raises(CloverError, match=r"GPT2LMHeadModel has a plan for transformer\.h\.0\.attn, which was not"):
        clover.save(t.GPT2LMHeadModel(config), tmp_path / "m")


def test_wrappers_of_models(tmp_path: Path) -> None:
    """In a process of its own, where nobody checks types before clover does."""
    code = """
import sys, peft, torch, clover
from clover.planning.budget import Share
from clover.errors import warn
from clover.pruning.prune import apply, find_bases, plan_ranks
from families import build
model, _ = build("llama-gqa")
bases = find_bases(model)
plan = plan_ranks(bases, Share(0.0), Share(0.3))
adapted = peft.get_peft_model(build("llama-gqa")[0], peft.LoraConfig(target_modules=["up_proj"], r=2))
verbs = clover.prune, lambda m: apply(m, bases, plan), lambda m: clover.save(m, sys.argv[1]), clover.summary
for wrapper in (torch.compile(model), torch.nn.DataParallel(model), torch.nn.Sequential(model), adapted):
    for verb in verbs:
        try:
            verb(wrapper)
        except clover.CloverError as error:
            print(error)
assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "clover")
assert not any(hasattr(m, "clover") for m in model.modules())
"""
    done = python(code, tmp_path / "out")
    wanted = {
        "OptimizedModule": "its _orig_mod, and compile what comes out",
        "DataParallel": "its module",
        "Sequential": "the model of transformers itself",
        "PeftModel": "what its merge_and_unload() returns",
    }
    said = [f"{kind} is no model of transformers; give {instead}" for kind, instead in wanted.items()]
    assert done.stdout.splitlines() == [sentence for sentence in said for _ in range(4)], done.stderr[-3000:]
    assert not list(tmp_path.iterdir())


# --- plans ---

GROUP = Group((0,), 4, 0, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"groups": (replace(GROUP, value=0),)}, "is impossible"),
        ({"groups": (replace(GROUP, value=9),)}, "is impossible"),
        ({"groups": (replace(GROUP, heads=(0, 0)),)}, "is impossible"),
        ({"groups": (replace(GROUP, heads=(-1,)),)}, "is impossible"),
        ({"groups": (replace(GROUP, heads=(2,)),)}, "is impossible"),
        ({"groups": (replace(GROUP, heads=()),)}, "is impossible"),
        ({"groups": ()}, "is impossible"),
        ({"groups": (replace(GROUP, pairs=3, plain=2),)}, "keeps 3 pairs and 2 other .*, which has 4 and 0"),
        (
            {"vo": 16, "groups": (replace(GROUP, value=12),)},
            "heads of 8 and 16, but the model has 2 x 3 of 8 and 8",
        ),
        ({"kv_heads": 3}, "is for 3 x 3 heads"),
        ({"part": "encoder"}, "in part 'encoder', but it is in part 'decoder'"),
        ({"output_bias": True}, "has output_bias True"),
        ({"name": "model.layers.7.self_attn"}, "other blocks"),
    ],
)
def test_a_plan_that_is_wrong(changed: dict[str, Any], said: str) -> None:
    """Made by hand, say: it is found out before the cut."""
    model, batch = build("llama-gqa")
    bases = pruning.find_bases(model)
    plan = pruning.plan_ranks(bases, Share(0.0), Share(0.3))
    wrong = Plan((plan.blocks[0], replace(plan.blocks[1], **changed)))
    with refused(model, batch, f"{said}.*; make it"):
        pruning.apply(model, bases, wrong)


def test_a_plan_without_blocks() -> None:
    model, batch = build("llama-gqa")
    with refused(model, batch, "the clover plan has no blocks; make it"):
        pruning.apply(model, [], Plan(()))


def test_a_plan_that_cuts_what_a_norm_fixes() -> None:
    model, batch = build("qwen3")
    bases = pruning.find_bases(model)
    plan = pruning.plan_ranks(bases, Share(0.0), Share(0.3))
    first = plan.blocks[0].groups[0]
    wrong = replace(plan.blocks[0], groups=(replace(first, pairs=first.pairs - 1),))
    with refused(model, batch, "keeps 7 pairs .* has 8 and 0, none of which can go; make it"):
        pruning.apply(model, bases, Plan((wrong, *plan.blocks[1:])))


def test_an_attention_module_under_two_names() -> None:
    model, _ = build("llama-gqa")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match=r"it is also model\.layers\.1\.self_attn"):
        clover.prune(model, vo=0.3)


def test_a_model_that_was_compiled_before() -> None:
    model, _ = build("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, at its first import of the compiler
        model.compile()
    with pytest.raises(CloverError, match="was compiled; compile what comes out"):
        clover.prune(model, vo=0.3)
