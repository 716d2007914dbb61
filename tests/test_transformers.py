"""What users of transformers do with a model beside generating: pickle it, train it, load it anew, keep caches."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as t
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

import clover
from clover.attention.attention import CloverAttention
from clover.errors import CloverError
from clover.planning.budget import Share
from clover.pruning.classes import config_class
from clover.pruning.prune import apply, find_bases, plan_ranks
from commands import run
from families import build, outputs, pruned
from tiny import LM

KINDS = ["llama-gqa", "qwen3", "bert", "t5", "whisper", "bloom"]


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_model_can_be_pickled(name: str) -> None:
    model, batch = pruned(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is type(model) and type(again.config) is type(model.config)
    assert torch.equal(outputs(again, batch), outputs(model, batch))
    assert torch.equal(outputs(copy.deepcopy(model), batch), outputs(model, batch))


def borrowed() -> Any:
    """A model whose class belongs to another family's config."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = t.InternLM3Config(**LM | {"num_key_value_heads": 2, "head_dim": 12} | tokens)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    assert not isinstance(config, type(model).config_class)
    return model


def test_a_class_that_serves_another_familys_config(tmp_path: Path) -> None:
    model, batch = borrowed(), {"input_ids": torch.arange(9)[None]}
    model.save_pretrained(tmp_path / "whole")
    clover.prune_folder(tmp_path / "whole", tmp_path / "streamed", qk=0.25, vo=0.25)
    clover.save(clover.prune(model, qk=0.25, vo=0.25), tmp_path / "pruned")
    want = outputs(model, batch)
    for again in (
        clover.load(tmp_path / "pruned"),
        clover.load(tmp_path / "streamed"),
        t.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"),
        pickle.loads(pickle.dumps(model)),
    ):
        assert type(again) is type(model) and type(again.config) is type(model.config)
        assert torch.equal(outputs(again, batch), want)


def test_who_asks_where_foreign_code_is_learns_that_there_is_none(tmp_path: Path) -> None:
    clover.save(pruned("llama-gqa")[0], tmp_path / "model")
    config = t.AutoConfig.from_pretrained(tmp_path / "model")
    assert not config.auto_map and "auto_map" not in (tmp_path / "model" / "config.json").read_text()


class OfTheirOwn(t.LlamaForCausalLM):
    """As people make one for code that lies beside its weights."""


def test_a_class_that_would_be_saved_as_code_is_not(tmp_path: Path) -> None:
    OfTheirOwn.register_for_auto_class("AutoModelForCausalLM")
    model = OfTheirOwn(t.LlamaConfig(**LM)).eval()
    clover.prune(model, qk=0.25, vo=0.25)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()


def test_a_config_that_an_auto_class_knows_by_a_class_that_is_not_there() -> None:
    assert issubclass(config_class(t.VoxtralRealtimeTextConfig), t.VoxtralRealtimeTextConfig)


def test_names_that_no_class_has() -> None:
    with pytest.raises(AttributeError):
        pickle.loads(b"cclover.pruning.classes\nCloverNothing\n.")


def test_a_layer_keeps_the_original_class_among_its_own() -> None:
    model, _ = pruned("llama-gqa")
    layers = [m for m in model.modules() if isinstance(m, CloverAttention)]
    assert len({type(layer) for layer in layers}) == 1
    assert all(isinstance(layer, t.models.llama.modeling_llama.LlamaAttention) for layer in layers)


def test_the_trainer_shifts_labels_for_label_smoothing(tmp_path: Path) -> None:
    """transformers' Trainer knows causal models by the name of their class."""
    losses = []
    for model, batch in (build("llama-gqa", torch.float32), build("llama-gqa", torch.float32)):
        if losses:
            clover.orthogonalize(model)
        data = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
        arguments = t.TrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True, eval_strategy="no"
        )
        losses.append(t.Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_trainer_goes_on_with_a_pruned_model(tmp_path: Path) -> None:
    """It reads the config of its checkpoint by the base class of configs, which builds no model."""
    data = [{"input_ids": row, "labels": row} for row in pruned("llama-gqa")[1]["input_ids"]]

    def train(steps: int, **kwargs: Any) -> Any:
        model = pruned("llama-gqa", dtype=torch.float32)[0]
        arguments = t.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
        )
        return model, t.Trainer(model, arguments, train_dataset=data).train(**kwargs)

    train(2)
    resumed, done = train(4, resume_from_checkpoint=True)
    assert done.global_step == 4
    whole, _ = train(4)
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    folder = tmp_path / "checkpoint-2"
    assert t.PreTrainedConfig.from_pretrained(folder).transformers_version == t.__version__
    with pytest.raises(ValueError, match="import clover"):
        t.LlamaForCausalLM.from_pretrained(folder)


