"""Sizes are counted on the tensors themselves, and rival models take turns on the clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

import clover
from clover.errors import CloverError, UnsupportedModelError
from clover.measure import cost
from clover.runtimes.graphs import graphs
from families import CASES, COPIES, build
from families import pruned as pruned_case
from tiny import LM, VISION, llava

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options: Any) -> t.LlamaForCausalLM:
    config = TINY | {"vocab_size": 60, "max_position_embeddings": 32, "num_key_value_heads": 1} | options
    return t.LlamaForCausalLM(t.LlamaConfig(**config)).eval()


def bert() -> t.BertModel:
    return t.BertModel(t.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY)).eval()


def vit() -> t.ViTModel:
    return t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **TINY)).eval()


def clip() -> t.CLIPModel:
    text = TINY | {"vocab_size": 60, "max_position_embeddings": 20}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=TINY | {"image_size": 16, "patch_size": 8})).eval()


def whisper() -> t.WhisperForConditionalGeneration:
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 16}
    tiny = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()}
    sizes = {"vocab_size": 60, "num_mel_bins": 8, "d_model": 16, "max_source_positions": 20, "max_target_positions": 24}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**tiny, **sizes, **tokens)).eval()


def test_sizes_follow_the_arithmetic() -> None:
    attention = 2 * (16 * 16 * 2 + 16 * 8 * 2)  # two layers of q, o and of k, v with one of two heads
    rest = 60 * 16 + 2 * (3 * 16 * 16 + 2 * 16) + 16
    assert cost.sizes(llama(tie_word_embeddings=True)) == {
        "parameters": attention + rest,
        "bytes": 4 * (attention + rest),
        "kv_bytes_per_token": 2 * 2 * 8 * 4,
    }
    untied = cost.sizes(llama(tie_word_embeddings=False).half())
    assert untied["parameters"] == attention + rest + 60 * 16
    assert untied["kv_bytes_per_token"] == 2 * 2 * 8 * 2


def test_cache_of_a_decoder_beside_an_encoder_and_of_none() -> None:
    assert cost.sizes(whisper())["kv_bytes_per_token"] == 2 * 2 * 16 * 4  # cross-attention doesn't grow
    assert cost.sizes(bert())["kv_bytes_per_token"] is None


def test_throughput_of_a_language_model() -> None:
    speed = cost.compare_throughput({"model": llama()}, context=8, new_tokens=2, batch=2, repeats=2)["model"]
    assert set(speed) == {"prefill_tokens_per_second", "decode_tokens_per_second"} and min(speed.values()) > 0


@pytest.mark.parametrize("model", [bert, vit, clip, whisper])
def test_throughput_of_an_encoder(model: Any) -> None:
    speed = cost.compare_throughput({"model": model()}, context=32, batch=2, repeats=1)["model"]
    assert set(speed) == {"items_per_second"} and speed["items_per_second"] > 0


def test_own_inputs() -> None:
    inputs = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    speed = cost.compare_throughput({"model": bert()}, inputs=inputs, repeats=1)["model"]
    assert speed["items_per_second"] > 0


def test_models_take_turns_and_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    models, order = {"dense": llama(), "pruned": llama()}, []
    seconds = {"dense": iter([9.0, 1.0, 2.0, 6.0]), "pruned": iter([0.01, 1.0, 0.5, 0.1])}

    def rates(model: Any, inputs: Any, new_tokens: int) -> dict[str, float]:
        name = next(n for n, m in models.items() if m is model)
        order.append(name)
        return {"items_per_second": 1 / next(seconds[name])}

    monkeypatch.setattr(cost, "_rates", rates)
    result = cost.compare_throughput(models, context=8, new_tokens=2, repeats=3)
    assert order == ["pruned", "dense", "dense", "pruned", "pruned", "dense", "dense", "pruned"]
    assert result["dense"] == {"items_per_second": 0.5} and result["pruned"] == {"items_per_second": 2.0}
    assert result["ratio"] == {"pruned": {"items_per_second": 4.0}}


@pytest.mark.parametrize("options", [{"repeats": 0}, {"batch": 0}, {"context": 31, "new_tokens": 2}])
def test_impossible_measurements(options: dict[str, int]) -> None:
    with pytest.raises(CloverError, match=r"must be at least 1|exceed the 32 positions"):
        cost.compare_throughput({"model": llama()}, **options)


def test_a_spectrogram_is_an_image_of_the_config_s_size() -> None:
    config = t.ASTConfig(**TINY, max_length=32)
    speed = cost.compare_throughput({"model": t.ASTModel(config).eval()}, repeats=1)["model"]
    assert speed["items_per_second"] > 0


def test_sound_in_a_form_that_is_not_known() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    model = t.Speech2TextForConditionalGeneration(t.Speech2TextConfig(**sizes))
    with pytest.raises(CloverError, match="Speech2TextForConditionalGeneration reads as sound has a form"):
        cost.random_inputs(model, 1, 8)


def test_a_pruned_model_is_counted_and_timed_beside_the_dense_one() -> None:
    dense, pruned = llama(), clover.prune(llama(), qk=0.5, vo=0.5, metric="weights")
    before, after = cost.sizes(dense), cost.sizes(pruned)
    assert after["kv_bytes_per_token"] == before["kv_bytes_per_token"] / 2
    speed = cost.compare_throughput({"dense": dense, "pruned": pruned}, context=8, new_tokens=2, repeats=1)
    assert speed["ratio"]["pruned"].keys() == speed["dense"].keys()


@pytest.mark.parametrize("name", ["lfm2", "falcon-h1"])
def test_models_that_keep_a_state_beside_their_cache(name: str) -> None:
    model = pruned_case(name, dtype=torch.float32)[0]
    assert cost.sizes(model)["kv_bytes_per_token"] == 4 * sum(
        b.qk_kept + b.vo_kept for b in clover.plan_of(model).blocks
    )
    for decode_only in (True, False):
        options = {"context": 8, "new_tokens": 2, "batch": 2, "repeats": 2, "decode_only": decode_only}
        assert cost.compare_throughput({"pruned": model}, **options)["pruned"]["decode_tokens_per_second"] > 0
    with pytest.raises(UnsupportedModelError, match=r"LinearAttention.*Layer, whose state a graph"):
        graphs(model)


UNKNOWN = {
    **dict.fromkeys(("glm-asr", "lasr", "speech2text"), "reads as sound has a form that isn't known"),
    "pix2struct": "reads flattened_patches",
    "decision-transformer": "reads states, actions",
    "videomae": "and its inputs don't go together",
    **dict.fromkeys(("blip", "blip2", "instructblip", "mllama-vision"), "and its inputs don't go together"),
}
"""Cases whose inputs can't be made up, and what is said of them."""


