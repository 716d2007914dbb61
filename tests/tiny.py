"""How tiny random models of every family are made, without a download, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t


def text(vocab: int = 60, length: int = 12) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, vocab, (2, length))}


def image(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def heard() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 40, 8), "decoder_input_ids": torch.randint(3, 60, (2, 7))}


def speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(3, 60, (2, 7))}


LM = {
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
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def rope(partial: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}}


def llama(**kwargs: Any) -> t.LlamaForCausalLM:
    return t.LlamaForCausalLM(t.LlamaConfig(**LM, **kwargs))


def gpt2() -> t.GPT2LMHeadModel:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=6, n_positions=128, **ENDS))


def opt() -> t.OPTForCausalLM:
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
            **ENDS,
        )
    )


def bloom() -> t.BloomForCausalLM:
    return t.BloomForCausalLM(t.BloomConfig(vocab_size=60, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0, **ENDS))


def clip() -> t.CLIPModel:
    text, vision = LM | {"projection_dim": 16}, VISION | {"projection_dim": 16}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def seq2seq(kind: str, **kwargs: Any) -> Any:
    """An encoder-decoder with the configuration names of BART."""
    sizes: dict[str, Any] = {"d_model": 48, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64}
    config = getattr(t, f"{kind}Config")(**(sizes | ENDS | {"vocab_size": 60} | kwargs))
    return getattr(t, MODELS.get(kind, f"{kind}ForConditionalGeneration"))(config)


MODELS = {"Marian": "MarianMTModel"}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}


def ministral3() -> Any:
    """Queries grow after every fourth token."""
    grown = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, **grown}
    return causal("Ministral3", head_dim=16, rope_parameters=yarn)


def llama4() -> Any:
    """One layer rotates and has norms; in the other, queries grow after every fourth token."""
    experts = {"num_local_experts": 2, "moe_layers": [1], "intermediate_size_mlp": 64, "num_key_value_heads": 2}
    grown = {"no_rope_layers": [1, 0], "floor_scale": 4, "attn_scale": 0.5, "attention_chunk_size": 8}
    return t.Llama4ForCausalLM(t.Llama4TextConfig(**LM, **experts, **grown, head_dim=8))


def llama4_vision() -> t.Llama4VisionModel:
    shuffled = {"projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24}
    return t.Llama4VisionModel(t.Llama4VisionConfig(**(VISION | {"intermediate_size": 192} | shuffled)))


def pixtral() -> t.PixtralVisionModel:
    return t.PixtralVisionModel(t.PixtralVisionConfig(**VISION))


def whisper() -> t.WhisperForConditionalGeneration:
    return seq2seq(
        "Whisper",
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def t5(kind: str) -> Any:
    sizes = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
    return getattr(t, f"{kind}ForConditionalGeneration")(getattr(t, f"{kind}Config")(**sizes, **ends, **buckets))


def causal(kind: str, **kwargs: Any) -> Any:
    """A language model with the configuration names of Llama."""
    return getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**(LM | {"num_key_value_heads": 2} | kwargs)))


def gemma(kind: str, **kwargs: Any) -> Any:
    made: dict[str, Any] = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8, "layer_types": LAYERS}
    return causal(kind, **(made | {"query_pre_attn_scalar": 24} | kwargs))


def moe(kind: str, **kwargs: Any) -> Any:
    names = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return causal(kind, **names, **kwargs)


def encoder(kind: str, **kwargs: Any) -> Any:
    return getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**(LM | kwargs)))


def vision(kind: str, **kwargs: Any) -> Any:
    return getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**(VISION | kwargs)))


def granite_hybrid(positions: str) -> Any:
    """A state-space layer, then attention that rotates where ``positions`` is ``rope``."""
    kinds = {"layer_types": ["mamba", "attention"], "position_embedding_type": positions}
    return moe("GraniteMoeHybrid", shared_intermediate_size=32, **kinds, **MAMBA)


def gemma3_image() -> t.Gemma3ForConditionalGeneration:
    """A SigLIP tower in front of a Gemma 3; token 55 stands for a piece of the image."""
    tokens = {"image_token_id": 55, "boi_token_id": 56, "eoi_token_id": 57, "mm_tokens_per_image": 4}
    parts = {"text_config": LM | GEMMA3, "vision_config": dict(VISION)}
    return t.Gemma3ForConditionalGeneration(t.Gemma3Config(**parts, **tokens))


def described() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 12))
    ids[:, 2:6] = 55
    return {"input_ids": ids, "token_type_ids": (ids == 55).long(), **image()}


def pictured() -> dict[str, torch.Tensor]:
    """The same for models that take several images a sequence."""
    batch = described()
    return {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"].unsqueeze(1)}


def siglip() -> t.SiglipModel:
    text = {k: LM[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {"num_attention_heads": 6, "max_position_embeddings": 32, "pad_token_id": 0, "projection_size": 48}
    return t.SiglipModel(t.SiglipConfig(text_config=text | ENDS, vision_config=VISION))


def wav2vec(kind: str) -> Any:
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "feat_extract_norm": "layer"}
    # Four groups of twelve channels are what PyTorch's convolution gets wrong in bfloat16 on CPUs.
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return encoder(kind, num_attention_heads=4, apply_spec_augment=False, layerdrop=0.0, **sizes, **positions)


def falcon(**kwargs: Any) -> t.FalconForCausalLM:
    return t.FalconForCausalLM(t.FalconConfig(**LM, **kwargs))


def smolvlm(kind: str) -> Any:
    """A vision tower in front of a Llama."""
    text = {"model_type": "llama", **LM, "num_key_value_heads": 2}
    parts = {"text_config": text, "vision_config": VISION | {"patch_size": 8}, "scale_factor": 2}
    config = getattr(t, f"{kind}Config")(**parts, image_token_id=55, pad_token_id=0)
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


def bigcode(**kwargs: Any) -> t.GPTBigCodeForCausalLM:
    sizes = {"vocab_size": 60, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
    return t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**sizes, **ENDS, **kwargs))


def switch() -> t.SwitchTransformersForConditionalGeneration:
    sizes = {"vocab_size": 60, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    more = {"num_heads": 4, "num_experts": 2, "relative_attention_num_buckets": 8}
    return t.SwitchTransformersForConditionalGeneration(t.SwitchTransformersConfig(**sizes, **ends, **more))


def ast() -> t.ASTModel:
    sizes = {k: v for k, v in VISION.items() if k != "image_size"}
    clip = {"num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8}
    return t.ASTModel(t.ASTConfig(**sizes, **clip))


def metaclip2() -> t.MetaClip2Model:
    text, vision = LM | {"projection_dim": 16}, VISION | {"projection_dim": 16}
    return t.MetaClip2Model(t.MetaClip2Config(text_config=text, vision_config=vision, projection_dim=16))


def wave() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 400)}


def pair() -> dict[str, torch.Tensor]:
    return text() | {"decoder_input_ids": torch.randint(3, 60, (2, 7))}


LAYERS = ["sliding_attention", "full_attention"]

GEMMA3 = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": LAYERS,
    "query_pre_attn_scalar": 24,
}

ROUTED = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}


MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "num_key_value_heads": 6,
}
"""Sizes of queries, and of keys with values, that come out of latents."""


def moe_mla(kind: str, **kwargs: Any) -> Any:
    return causal(kind, **(MLA | ROUTED | {"first_k_dense_replace": 1} | kwargs))


def mistral4() -> Any:
    """Queries grow after every fourth token."""
    grown = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, **grown}
    return moe_mla("Mistral4", rope_parameters=yarn)


def kimi_linear() -> Any:
    """A linear recurrence, then attention that rotates nothing."""
    kinds = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "dense"]}
    return moe_mla("KimiLinear", linear_head_dim=8, linear_num_heads=4, linear_conv_kernel_dim=2, **kinds)


def llava() -> t.LlavaForConditionalGeneration:
    """A CLIP tower in front of a Llama; token 55 stands for a piece of the image."""
    parts = {"vision_config": t.CLIPVisionConfig(**VISION), "text_config": t.LlamaConfig(**LM, num_key_value_heads=2)}
    config = t.LlavaConfig(**parts, image_token_id=55, image_seq_length=16, vision_feature_layer=-1)
    return t.LlavaForConditionalGeneration(config)


def paligemma() -> t.PaliGemmaForConditionalGeneration:
    """A SigLIP tower in front of a Gemma."""
    text = t.GemmaConfig(**LM, num_key_value_heads=2, head_dim=8)
    parts = {"vision_config": t.SiglipVisionConfig(**VISION, vision_use_head=False), "text_config": text}
    return t.PaliGemmaForConditionalGeneration(t.PaliGemmaConfig(**parts, image_token_id=55, projection_dim=48))


def sixteen() -> dict[str, torch.Tensor]:
    """Sixteen pieces of an image in front of some words."""
    ids = torch.randint(3, 50, (2, 24))
    ids[:, 2:18] = 55
    return {"input_ids": ids, **image()}


def qwen_vl(kind: str, **text: Any) -> Any:
    """A tower that reads images of any size as one row of patches, in front of a Qwen; rotations by three positions."""
    positions = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    words = LM | {"num_key_value_heads": 2, "rope_parameters": positions, **text}
    patches = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    widths = {"hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "out_hidden_size": 48, "mlp_ratio": 2}
    tokens = {"image_token_id": 55, "video_token_id": 56, "vision_start_token_id": 57, "vision_end_token_id": 58}
    sees = patches | widths | ({"hidden_size": 48} if kind == "Qwen2VL" else {})
    if kind.startswith("Qwen3"):
        sees |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = getattr(t, f"{kind}Config")(text_config=words, vision_config=sees, **tokens)
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


def patched() -> dict[str, torch.Tensor]:
    """One image of four by four patches, which make four pieces, in each of two sequences."""
    ids = torch.randint(3, 50, (2, 12))
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 57, 55, 58
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    kinds = (ids == 55).long()
    return {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": torch.randn(32, 96), "image_grid_thw": grid}


def esm(positions: str) -> t.EsmModel:
    special = {"pad_token_id": 1, "mask_token_id": 4, "token_dropout": False}
    return t.EsmModel(t.EsmConfig(**(LM | special), position_embedding_type=positions))


def residues() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 60, (2, 12))}


def xglm() -> t.XGLMForCausalLM:
    return t.XGLMForCausalLM(t.XGLMConfig(**ONE_SIDE, num_layers=2, attention_heads=4, ffn_dim=64))


def trocr() -> t.TrOCRForCausalLM:
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    return t.TrOCRForCausalLM(t.TrOCRConfig(**ONE_SIDE, **sizes, cross_attention_hidden_size=32))


ONE_SIDE = {"vocab_size": 60, "d_model": 48, "max_position_embeddings": 128, "pad_token_id": 0, **ENDS}


def qwen2_audio() -> t.Qwen2AudioEncoder:
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 48}
    return t.Qwen2AudioEncoder(t.Qwen2AudioEncoderConfig(**sizes, num_mel_bins=8, max_source_positions=20))


def voxtral() -> t.VoxtralEncoder:
    sizes = {k: v for k, v in VISION.items() if "size" not in k or k in ("hidden_size", "intermediate_size")}
    return t.VoxtralEncoder(t.VoxtralEncoderConfig(**sizes, num_mel_bins=8, max_source_positions=20))


def blip() -> t.BlipForConditionalGeneration:
    """A tower in front of a writer that attends to it."""
    text = LM | {"encoder_hidden_size": 48, "projection_dim": 16, "sep_token_id": 2}
    vision = VISION | {"projection_dim": 16}
    config = t.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    return t.BlipForConditionalGeneration(config)


def blip2(kind: str) -> Any:
    """A tower, queries that attend to it, and a writer behind them; token 55 stands for a query."""
    text = {"model_type": "opt", "word_embed_proj_dim": 48, "ffn_dim": 64, **LM}
    parts = {"vision_config": dict(VISION), "qformer_config": LM | {"encoder_hidden_size": 48}, "text_config": text}
    config = getattr(t, f"{kind}Config")(**parts, num_query_tokens=4, image_token_index=55)
    return getattr(t, f"{kind}ForConditionalGeneration")(config)


def queried() -> dict[str, torch.Tensor]:
    return {k: v for k, v in described().items() if k != "token_type_ids"}


def instructed() -> dict[str, torch.Tensor]:
    """The second instruction is shorter."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return queried() | {"qformer_input_ids": torch.randint(3, 60, (2, 5)), "qformer_attention_mask": mask}