def test_a_new_head_is_welcome_where_the_user_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = t.BertForSequenceClassification(t.BertConfig(**LM, num_labels=2)).eval()
    clover.prune(model, vo=0.3, calibration=[{"input_ids": torch.randint(3, 60, (2, 9))}])
    clover.save(model, tmp_path / "m")
    options: dict[str, Any] = {"num_labels": 5}
    with pytest.raises(CloverError, match=r"classifier\.\w+ has shape \(2"):
        t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", **options)
    again = t.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", ignore_mismatched_sizes=True, **options
    )
    assert again.classifier.out_features == 5
    assert torch.equal(again.bert.encoder.layer[0].attention.self.qkv_proj.weight,
                       model.bert.encoder.layer[0].attention.self.qkv_proj.weight)  # fmt: skip


def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    model, batch = pruned("llama-gqa")
    ids = batch["input_ids"]
    with torch.inference_mode():
        past = model(input_ids=ids[:, :7], use_cache=True).past_key_values
    with torch.no_grad():
        found = model(input_ids=ids[:, 7:], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits[:, 7:])


def test_prefill_in_chunks_into_a_static_cache() -> None:
    model, batch = pruned("llama-gqa", dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**batch, **options)
    chunked = model.generate(
        **batch, **options, cache_implementation="static", prefill_chunk_size=5, disable_compile=True
    )
    assert torch.equal(plain, chunked)


def test_token_by_token_behind_padding() -> None:
    """A query that sees nothing at all must not poison the cache of those after it."""
    model, batch = pruned("llama-gqa")
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    past, logits = t.DynamicCache(config=model.config), []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            positions = (mask[:, : at + 1].cumsum(-1) - 1).clamp_min(0)[:, -1:]
            out = model(input_ids=ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=past,
                        position_ids=positions)  # fmt: skip
            logits.append(out.logits)
        alone = model(input_ids=ids[:1, 3:]).logits
    assert torch.cat(logits, 1).isfinite().all()
    torch.testing.assert_close(torch.cat(logits, 1)[:1, 3:], alone, atol=1e-4, rtol=1e-4)


def test_gradients_reach_a_single_new_token_behind_a_long_context() -> None:
    model, _ = pruned("llama-gqa")
    model.config.max_position_embeddings = 1024
    with torch.no_grad():
        past = model(input_ids=torch.randint(3, 60, (1, 600)), use_cache=True).past_key_values
    states = torch.randn(1, 1, 48, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=states, past_key_values=past).logits.sum().backward()
    assert states.grad is not None and states.grad.isfinite().all()


def test_a_flash_mask_arrives_as_it_is() -> None:
    """It says which tokens are padding, ``(batch, tokens)``, and knows no heads."""
    model, batch = pruned("llama-gqa")
    seen: list[Any] = []

    def kernel(module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, mask: Any, **_: Any) -> Any:
        seen.append(mask)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    t.AttentionInterface.register("told", kernel)
    AttentionMaskInterface.register("told", flash_attention_mask)
    model.config._attn_implementation = "told"
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    with torch.no_grad():
        model(**batch, attention_mask=mask)
    assert seen and all(torch.equal(m, mask.bool()) or torch.equal(m, mask) for m in seen)


def test_what_has_no_place_for_a_bias_by_head() -> None:
    model, _ = pruned("t5", dtype=torch.float32)
    attention = next(m for m in model.modules() if isinstance(m, CloverAttention))
    with pytest.raises(CloverError, match=r"sdpa has no place for a bias by head.*set attn_implementation to sdpa"):
        attention._mask(object(), torch.zeros(1, 4, 1, 1), 1, 1)  # type: ignore[arg-type]


def test_a_paged_cache_is_refused() -> None:
    model, _ = pruned("llama-gqa")
    attention = next(m for m in model.modules() if isinstance(m, CloverAttention))
    with pytest.raises(CloverError, match="paged cache"):
        attention(torch.zeros(1, 2, 48), cache=object())


def test_batches_of_requests_are_refused_at_once() -> None:
    model, _ = pruned("llama-gqa", dtype=torch.float32)
    with pytest.raises(CloverError, match="use generate"):
        model.generate_batch([[1, 2, 3]], generation_config=model.generation_config)


