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


def _heard() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 40, 8), "decoder_input_ids": torch.randint(3, 60, (2, 7))}


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


def _seq2seq(kind: str, **kwargs: Any) -> Any:
    """An encoder-decoder with the configuration names of BART."""
    sizes: dict[str, Any] = {"d_model": 48, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64}
    config = getattr(t, f"{kind}Config")(**(sizes | _ENDS | {"vocab_size": 60} | kwargs))
    return getattr(t, _MODELS.get(kind, f"{kind}ForConditionalGeneration"))(config)


_MODELS = {"Marian": "MarianMTModel"}


def _whisper() -> t.WhisperForConditionalGeneration:
    return _seq2seq(
        "Whisper",
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _t5(kind: str) -> Any:
    sizes = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    return getattr(t, f"{kind}ForConditionalGeneration")(getattr(t, f"{kind}Config")(**sizes, **ends, **buckets))


def _causal(kind: str, **kwargs: Any) -> Any:
    """A language model with the configuration names of Llama."""
    return getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**(_LM | {"num_key_value_heads": 2} | kwargs)))


def _gemma(kind: str, **kwargs: Any) -> Any:
    made: dict[str, Any] = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8, "layer_types": _LAYERS}
    return _causal(kind, **(made | {"query_pre_attn_scalar": 24} | kwargs))


def _moe(kind: str, **kwargs: Any) -> Any:
    names = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _causal(kind, **names, **kwargs)


def _encoder(kind: str, **kwargs: Any) -> Any:
    return getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**(_LM | kwargs)))


def _vision(kind: str, **kwargs: Any) -> Any:
    return getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**(_VISION | kwargs)))


def _gemma3_image() -> t.Gemma3ForConditionalGeneration:
    """A SigLIP tower in front of a Gemma 3; token 55 stands for a piece of the image."""
    tokens = {"image_token_id": 55, "boi_token_id": 56, "eoi_token_id": 57, "mm_tokens_per_image": 4}
    parts = {"text_config": _LM | _GEMMA3, "vision_config": dict(_VISION)}
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(**parts, **tokens))


def _described() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 12))
    ids[:, 2:6] = 55
    return {"input_ids": ids, "token_type_ids": (ids == 55).long(), **_image()}


def _pictured() -> dict[str, torch.Tensor]:
    """The same for models that take several images a sequence."""
    batch = _described()
    return {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"].unsqueeze(1)}


def _siglip() -> t.SiglipModel:
    text = {k: _LM[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 6, "max_position_embeddings": 32, "pad_token_id": 0, "projection_size": 48}
    return t.SiglipModel(t.SiglipConfig(text_config=text | _ENDS, vision_config=_VISION))


def _wav2vec(kind: str) -> Any:
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "feat_extract_norm": "layer"}
    # Four groups of twelve channels are what PyTorch's convolution gets wrong in bfloat16 on CPUs.
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return _encoder(kind, num_attention_heads=4, apply_spec_augment=False, layerdrop=0.0, **sizes, **positions)


def _falcon(**kwargs: Any) -> t.FalconForCausalLM:
    return t.FalconForCausalLM(t.FalconConfig(**_LM, **kwargs))


def _smolvlm(kind: str) -> Any:
    """A vision tower in front of a Llama."""
    text = {"model_type": "llama", **_LM, "num_key_value_heads": 2}
    parts = {"text_config": text, "vision_config": _VISION | {"patch_size": 8}, "scale_factor": 2}
    config = getattr(t, f"{kind}Config")(**parts, image_token_id=55, pad_token_id=0)
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


def _bigcode(**kwargs: Any) -> t.GPTBigCodeForCausalLM:
    sizes = {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
    return t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**sizes, **_ENDS, **kwargs))


def _switch() -> t.SwitchTransformersForConditionalGeneration:
    sizes = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    more = {"num_heads": 4, "num_experts": 2, "relative_attention_num_buckets": 8}
    return t.SwitchTransformersForConditionalGeneration(t.SwitchTransformersConfig(**sizes, **ends, **more))


def _ast() -> t.ASTModel:
    sizes = {k: v for k, v in _VISION.items() if k != "image_size"}
    clip = {"num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8}
    return t.ASTModel(t.ASTConfig(**sizes, **clip))


def _metaclip2() -> t.MetaClip2Model:
    text, vision = _LM | {"projection_dim": 16}, _VISION | {"projection_dim": 16}
    return t.MetaClip2Model(t.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=16))


def _wave() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 400)}


def _pair() -> dict[str, torch.Tensor]:
    return _text() | {"decoder_input_ids": torch.randint(3, 60, (2, 7))}


_LAYERS = ["sliding_attention", "full_attention"]

_GEMMA3 = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": _LAYERS,
    "query_pre_attn_scalar": 24,
}

_ROUTED = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}

Case = tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]

