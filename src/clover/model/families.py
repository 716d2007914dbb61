"""A row for every attention class of transformers that can be rewritten, shared by those that are alike.

A row (see ``clover.model.family.Family``) says where a block keeps its projections, sizes and dropouts, and how its
``forward`` is called. The algorithm knows nothing of it. To add a family, add a class to a row, or a row of its own
(CONTRIBUTING.md has the recipe).
A class that computes as one in the table, under a new name and with a constructor of its own, needs none (``alike``).
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from clover.model.family import Family, Latent


def _is_global_or_slides(core: Any) -> bool:
    return core.sliding_window is None or core.is_sliding


def _slides_or_must(core: Any) -> bool:
    return core.sliding_window is not None or core.force_rope


def _says_rope(core: Any) -> bool:
    return core.config.position_embedding_type == "rope"


def _has_theta(core: Any) -> bool:
    return (core.config.rope_parameters or {}).get("rope_theta") is not None


def _layer_has_theta(core: Any) -> bool:
    return core.config.layer_rope_theta[core.layer_idx] != 0


def _is_rotary(core: Any) -> bool:
    return core.position_embedding_type == "rotary"


def _configs_window(core: Any) -> int | None:
    return getattr(core.config, "sliding_window", None)


def _window_where_sliding(core: Any) -> int | None:
    return core.sliding_window if core.is_sliding else None


def _no_window(_: Any) -> None:
    return None


def _rope_growth(core: Any) -> tuple[float, float, float]:
    rope = core.config.rope_parameters
    return rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"], 0


def _growth_without_rope(core: Any) -> tuple[float, float, float] | None:
    return (core.attn_scale, core.floor_scale, 1) if core.attn_temperature_tuning and not core.use_rope else None


_LLAMA = Family(kv_heads="config.num_key_value_heads", rotary=True)
_SLIDING = replace(_LLAMA, window=_configs_window)
_QWEN3 = replace(_LLAMA, norms=("q_norm", "k_norm"))
_OLMO2 = replace(_QWEN3, norm_spans_heads=True)
_GLM = replace(_LLAMA, neighbours=True)
_COHERE = replace(_GLM, table="neighbours")
_BART = Family(o="out_proj", heads="num_heads", dropout="dropout")
_CLIP = replace(_BART, scale=("scale",))
_BERT = Family(
    q="query", k="key", v="value", o="output.dense", core="self", heads="num_attention_heads",
    head_dim="attention_head_size", dropout="dropout", rename={"encoder_hidden_states": "key_value_states"},
)  # fmt: skip
_T5 = Family(
    q="q", k="k", v="v", o="o", heads="n_heads", head_dim="key_value_proj_dim", dropout="dropout",
    position_bias="relative_attention_bias", rename={"mask": "attention_mask"},
    kept=("is_decoder", "relative_attention_num_buckets", "relative_attention_max_distance"),
)  # fmt: skip
_MLA = Family(
    q="q_b_proj q_proj", fused="kv_b_proj", interleaved=True, head_dim="qk_nope_head_dim", value_dim="v_head_dim",
    latent=Latent(), kept=Latent().kept,
)  # fmt: skip
_CLIP_QKV = {"config.clip_qkv": "values are clipped (clip_qkv), and what is clipped can't be rotated"}

_ROWS: dict[str, Family] = {
    # language
    # these pass no window on, though Qwen2-MoE has one
    "LlamaAttention ArceeAttention EuroBertAttention GemmaAttention GraniteAttention GraniteMoeAttention "
    "GraniteMoeSharedAttention HyperCLOVAXAttention PhimoeAttention "
    "Qwen2MoeAttention": replace(_LLAMA, window=_no_window),
    "BambaAttention Glm4vMoeTextAttention GlmAsrAttention GlmImageTextAttention LasrEncoderAttention "
    "MinistralAttention NemotronAttention Qwen2Attention Qwen2VLAttention Qwen2_5_VLAttention": _LLAMA,
    "MllamaTextSelfAttention": replace(_LLAMA, dropout="dropout"),
    "MistralAttention MixtralAttention": _SLIDING,
    "Ministral3Attention": replace(_SLIDING, growth=_rope_growth),
    "Llama4TextAttention": replace(
        _GLM, rotary=attrgetter("use_rope"), table="complex", norms=("qk_norm", "qk_norm"), norms_last=True,
        growth=_growth_without_rope,
    ),
    "HunYuanDenseV1Attention": replace(_LLAMA, norms=("query_layernorm", "key_layernorm"), norms_last=True),
    "NanoChatAttention": replace(_QWEN3, norms_last=True, clockwise=True),
    "ApertusAttention ChameleonAttention Dots1Attention Gemma3Attention Glm4MoeAttention Qwen3Attention "
    "Qwen3MoeAttention Qwen3VLMoeTextAttention Qwen3VLTextAttention": _QWEN3,
    "Gemma2Attention": replace(_LLAMA, softcap="attn_logit_softcapping"),
    "SeedOssAttention": replace(_LLAMA, output_dropout="residual_dropout"),
    "StableLmAttention": replace(
        _LLAMA, unless={"qk_layernorm": "each head's queries and keys go through a norm of their own (qk_layernorm)"},
    ),
    "SmolLM3Attention": replace(_LLAMA, rotary=attrgetter("use_rope")),
    "Starcoder2Attention": replace(_SLIDING, output_dropout="residual_dropout"),
    "OlmoAttention": replace(_LLAMA, unless=_CLIP_QKV),
    "EsmcAttention FlexOlmoAttention MiniMaxM2Attention Olmo2Attention Olmo3Attention": _OLMO2,
    "OlmoeAttention": replace(_OLMO2, window=_configs_window, unless=_CLIP_QKV),
    "CohereAttention": replace(_COHERE, norms=("q_norm", "k_norm")),
    "Cohere2Attention": replace(_COHERE, rotary=attrgetter("sliding_window")),
    "Cohere2MoeAttention": replace(_COHERE, rotary=_slides_or_must),
    "Exaone4Attention": replace(_QWEN3, rotary=_is_global_or_slides, window=_window_where_sliding),
    "Ernie4_5Attention Ernie4_5_MoeAttention GlmAttention Glm4Attention HeliumAttention": _GLM,
    "Ernie4_5_VLMoeTextAttention GlmOcrTextAttention Glm4vTextAttention": _COHERE,
    "PersimmonAttention": Family(
        fused="query_key_value", interleaved=True, o="dense", heads="num_heads", rotary=True,
        norms=("q_layernorm", "k_layernorm"),
    ),
    "PhiAttention": replace(_LLAMA, o="dense", norms=("q_layernorm", "k_layernorm")),
    "Phi3Attention": replace(_SLIDING, fused="qkv_proj"),
    "GptOssAttention": replace(_LLAMA, sinks="sinks", table="once"),
    "GraniteSWAAttention": replace(_LLAMA, rotary=_layer_has_theta, sinks="sinks"),
    "OpenAIPrivacyFilterAttention": replace(_GLM, scale=("scaling", "scaling"), sinks="sinks", table="once"),
    "ModernBertDecoderAttention": replace(_LLAMA, kv_heads=None, o="Wo", output_dropout="out_drop"),
    # language, keys and values out of a latent
    "AXK1Attention DeepseekV3Attention Glm4MoeLiteAttention "
    "YoutuAttention": replace(_MLA, latent=Latent(neighbours=attrgetter("config.rope_interleave"))),
    "DeepseekV2Attention": replace(_MLA, table="complex"),
    "KimiLinearAttention": replace(_MLA, latent=Latent(turns=False)),
    "MiniCPM3Attention": replace(_MLA, latent=Latent(neighbours=False)),
    "Mistral4Attention": replace(
        _MLA, latent=Latent(neighbours=attrgetter("config.rope_interleave")), growth=_rope_growth,
    ),
    # language, beside state-space layers
    "GraniteMoeHybridAttention": replace(_LLAMA, rotary=_says_rope),
    "JambaAttention": replace(_LLAMA, rotary=False),
    "FalconH1Attention": replace(_LLAMA, scale=("scaling", "key_multiplier")),
    "Lfm2Attention": replace(_LLAMA, o="out_proj", norms=("q_layernorm", "k_layernorm"), dropout=None),
    "OlmoHybridAttention": replace(_OLMO2, rotary=_has_theta),
    # language, fused
    "GPTNeoXAttention": Family(
        fused="query_key_value", interleaved=True, o="dense", head_dim="head_size", rotary=True,
        rename={"layer_past": "past_key_values"},
    ),
    "FalconAttention FalconFlashAttention2": Family(
        fused="query_key_value", interleaved=True, o="dense", heads="num_heads", kv_heads="num_kv_heads",
        scale=("inv_norm_factor",), rotary=attrgetter("config.rotary"), rename={"layer_past": "past_key_values"},
        repeated="config.new_decoder_architecture",
        unless={"config.alibi": "each implementation of its attention adds another bias by distance (alibi)"},
    ),
    "DecisionTransformerGPT2Attention GPT2Attention": Family(
        q="q_attn", fused="c_attn", o="c_proj", heads="num_heads", dropout="attn_dropout",
        output_dropout="resid_dropout", rename={"encoder_hidden_states": "key_value_states"},
    ),
    "GPTBigCodeAttention": Family(
        fused="c_attn", interleaved=True, o="c_proj", heads="num_heads", kv_heads="kv_heads", dropout="attn_dropout",
        output_dropout="resid_dropout",
        rename={"layer_past": "past_key_values", "encoder_hidden_states": "key_value_states"},
    ),
    "BloomAttention": Family(
        fused="query_key_value", interleaved=True, o="dense", heads="num_heads", scale=("inv_norm_factor",),
        output_dropout="hidden_dropout", rename={"layer_past": "past_key_values"},
        unless={"config.slow_but_exact": "its output projection then leaves out its bias (slow_but_exact)"},
    ),
    # language, speech, encoders and decoders
    "BartAttention BioGptAttention BlenderbotAttention BlenderbotSmallAttention Data2VecAudioAttention HubertAttention "
    "M2M100Attention MBartAttention MarianAttention MossTranscribeDiarizeAudioAttention NllbMoeAttention OPTAttention "
    "PLBartAttention PegasusAttention Qwen2AudioAttention SEWAttention Speech2TextAttention TrOCRAttention "
    "UniSpeechAttention UniSpeechSatAttention VoxtralAttention Wav2Vec2Attention WhisperAttention XGLMAttention": _BART,
    "SeamlessM4TAttention": replace(_BART, rename={"encoder_hidden_states": "key_value_states"}),
    "DiaCrossAttention": replace(
        _LLAMA, heads="num_heads", kv_heads="num_key_value_heads", rotary=False,
        rename={"cross_attention_states": "key_value_states"},
    ),
    "T5GemmaCrossAttention": replace(
        _LLAMA, rotary=False, softcap="attn_logit_softcapping", rename={"encoder_hidden_states": "key_value_states"},
    ),
    "MT5Attention SwitchTransformersAttention T5Attention": _T5,
    "UMT5Attention": replace(_T5, hands_on=False, rename={"encoder_hidden_states": "key_value_states"}),
    # encoders
    "BertAttention BertGenerationAttention CamembertAttention Data2VecTextAttention ElectraAttention ErnieAttention "
    "RoCBertAttention RobertaAttention RobertaPreLayerNormAttention XLMRobertaAttention XLMRobertaXLAttention "
    "XmodAttention": _BERT,
    "LayoutLMAttention": replace(_BERT, dropout="attention_dropout", causal=False),
    "BlipTextAttention MegatronBertAttention RemBertAttention TapasAttention "
    "VisualBertAttention": replace(_BERT, scale=(), causal=False),
    "GitAttention": replace(_BERT, scale=(), kept=("image_patch_tokens",)),
    "EsmAttention EvollaSaProtAttention": replace(_BERT, scale=(), rotary=_is_rotary),
    "Blip2QFormerAttention InstructBlipQFormerAttention "
    "InstructBlipVideoQFormerAttention": replace(_BERT, core="attention", dropout="attention_dropout"),
    "MPNetSelfAttention": Family(
        q="q", k="k", v="v", o="o", head_dim="attention_head_size", heads="num_attention_heads", scale=(),
        dropout="dropout", causal=False,
    ),
    "DistilBertSelfAttention": Family(
        q="q_lin", k="k_lin", v="v_lin", o="out_lin", heads="n_heads", head_dim="attention_head_size",
        dropout="dropout",
    ),
    "ModernBertAttention": Family(
        fused="Wqkv", o="Wo", rotary=True, scale=(), output_dropout="config.attention_dropout",
    ),
    "GteAttention NomicBertAttention": replace(_LLAMA, kv_heads=None),
    "ASTAttention DeiTAttention Dinov2Attention Dinov2WithRegistersAttention IJepaAttention ViTAttention "
    "ViTMAEAttention ViTMSNAttention": Family(),
    "DINOv3ViTAttention": Family(rotary=True, dropout="dropout"),
    "FlavaAttention ViltAttention": replace(_BERT, core="attention", scale=(), causal=False),
    "DPTViTAttention VideoMAEAttention VitPoseBackboneAttention "
    "YolosAttention": replace(_BERT, core="attention", dropout="dropout_prob"),
    "CLIPAttention ChineseCLIPVisionAttention GitVisionAttention Idefics2VisionAttention Idefics3VisionAttention "
    "Kosmos2VisionAttention MetaClip2Attention OwlViTAttention Owlv2Attention SiglipAttention "
    "Siglip2Attention SmolVLMVisionAttention": _CLIP,
    "MLCDAttention": replace(_CLIP, rotary=True),
    "MllamaVisionAttention": Family(heads="num_heads", dropout=None, causal=False),
    "Pix2StructVisionAttention": Family(
        q="query", k="key", v="value", o="output", heads="n_heads", head_dim="key_value_proj_dim", dropout="dropout",
    ),
    "Sapiens2Attention": Family(
        heads="num_heads", kv_heads="num_key_value_heads", rotary=True, norms=("q_norm", "k_norm"), dropout="dropout",
    ),
    "BlipAttention": Family(
        fused="qkv", o="projection", heads="num_heads", scale=("scale",), dropout="dropout", causal=False,
    ),
    "Blip2Attention InstructBlipAttention InstructBlipVideoAttention": Family(
        fused="qkv", o="projection", heads="num_heads", scale=("scale",),
    ),
    "JanusVisionAttention": replace(
        _CLIP, o="projection_layer", dropout="attention_dropout", output_dropout="projection_dropout",
        unless={"config.use_qk_norm": "each head's queries and keys go through a norm of their own (use_qk_norm)"},
    ),
    "PixtralAttention": replace(_BART, o="o_proj", rotary=True),
    "Llama4VisionAttention": Family(
        scale=(), rotary=True, neighbours=True, table="complex", causal=False,
        rename={"freqs_ci": "position_embeddings"},
    ),
    "InternVLVisionAttention": replace(
        _CLIP, o="projection_layer", dropout="attention_dropout", output_dropout="projection_dropout",
        norms=("q_norm", "k_norm"), norm_spans_heads=True,
    ),
}  # fmt: skip
FAMILIES: dict[str, Family] = {name: family for names, family in _ROWS.items() for name in names.split()}

CROSS = {"EncDecAttention", "cross_attention", "cross_attn", "crossattention", "encoder_attn"}
"""What models call a block that attends to another sequence, whatever its class."""
WRITERS = {"language_model", "text_decoder"}
"""What models call the part that writes; it has a cache, though its prompt may be read in both directions."""
MLP = {
    "up": (
        "fc1", "feed_forward.intermediate_dense", "feed_forward.up_proj", "feed_forward.w3", "ffn.lin1",
        "intermediate.dense", "mlp.Wi", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "mlp.gate_up_proj", "mlp.up_proj",
    ),
    "gate": ("feed_forward.gate_proj", "feed_forward.w1", "mlp.gate_proj"),
}  # fmt: skip
"""First projections of the MLP beside an attention, as paths from their common parent; tuning can take them. Experts
are stacked in one tensor, and have none."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("DeepseekV32Attention", "GlmMoeDsaAttention"),
        "another module chooses the keys that it sees, by what it reads itself",
    ),
    "LongcatFlashMLA": "its latents are scaled on their way to queries, keys and values",
    **dict.fromkeys(
        ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"),
        "its values go through a gate, column by column, on their way to the output projection",
    ),
    **dict.fromkeys(
        ("Gemma3nTextAttention", "Gemma4TextAttention"),
        "a norm of the values stands before the output projection, and layers share keys and values",
    ),
    "BitNetAttention": "a norm stands between its values and the output projection",
    "KosmosTextAttention": "in self-attention, a norm stands between its values and the output projection",
    "DiffLlamaAttention": "it subtracts one attention from another and norms the difference",
    "MllamaTextCrossAttention": "a norm of the keys stands between another sequence and a cache that holds them",
    "DbrxAttention": _CLIP_QKV["config.clip_qkv"],
    **dict.fromkeys(
        ("GPTJAttention", "IdeficsAttention", "KyutaiSpeechToTextAttention", "MoshiAttention",
         "RecurrentGemmaAttention", "VJEPA2RopeAttention"),
        "it holds the table of its rotation itself",
    ),
    "HunYuanVLDenseV1Attention": "the two columns of a pair turn by different positions where there are images",
    "MoonshineAttention": "one class serves to read its own sequence, turned by position, and another one, not turned",
    "CodeGenAttention": "it holds the table of its rotation itself, and its fused rows lie in four stretches",
    "GPTNeoAttention": "its local layers mask keys that are far by themselves",
    "MptAttention": "its mask and its bias are applied in its own way",
    **dict.fromkeys(
        ("BrosAttention", "ParakeetEncoderAttention", "SeamlessM4TConformerSelfAttention",
         "SeamlessM4Tv2ConformerSelfAttention", "SpeechT5Attention", "Wav2Vec2BertSelfAttention",
         "Wav2Vec2ConformerSelfAttention"),
        "its positions enter through the queries themselves, not as a rotation or a bias",
    ),
    **dict.fromkeys(
        ("ConditionalDetrSelfAttention", "DFineSelfAttention", "DeformableDetrSelfAttention", "DetrSelfAttention",
         "RTDetrSelfAttention", "RTDetrV2SelfAttention", "TableTransformerAttention"),
        "its values read what its queries and keys do without the positions",
    ),
    "MobileBertAttention": "its values read something else than its keys",
    "JetMoeAttention": "its queries and its output are experts",
    **dict.fromkeys(
        ("ZambaAttention", "Zamba2Attention"), "one block serves many layers, each with a place of its own in the cache"
    ),
    "DebertaV2Attention": "its positions enter through the query and key projections (disentangled attention)",
    "WavLMAttention": "its position bias is gated by what the block reads",
    "Attention": "it is not in transformers' attention interface (it is that of diffusers, timm, FSMT or OpenAI GPT)",
}  # fmt: skip
"""Classes that a row can't describe -> why."""

APART = {"AriaCrossAttention", "KimiLinearDeltaAttention", "MultiheadAttention", "PatchTSMixerGatedAttention"}
"""Called attention, but staying dense: the pooling head of a vision model, a projector, a gate, a linear recurrence."""
PACKED = "cu_seqlens"
"""What the ``forward`` of a vision tower takes that reads images of many sizes as one row. Such a tower stays dense."""