def chameleon() -> t.ChameleonForConditionalGeneration:
    codes = {"embed_dim": 8, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    config = t.ChameleonConfig(**LM, num_key_value_heads=2, vocabulary_map={"<image>": 55}, vq_config=codes)
    return t.ChameleonForConditionalGeneration(config)


def glm4v_text(kind: str, partial: float) -> Any:
    positions = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": partial,
    }
    sizes = LM | {"num_key_value_heads": 2, "head_dim": int(8 / partial), "rope_parameters": positions}
    return getattr(t, f"{kind}TextModel")(getattr(t, f"{kind}TextConfig")(**sizes))


def t5gemma() -> t.T5GemmaForConditionalGeneration:
    side = t.T5GemmaModuleConfig(**LM, **GEMMA3, attn_logit_softcapping=2.0)
    return t.T5GemmaForConditionalGeneration(t.T5GemmaConfig(encoder=side, decoder=side))


def decision() -> t.DecisionTransformerModel:
    sizes = {"state_dim": 5, "act_dim": 3, "hidden_size": 48, "max_ep_len": 32, "n_layer": 2, "n_head": 6}
    return t.DecisionTransformerModel(t.DecisionTransformerConfig(**sizes, n_positions=128))


def moves() -> dict[str, torch.Tensor]:
    widths = {"states": 5, "actions": 3, "rewards": 1, "returns_to_go": 1}
    steps = {name: torch.randn(2, 4, width) for name, width in widths.items()}
    return steps | {"timesteps": torch.arange(4).expand(2, 4), "attention_mask": torch.ones(2, 4)}