CASES: dict[str, Case] = {
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
    "olmo2": (lambda: _causal("Olmo2"), _text),
    "starcoder2": (lambda: _causal("Starcoder2", residual_dropout=0.1), _text),
    "phi": (lambda: _causal("Phi", **_rope(0.5)), _text),
    "phi-norm": (lambda: _causal("Phi", qk_layernorm=True, **_rope(0.5)), _text),
    "gemma2": (lambda: _gemma("Gemma2", attn_logit_softcapping=2.0), _text),
    "gemma3": (lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_LM, **_GEMMA3)), _text),
    "smollm3": (lambda: _causal("SmolLM3", no_rope_layers=[1, 0]), _text),
    "cohere": (lambda: _causal("Cohere"), _text),
    "cohere-norm": (lambda: _causal("Cohere", use_qk_norm=True), _text),
    "cohere2": (lambda: _causal("Cohere2", sliding_window=8, layer_types=_LAYERS), _text),
    "glm": (lambda: _causal("Glm", head_dim=16, attention_bias=True, **_rope(0.5)), _text),
    "falcon-mha": (lambda: _falcon(multi_query=False, bias=True), _text),
    "falcon-mqa": (lambda: _falcon(), _text),
    "falcon-gqa": (lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2), _text),
    "gpt-oss": (lambda: _moe("GptOss", head_dim=16, sliding_window=8, layer_types=_LAYERS), _text),
    "mixtral": (lambda: _moe("Mixtral"), _text),
    "qwen3-moe": (lambda: _moe("Qwen3Moe", head_dim=16), _text),
    "stablelm": (lambda: _causal("StableLm", partial_rotary_factor=0.5), _text),
    "gpt-bigcode": (lambda: _bigcode(), _text),
    "gpt-bigcode-mha": (lambda: _bigcode(multi_query=False), _text),
    "bart": (lambda: _seq2seq("Bart"), _pair),
    "t5": (lambda: _t5("T5"), _pair),
    "distilbert": (
        lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=60, dim=48, hidden_dim=64, n_layers=2, n_heads=6)),
        _text,
    ),
    "modernbert": (lambda: _encoder("ModernBert", local_attention=8, cls_token_id=1, sep_token_id=2), _text),
    "dinov3": (lambda: _vision("DINOv3ViT", num_register_tokens=2), _image),
    "wav2vec2": (lambda: _wav2vec("Wav2Vec2"), _wave),
    "siglip": (_siglip, lambda: _text() | _image()),
}
"""A case for each row of the table, and for each option that changes the attention: the whole contract."""

