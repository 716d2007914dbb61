"""Tiny random models of every family: whole models, two or three layers, built without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t


def _text(vocab: int = 60, length: int = 12) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, vocab, (2, length))}


def _image(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 60, (2, 7))}


_LM = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
       "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def _clip() -> t.CLIPModel:
    return t.CLIPModel(t.CLIPConfig(text_config=_LM | {"projection_dim": 16}, vision_config=_VISION | {"projection_dim": 16}, projection_dim=16))


def _whisper() -> t.WhisperForConditionalGeneration:
    return t.WhisperForConditionalGeneration(t.WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=20, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None))  # fmt: skip


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "llama-gqa": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LM, num_key_value_heads=2)), _text),
    "llama-mqa-bias": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LM, num_key_value_heads=1, attention_bias=True)), _text),
    "llama-mha": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**_LM, num_key_value_heads=6, head_dim=16)), _text),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**_LM, num_key_value_heads=2, sliding_window=8)), _text),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_LM, num_key_value_heads=2)), _text),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_LM, num_key_value_heads=2, head_dim=16)), _text),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LM, num_key_value_heads=2)), _text),
    "phi3-partial": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**_LM, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})), _text),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_LM, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25})), _text),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=6, n_positions=128, bos_token_id=1, eos_token_id=2)), _text),
    "opt": (lambda: t.OPTForCausalLM(t.OPTConfig(vocab_size=60, hidden_size=48, word_embed_proj_dim=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)), _text),
    "bloom": (lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=60, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)), _text),
    "bert": (lambda: t.BertModel(t.BertConfig(**_LM)), _text),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**_LM)), _text),
    "vit": (lambda: t.ViTModel(t.ViTConfig(**_VISION)), _image),
    "clip": (_clip, lambda: _text() | _image()),
    "whisper": (_whisper, _speech),
}  # fmt: skip

GENERATIVE = [n for n in CASES if n not in ("bert", "roberta", "vit", "clip", "whisper")]


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with every weight random (biases and norms too, which transformers starts at 0 and 1), and a batch for it."""
    torch.manual_seed(0)
    make, batch = CASES[name]
    model = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    return model, inputs


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that the model computes from the batch, flat."""
    with torch.no_grad():
        out = model(**batch)
    wanted = [out[k] for k in ("logits", "last_hidden_state", "text_embeds", "image_embeds") if k in out]
    return torch.cat([x.flatten() for x in wanted])
