"""Tiny random models of every family: whole models, two or three layers, built without a download."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as t

import clover


def _text(vocab: int = 60, length: int = 12) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, vocab, (2, length))}


def _image(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 60, (2, 7))}


_LM = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def _rope(partial: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}}


def _llama(**kwargs: Any) -> t.LlamaForCausalLM:
    return t.LlamaForCausalLM(t.LlamaConfig(**_LM, **kwargs))


def _gpt2() -> t.GPT2LMHeadModel:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=6, n_positions=128, **_ENDS))


def _opt() -> t.OPTForCausalLM:
    return t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=60,
            hidden_size=48,
            word_embed_proj_dim=48,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=128,
            pad_token_id=0,
            **_ENDS,
        )
    )


def _bloom() -> t.BloomForCausalLM:
    return t.BloomForCausalLM(
        t.BloomConfig(vocab_size=60, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0, **_ENDS)
    )


def _clip() -> t.CLIPModel:
    text, vision = _LM | {"projection_dim": 16}, _VISION | {"projection_dim": 16}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _whisper() -> t.WhisperForConditionalGeneration:
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=60,
            num_mel_bins=8,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=20,
            max_target_positions=64,
            pad_token_id=0,
            **_ENDS,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "llama-gqa": (lambda: _llama(num_key_value_heads=2), _text),
    "llama-mqa-bias": (lambda: _llama(num_key_value_heads=1, attention_bias=True), _text),
    "llama-mha": (lambda: _llama(num_key_value_heads=6, head_dim=16), _text),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**_LM, num_key_value_heads=2, sliding_window=8)), _text),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_LM, num_key_value_heads=2)), _text),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_LM, num_key_value_heads=2, head_dim=16)), _text),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LM, num_key_value_heads=2)), _text),
    "phi3-partial": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LM, num_key_value_heads=2, **_rope(0.5))), _text),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_LM, **_rope(0.25))), _text),
    "gpt2": (_gpt2, _text),
    "opt": (_opt, _text),
    "bloom": (_bloom, _text),
    "bert": (lambda: t.BertModel(t.BertConfig(**_LM)), _text),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**_LM)), _text),
    "vit": (lambda: t.ViTModel(t.ViTConfig(**_VISION)), _image),
    "clip": (_clip, lambda: _text() | _image()),
    "whisper": (_whisper, _speech),
}

GENERATIVE = [n for n in CASES if n not in ("bert", "roberta", "vit", "clip", "whisper")]


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with all weights random (biases and norms too, which transformers starts at 0 and 1), and its batch."""
    torch.manual_seed(0)
    make, batch = CASES[name]
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    model.to(dtype)  # only now: a draw depends on the dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    return model, inputs


def pruned(name: str, share: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same model with a share of Q-K and V-O removed, calibrated on the same batch."""
    model, batch = build(name, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Q-K of . of . blocks stays whole")  # qwen3 says so, and has a test for it
        clover.prune(model, qk=share, vo=share, calibration=[batch])
    return model, batch


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that the model computes from the batch, flat."""
    with torch.no_grad():
        out = model(**batch)
    wanted = [out[k] for k in ("logits", "last_hidden_state", "text_embeds", "image_embeds") if k in out]
    return torch.cat([x.flatten() for x in wanted])