COPIES: dict[str, Case] = {
    "gemma": (lambda: _causal("Gemma", head_dim=16), _text),
    "arcee": (lambda: _causal("Arcee"), _text),
    "hyperclovax": (lambda: _causal("HyperCLOVAX"), _text),
    "nemotron": (lambda: _causal("Nemotron", head_dim=8, **_rope(0.5)), _text),
    "apertus": (lambda: _causal("Apertus"), _text),
    "seed-oss": (lambda: _causal("SeedOss", head_dim=16), _text),
    "granite-moe": (lambda: _moe("GraniteMoe", attention_multiplier=0.3), _text),
    "flex-olmo": (lambda: _moe("FlexOlmo"), _text),
    "dots1": (lambda: _causal("Dots1", first_k_dense_replace=1, **_ROUTED), _text),
    "glm4-moe": (lambda: _causal("Glm4Moe", head_dim=16, use_qk_norm=True, **_ROUTED), _text),
    "ernie4_5-moe": (lambda: _causal("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32), _text),
    "biogpt": (lambda: t.BioGptForCausalLM(t.BioGptConfig(**_LM)), _text),
    "blenderbot": (lambda: _seq2seq("Blenderbot"), _pair),
    "blenderbot-small": (lambda: _seq2seq("BlenderbotSmall"), _pair),
    "plbart": (lambda: _seq2seq("PLBart"), _pair),
    "switch-transformers": (_switch, _pair),
    "speech2text": (lambda: _seq2seq("Speech2Text", input_feat_per_channel=8, conv_channels=16), _heard),
    "layoutlm": (lambda: _encoder("LayoutLM"), _text),
    "eurobert": (lambda: _encoder("EuroBert", num_key_value_heads=2), _text),
    "nomic-bert": (lambda: _encoder("NomicBert"), _text),
    "gte": (lambda: _encoder("Gte"), _text),
    "granite-moe-shared": (lambda: _moe("GraniteMoeShared", shared_intermediate_size=32), _text),
    "nllb-moe": (lambda: _seq2seq("NllbMoe", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2), _pair),
    "smolvlm": (lambda: _smolvlm("SmolVLM"), _pictured),
    "idefics3": (lambda: _smolvlm("Idefics3"), _pictured),
    "camembert": (lambda: _encoder("Camembert"), _text),
    "data2vec-text": (lambda: _encoder("Data2VecText"), _text),
    "ernie": (lambda: _encoder("Ernie"), _text),
    "roc-bert": (lambda: _encoder("RoCBert", enable_pronunciation=False, enable_shape=False), _text),
    "bert-generation": (lambda: t.BertGenerationEncoder(t.BertGenerationConfig(**_LM)), _text),
    "vit-mae": (lambda: _vision("ViTMAE"), lambda: _image() | {"noise": torch.rand(2, 16)}),
    "vit-msn": (lambda: _vision("ViTMSN"), _image),
    "ijepa": (lambda: _vision("IJepa"), _image),
    "ast": (_ast, lambda: {"input_values": torch.randn(2, 32, 16)}),
    "metaclip2": (_metaclip2, lambda: _text() | _image()),
    "siglip2": (lambda: t.Siglip2TextModel(t.Siglip2TextConfig(**_LM, projection_size=48)), _text),
    "data2vec-audio": (lambda: _wav2vec("Data2VecAudio"), _wave),
    "unispeech": (lambda: _wav2vec("UniSpeech"), _wave),
    "unispeech-sat": (lambda: _wav2vec("UniSpeechSat"), _wave),
    "sew": (lambda: _wav2vec("SEW"), _wave),
    "gemma3-image": (_gemma3_image, _described),
    "granite": (lambda: _causal("Granite", attention_multiplier=0.3), _text),
    "olmo": (lambda: _causal("Olmo"), _text),
    "olmo3": (lambda: _causal("Olmo3", sliding_window=8, layer_types=_LAYERS), _text),
    "ministral": (lambda: _causal("Ministral", head_dim=8, sliding_window=8, layer_types=_LAYERS), _text),
    "glm4": (lambda: _causal("Glm4", head_dim=16, **_rope(0.5)), _text),
    "helium": (lambda: _causal("Helium", head_dim=8), _text),
    "ernie4_5": (lambda: _causal("Ernie4_5"), _text),
    "phimoe": (lambda: _moe("Phimoe"), _text),
    "qwen2-moe": (lambda: _moe("Qwen2Moe", shared_expert_intermediate_size=32), _text),
    "olmoe": (lambda: _moe("Olmoe"), _text),
    "mbart": (lambda: _seq2seq("MBart"), _pair),
    "marian": (lambda: _seq2seq("Marian"), _pair),
    "pegasus": (lambda: _seq2seq("Pegasus"), _pair),
    "m2m100": (lambda: _seq2seq("M2M100"), _pair),
    "mt5": (lambda: _t5("MT5"), _pair),
    "xlm-roberta": (lambda: _encoder("XLMRoberta"), _text),
    "electra": (lambda: _encoder("Electra", embedding_size=48), _text),
    "hubert": (lambda: _wav2vec("Hubert"), _wave),
    "deit": (lambda: _vision("DeiT"), _image),
    "dinov2": (lambda: _vision("Dinov2"), _image),
    "dinov2-registers": (lambda: _vision("Dinov2WithRegisters"), _image),
}
"""More classes that share one of those rows: the heart of the contract."""

MERGED = ("phimoe", "qwen2-moe", "olmoe")
"""Copies whose files hold the weights of each expert for themselves, each under other names."""
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "vit", "dinov3", "clip", "siglip", "wav2vec2")
SEQ2SEQ = ("whisper", "bart", "t5")
GENERATIVE = [n for n in CASES if n not in (*ENCODERS, *SEQ2SEQ)]
STILL = ("gpt2", "opt", "bloom", "gpt-bigcode", "gpt-bigcode-mha")
"""Language models that rotate nothing."""
MIXED = ("smollm3", "cohere2")
"""Those that rotate in some of their layers."""
SINKS = ("gpt-oss",)
"""Models whose attention weights don't sum to 1."""
EAGER = ("bloom", "gemma2", "gpt-oss")
"""Models that know no fused attention."""
NARROW = ("bloom", "gemma2")
"""Stock models that in float64 give NaN where a row is masked whole: the mask overflows in the softmax's float32."""
REPEATING = ("whisper", "t5", "gemma2", "gemma3")
"""Models that left alone say one word over and over, which would hide a difference."""


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with all weights random (biases and norms too, which transformers starts at 0 and 1), and its batch."""
    torch.manual_seed(0)
    make, batch = (CASES | COPIES)[name]
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
    model.to(dtype)  # only now: a draw depends on the dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    for path, constant in _constants(make, dtype).items():
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, constant)
    return model, inputs


def _constants(make: Callable[[], Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Buffers that no file holds, as a model that is loaded in this dtype has them: not by way of float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            return dict(make().named_non_persistent_buffers())
    finally:
        torch.set_default_dtype(default)


def pruned(name: str, share: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same model with a share of Q-K and V-O removed, calibrated on the same batch."""
    model, batch = build(name, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Q-K of . of . blocks stays whole"
        )  # a norm in front of the logits; see its test
        clover.prune(model, qk=share, vo=share, calibration=[batch])
    return model, batch


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that the model computes from the batch, flat."""
    with torch.no_grad():
        out = model(**batch)
    wanted = [out[k] for k in ("logits", "last_hidden_state", "text_embeds", "image_embeds") if k in out]
    return torch.cat([x.flatten() for x in wanted])