def owl(kind: str) -> Any:
    text = LM | {"max_position_embeddings": 12}
    config = getattr(t, f"{kind}Config")(text_config=text, vision_config=dict(VISION), projection_dim=16)
    return getattr(t, f"{kind}Model")(config)


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 40)}


def clip_like(kind: str, **words: Any) -> Any:
    vision = VISION | {"projection_dim": 16}
    config = getattr(t, f"{kind}Config")(text_config=LM | words, vision_config=vision, projection_dim=16)
    return getattr(t, f"{kind}Model")(config)


HEARS = {k: v for k, v in VISION.items() if k not in ("image_size", "patch_size")}
"""Sizes of an encoder of sound."""


def glm_asr() -> t.GlmAsrEncoder:
    return t.GlmAsrEncoder(t.GlmAsrEncoderConfig(**HEARS, num_key_value_heads=2, num_mel_bins=8, **rope(0.5)))


def lasr() -> t.LasrEncoder:
    convolutions = {"subsampling_conv_channels": 8, "conv_kernel_size": 7}
    return t.LasrEncoder(t.LasrEncoderConfig(**HEARS, **convolutions, num_mel_bins=16, layerdrop=0.0))


def mllama_vision() -> t.MllamaVisionModel:
    sizes = {k: v for k, v in VISION.items() if k != "num_attention_heads"} | {"attention_heads": 4}
    tiles = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 96}
    config = t.MllamaVisionConfig(**sizes, **tiles, num_global_layers=1, intermediate_layers_indices=[1])
    return t.MllamaVisionModel(config)