@pytest.mark.parametrize("name", CASES | COPIES)
def test_every_family_is_counted_and_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SAMPLES", 1600)
    model, _ = build(name, torch.float32)
    options = {"context": 8, "new_tokens": 2, "batch": 2, "repeats": 1}
    if name in UNKNOWN:
        with pytest.raises(CloverError, match=UNKNOWN[name]):
            cost.compare_throughput({"model": model}, **options)
        return
    if name == "dia":  # a token of its decoder is one of several channels
        with pytest.raises(CloverError, match="DiaDecoder and its inputs don't go together"):
            cost.sizes(model)
        return
    cache = cost.sizes(model)["kv_bytes_per_token"]
    assert (cache or 0) > 0 if model.can_generate() else cache is None
    assert {len(value) for value in cost.random_inputs(model, 2, 8).values()} == {2}
    assert min(cost.compare_throughput({"model": model}, **options)["model"].values()) > 0


def composite(kind: Any, encoder: Any, decoder: Any) -> Any:
    config = getattr(t, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
    return getattr(t, f"{kind}Model")(config).eval()


@pytest.mark.parametrize(
    "model",
    [
        lambda: composite(
            "VisionEncoderDecoder", t.ViTConfig(**VISION), t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60)
        ),
        lambda: composite("EncoderDecoder", t.BertConfig(**LM), t.BertConfig(**LM | {"hidden_size": 24})),
        lambda: composite(
            "VisionEncoderDecoder",
            t.ViTConfig(**VISION),
            t.TrOCRConfig(
                vocab_size=60, d_model=32, cross_attention_hidden_size=48, decoder_layers=2, decoder_attention_heads=2
            ),
        ),
    ],
)
def test_an_encoder_and_a_decoder_of_other_widths(model: Any) -> None:
    made = model()
    assert cost.sizes(made)["kv_bytes_per_token"] == 2 * 2 * 4 * made.decoder.config.hidden_size
    assert cost.compare_throughput({"model": made}, context=8, repeats=1)["model"]["items_per_second"] > 0


def test_a_language_model_without_a_cache_of_keys() -> None:
    model = t.MambaForCausalLM(t.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)).eval()
    assert cost.sizes(model)["kv_bytes_per_token"] is None
    with pytest.raises(CloverError, match=r"MambaForCausalLM and its inputs don't go together .*; pass inputs"):
        cost.compare_throughput({"model": model}, context=8, new_tokens=2, repeats=1)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: llava().model, r"LlavaModel and its inputs don't go together \(Image features .*\); pass inputs"),
        (lambda: t.VideoMAEModel(t.VideoMAEConfig(**VISION)), r"VideoMAEModel and its inputs .*expected 5, got 4"),
        (lambda: t.ResNetModel(t.ResNetConfig()), "config of ResNetModel sets no size of images; take a part of it"),
    ],
)
def test_inputs_that_cannot_be_made_up(model: Any, said: str) -> None:
    with pytest.raises(CloverError, match=said):
        cost.compare_throughput({"model": model().eval()}, context=8, repeats=1)


def test_only_a_language_model_is_timed_writing_alone() -> None:
    with pytest.raises(CloverError, match="decode_only is set, but BertModel is no causal language model"):
        cost.compare_throughput({"model": bert()}, context=8, decode_only=True)