def test_a_cache_of_other_heads_is_refused() -> None:
    model, batch = pruned("llama-gqa", dtype=torch.float32)
    dense, _ = build("llama-gqa", torch.float32)
    cache = dense(**batch, use_cache=True).past_key_values
    with pytest.raises(CloverError, match=r"keys of 2 heads.*prefix tuning"):
        model(**batch, past_key_values=cache)


def test_experts_are_computed_as_in_the_original_class(tmp_path: Path) -> None:
    """Transformers looks for what tells in the module of the class, and its class of ours is made here."""
    clover.save(pruned("mixtral", dtype=torch.float32)[0], tmp_path / "m")
    code = (
        "import clover, sys; m = clover.load(sys.argv[1]); print(m.config._experts_implementation); "
        "m.set_experts_implementation('batched_mm')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == build("mixtral", torch.float32)[0].config._experts_implementation


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_hook_can_be_taken_off_after_pruning() -> None:
    model, batch = build("llama-gqa", torch.float32)
    attention, seen = model.model.layers[0].self_attn, []
    handles = [
        attention.register_forward_hook(lambda *_: seen.append("forward"), always_call=True),
        attention.register_full_backward_pre_hook(lambda *_: seen.append("backward")),
    ]
    clover.prune(model, qk=0.3, vo=0.3)
    model(**batch).logits.sum().backward()
    assert seen == ["forward", "backward"]
    for handle in handles:
        handle.remove()
    model(**batch).logits.sum().backward()
    assert seen == ["forward", "backward"]


def test_times_of_words_without_heads_that_are_gone() -> None:
    model, _ = build("whisper", torch.float32)
    model.generation_config.alignment_heads = [[0, 0], [0, 1], [1, 0]]
    bases = find_bases(model, part="cross")
    plan = plan_ranks(bases, Share(0), Share(0))
    first = plan.blocks[0]
    left = tuple(replace(group, heads=tuple(h for h in group.heads if h)) for group in first.groups)
    apply(model, bases, replace(plan, blocks=(replace(first, groups=left), *plan.blocks[1:])))
    assert model.generation_config.alignment_heads == [[0, 1], [1, 0]]


def test_devices_that_share_a_model_have_rewritten_blocks_whole(tmp_path: Path) -> None:
    model, _ = pruned("llama-gqa")
    again = clover.load(clover.save(model, tmp_path / "m"))
    plan: Any = again._tp_plan
    assert any("mlp" in name for name in plan) and not any("self_attn" in name for name in plan)


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize(
    ("name", "dtype", "wide"),
    [("t5", torch.float16, "wo.weight"), ("glm4-moe", torch.bfloat16, "e_score_correction_bias")],
)
def test_tensors_that_stay_wide(name: str, dtype: torch.dtype, wide: str, tmp_path: Path) -> None:
    """transformers leaves them in float32 in a narrow model; whichever way it is pruned, they come out as they were."""
    model = build(name, torch.float32)[0]
    narrow = {key: value if key.endswith(wide) else value.to(dtype) for key, value in model.state_dict().items()}
    model.to(dtype).save_pretrained(tmp_path / "dense", state_dict=narrow)
    dense = safetensors.torch.load_file(tmp_path / "dense" / "model.safetensors")
    dtypes = {}
    for out in (["whole"], ["streamed", "--stream"]):
        assert run("prune", tmp_path / "dense", tmp_path / out[0], "--vo", 0.3, *out[1:]).code == 0
        found = safetensors.torch.load_file(tmp_path / out[0] / "model.safetensors")
        assert all(value.equal(dense[key]) for key, value in found.items() if key.endswith(wide))
        dtypes[out[0]] = {key: value.dtype for key, value in found.items()}
    assert dtypes["whole"].items() <= dtypes["streamed"].items()  # which copies a tied tensor as often as it is there
    assert set(dtypes["whole"].values()) - {torch.int64} == {dtype, torch.float32}
    loaded = clover.load(tmp_path / "whole").state_dict()
    assert {value.dtype for key, value in loaded.items() if key.endswith(wide)} == {torch.float32}


def test_a_generation_config_that_transformers_would_not_let_anyone_change_is_saved(tmp_path: Path) -> None:
    model, _ = build("whisper", torch.float32)
    model.generation_config.alignment_heads = [[0, 0]]
    file = tmp_path / "told" / "generation_config.json"
    model.generation_config.save_pretrained(file.parent)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.5}))
    model.generation_config = t.GenerationConfig.from_pretrained(file.parent)
    clover.prune(model, vo=0.3, part="cross")
    clover.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / file.name).read_text())["temperature"] == 0.5