def tiled() -> dict[str, torch.Tensor]:
    ones = torch.ones(2, 1, dtype=torch.long)
    pixels = torch.randn(2, 1, 1, 3, 32, 32)
    return {"pixel_values": pixels, "aspect_ratio_ids": ones, "aspect_ratio_mask": ones.unsqueeze(1)}


def pix2struct() -> t.Pix2StructVisionModel:
    sizes = {"hidden_size": 48, "d_ff": 64, "d_kv": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.Pix2StructVisionModel(t.Pix2StructVisionConfig(**sizes, patch_embed_hidden_size=20, seq_len=32))


def placed() -> dict[str, torch.Tensor]:
    """Patches, each behind its row and column."""
    return {"flattened_patches": torch.cat([torch.ones(2, 9, 2), torch.randn(2, 9, 20)], -1)}


def dia() -> t.DiaForConditionalGeneration:
    """Two channels of sound are written after a text."""
    sizes = LM | {"num_key_value_heads": 2, "head_dim": 8}
    heard = {"cross_num_attention_heads": 4, "cross_num_key_value_heads": 2, "cross_head_dim": 12}
    writes = t.DiaDecoderConfig(**sizes, **heard, cross_hidden_size=48, num_channels=2)
    config = t.DiaConfig(encoder_config=t.DiaEncoderConfig(**sizes), decoder_config=writes, delay_pattern=[0, 1])
    return t.DiaForConditionalGeneration(config)


def spoken() -> dict[str, torch.Tensor]:
    return text() | {"decoder_input_ids": torch.randint(3, 60, (2, 7, 2))}


def seamless(kind: str) -> Any:
    """From text to text."""
    sizes: dict[str, Any] = {"hidden_size": 48, "vocab_size": 60, "max_position_embeddings": 64}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64, f"{part}_layerdrop": 0.0}
    config = getattr(t, f"{kind}Config")(**sizes, **ENDS, pad_token_id=0, decoder_start_token_id=1)
    return getattr(t, f"{kind}ForTextToText")(config)


def olmo_hybrid(theta: float | None) -> Any:
    """A linear recurrence, then attention that rotates if there is a theta."""
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
    heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return causal("OlmoHybrid", **kinds, **heads, rope_parameters={"rope_type": "default", "rope_theta": theta})


def ernie_vl() -> Any:
    positions = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 32]}
    config = t.Ernie4_5_VLMoeTextConfig(**LM, **experts, num_key_value_heads=2, rope_parameters=positions)
    return t.Ernie4_5_VLMoeTextModel(config)


def granite_swa(kind: str) -> Any:
    """One layer slides and rotates, the other does neither."""
    windows = {"sliding_window": 8, "layer_types": LAYERS, "layer_rope_theta": [1e4, 0]}
    return moe(kind, **windows, attention_multiplier=0.3)


def privacy_filter() -> t.OpenAIPrivacyFilterModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = t.OpenAIPrivacyFilterConfig(
        **LM, **experts, num_key_value_heads=2, head_dim=16, sliding_window=4, **rope(1.0)
    )
    return t.OpenAIPrivacyFilterModel(config)


def mllama_text() -> t.MllamaForCausalLM:
    config = t.MllamaTextConfig(**LM, num_key_value_heads=2, cross_attention_layers=[], **rope(1.0))
    return t.MllamaForCausalLM(config)
