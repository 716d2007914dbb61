"""Tiny random models of every family: whole models, two or three layers, built without a download."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

import clover
from tiny import (
    GEMMA3,
    LAYERS,
    LM,
    MAMBA,
    MLA,
    ROUTED,
    VISION,
    ast,
    bigcode,
    blip,
    blip2,
    bloom,
    causal,
    chameleon,
    clip,
    clip_like,
    decision,
    described,
    dia,
    encoder,
    ernie_vl,
    esm,
    falcon,
    gemma,
    gemma3_image,
    glm4v_text,
    glm_asr,
    gpt2,
    granite_hybrid,
    granite_swa,
    heard,
    image,
    instructed,
    kimi_linear,
    lasr,
    llama,
    llama4,
    llama4_vision,
    llava,
    metaclip2,
    ministral3,
    mistral4,
    mllama_text,
    mllama_vision,
    moe,
    moe_mla,
    moves,
    olmo_hybrid,
    opt,
    owl,
    pair,
    paligemma,
    patched,
    pictured,
    pix2struct,
    pixtral,
    placed,
    privacy_filter,
    queried,
    qwen2_audio,
    qwen_vl,
    residues,
    rope,
    seamless,
    seq2seq,
    siglip,
    sixteen,
    smolvlm,
    sound,
    speech,
    spoken,
    switch,
    t5,
    t5gemma,
    text,
    tiled,
    trocr,
    vision,
    voxtral,
    wav2vec,
    wave,
    whisper,
)

Case = tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]

CASES: dict[str, Case] = {
    "llama-gqa": (lambda: llama(num_key_value_heads=2), text),
    "llama-mqa-bias": (lambda: llama(num_key_value_heads=1, attention_bias=True), text),
    "llama-mha": (lambda: llama(num_key_value_heads=6, head_dim=16), text),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**LM, num_key_value_heads=2, sliding_window=8)), text),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LM, num_key_value_heads=2)), text),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**LM, num_key_value_heads=2, head_dim=16)), text),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**LM, num_key_value_heads=2)), text),
    "phi3-partial": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**LM, num_key_value_heads=2, **rope(0.5))), text),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**LM, **rope(0.25))), text),
    "gpt2": (gpt2, text),
    "opt": (opt, text),
    "bloom": (bloom, text),
    "bert": (lambda: t.BertModel(t.BertConfig(**LM)), text),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**LM)), text),
    "vit": (lambda: t.ViTModel(t.ViTConfig(**VISION)), image),
    "clip": (clip, lambda: text() | image()),
    "whisper": (whisper, speech),
    "olmo2": (lambda: causal("Olmo2"), text),
    "starcoder2": (lambda: causal("Starcoder2", residual_dropout=0.1), text),
    "phi": (lambda: causal("Phi", **rope(0.5)), text),
    "phi-norm": (lambda: causal("Phi", qk_layernorm=True, **rope(0.5)), text),
    "gemma2": (lambda: gemma("Gemma2", attn_logit_softcapping=2.0), text),
    "gemma3": (lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**LM, **GEMMA3)), text),
    "smollm3": (lambda: causal("SmolLM3", no_rope_layers=[1, 0]), text),
    "cohere": (lambda: causal("Cohere"), text),
    "cohere-norm": (lambda: causal("Cohere", use_qk_norm=True), text),
    "cohere2": (lambda: causal("Cohere2", sliding_window=8, layer_types=LAYERS), text),
    "glm": (lambda: causal("Glm", head_dim=16, attention_bias=True, **rope(0.5)), text),
    "falcon-mha": (lambda: falcon(multi_query=False, bias=True), text),
    "falcon-mqa": (lambda: falcon(), text),
    "falcon-gqa": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), text),
    "gpt-oss": (lambda: moe("GptOss", head_dim=16, sliding_window=8, layer_types=LAYERS), text),
    "mixtral": (lambda: moe("Mixtral"), text),
    "qwen3-moe": (lambda: moe("Qwen3Moe", head_dim=16), text),
    "stablelm": (lambda: causal("StableLm", partial_rotary_factor=0.5), text),
    "gpt-bigcode": (lambda: bigcode(), text),
    "gpt-bigcode-mha": (lambda: bigcode(multi_query=False), text),
    "bart": (lambda: seq2seq("Bart"), pair),
    "t5": (lambda: t5("T5"), pair),
    "distilbert": (
        lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=60, dim=48, hidden_dim=64, n_layers=2, n_heads=6)),
        text,
    ),
    "modernbert": (lambda: encoder("ModernBert", local_attention=8, cls_token_id=1, sep_token_id=2), text),
    "dinov3": (lambda: vision("DINOv3ViT", num_register_tokens=2), image),
    "wav2vec2": (lambda: wav2vec("Wav2Vec2"), wave),
    "siglip": (siglip, lambda: text() | image()),
    "ministral3": (ministral3, text),
    "llama4": (llama4, text),
    "hunyuan": (lambda: causal("HunYuanDenseV1", head_dim=16), text),
    "granite-hybrid": (lambda: granite_hybrid("rope"), text),
    "falcon-h1": (lambda: causal("FalconH1", key_multiplier=0.4, mamba_d_ssm=96, **MAMBA), text),
    "lfm2": (lambda: causal("Lfm2", layer_types=["conv", "full_attention"]), text),
    "deepseek-v2": (lambda: moe_mla("DeepseekV2"), text),
    "deepseek-v3": (lambda: moe_mla("DeepseekV3", attention_bias=True), text),
    "deepseek-v3-halves": (lambda: moe_mla("DeepseekV3", q_lora_rank=None, rope_interleave=False), text),
}
"""A case for each row of the table, and for each option that changes the attention: the whole contract."""

COPIES: dict[str, Case] = {
    "gemma": (lambda: causal("Gemma", head_dim=16), text),
    "arcee": (lambda: causal("Arcee"), text),
    "hyperclovax": (lambda: causal("HyperCLOVAX"), text),
    "nemotron": (lambda: causal("Nemotron", head_dim=8, **rope(0.5)), text),
    "apertus": (lambda: causal("Apertus"), text),
    "seed-oss": (lambda: causal("SeedOss", head_dim=16), text),
    "granite-moe": (lambda: moe("GraniteMoe", attention_multiplier=0.3), text),
    "flex-olmo": (lambda: moe("FlexOlmo"), text),
    "dots1": (lambda: causal("Dots1", first_k_dense_replace=1, **ROUTED), text),
    "glm4-moe": (lambda: causal("Glm4Moe", head_dim=16, use_qk_norm=True, **ROUTED), text),
    "ernie4_5-moe": (lambda: causal("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32), text),
    "biogpt": (lambda: t.BioGptForCausalLM(t.BioGptConfig(**LM)), text),
    "blenderbot": (lambda: seq2seq("Blenderbot"), pair),
    "blenderbot-small": (lambda: seq2seq("BlenderbotSmall"), pair),
    "plbart": (lambda: seq2seq("PLBart"), pair),
    "switch-transformers": (switch, pair),
    "speech2text": (lambda: seq2seq("Speech2Text", input_feat_per_channel=8, conv_channels=16), heard),
    "layoutlm": (lambda: encoder("LayoutLM"), text),
    "eurobert": (lambda: encoder("EuroBert", num_key_value_heads=2), text),
    "nomic-bert": (lambda: encoder("NomicBert"), text),
    "gte": (lambda: encoder("Gte"), text),
    "granite-moe-shared": (lambda: moe("GraniteMoeShared", shared_intermediate_size=32), text),
    "nllb-moe": (lambda: seq2seq("NllbMoe", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2), pair),
    "smolvlm": (lambda: smolvlm("SmolVLM"), pictured),
    "idefics3": (lambda: smolvlm("Idefics3"), pictured),
    "llava": (llava, sixteen),
    "paligemma": (paligemma, sixteen),
    "qwen2-vl": (lambda: qwen_vl("Qwen2VL"), patched),
    "qwen2_5-vl": (lambda: qwen_vl("Qwen2_5_VL"), patched),
    "qwen3-vl": (lambda: qwen_vl("Qwen3VL", head_dim=8), patched),
    "qwen3-vl-moe": (lambda: qwen_vl("Qwen3VLMoe", head_dim=8, num_experts=4, moe_intermediate_size=32), patched),
    "mpnet": (lambda: encoder("MPNet"), text),
    "camembert": (lambda: encoder("Camembert"), text),
    "data2vec-text": (lambda: encoder("Data2VecText"), text),
    "ernie": (lambda: encoder("Ernie"), text),
    "roc-bert": (lambda: encoder("RoCBert", enable_pronunciation=False, enable_shape=False), text),
    "bert-generation": (lambda: t.BertGenerationEncoder(t.BertGenerationConfig(**LM)), text),
    "vit-mae": (lambda: vision("ViTMAE"), lambda: image() | {"noise": torch.rand(2, 16)}),
    "vit-msn": (lambda: vision("ViTMSN"), image),
    "ijepa": (lambda: vision("IJepa"), image),
    "ast": (ast, lambda: {"input_values": torch.randn(2, 32, 16)}),
    "metaclip2": (metaclip2, lambda: text() | image()),
    "siglip2": (lambda: t.Siglip2TextModel(t.Siglip2TextConfig(**LM, projection_size=48)), text),
    "data2vec-audio": (lambda: wav2vec("Data2VecAudio"), wave),
    "unispeech": (lambda: wav2vec("UniSpeech"), wave),
    "unispeech-sat": (lambda: wav2vec("UniSpeechSat"), wave),
    "sew": (lambda: wav2vec("SEW"), wave),
    "gemma3-image": (gemma3_image, described),
    "modernbert-decoder": (
        lambda: t.ModernBertDecoderForCausalLM(
            t.ModernBertDecoderConfig(**LM, local_attention=8, layer_types=LAYERS, cls_token_id=1, sep_token_id=2)
        ),
        text,
    ),
    "exaone4": (lambda: causal("Exaone4", sliding_window=8, layer_types=LAYERS), text),
    "cohere2-moe": (
        lambda: moe("Cohere2Moe", head_dim=8, sliding_window=8, layer_types=LAYERS, mlp_layer_types=["sparse"] * 2),
        text,
    ),
    "minimax-m2": (lambda: moe("MiniMaxM2", head_dim=16, **rope(0.5)), text),
    "granite-hybrid-still": (lambda: granite_hybrid("nope"), text),
    "bamba": (lambda: causal("Bamba", attn_layer_indices=[1], **MAMBA, **rope(0.5)), text),
    "jamba": (
        lambda: causal("Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False),
        text,
    ),
    "nanochat": (lambda: causal("NanoChat"), text),
    "llama4-vision": (llama4_vision, image),
    "pixtral": (pixtral, image),
    "internvl": (lambda: t.InternVLVisionModel(t.InternVLVisionConfig(**VISION)), image),
    "internvl-norm": (lambda: t.InternVLVisionModel(t.InternVLVisionConfig(**VISION, use_qk_norm=True)), image),
    "granite": (lambda: causal("Granite", attention_multiplier=0.3), text),
    "olmo": (lambda: causal("Olmo"), text),
    "olmo3": (lambda: causal("Olmo3", sliding_window=8, layer_types=LAYERS), text),
    "ministral": (lambda: causal("Ministral", head_dim=8, sliding_window=8, layer_types=LAYERS), text),
    "glm4": (lambda: causal("Glm4", head_dim=16, **rope(0.5)), text),
    "helium": (lambda: causal("Helium", head_dim=8), text),
    "ernie4_5": (lambda: causal("Ernie4_5"), text),
    "phimoe": (lambda: moe("Phimoe"), text),
    "qwen2-moe": (lambda: moe("Qwen2Moe", shared_expert_intermediate_size=32), text),
    "olmoe": (lambda: moe("Olmoe"), text),
    "mbart": (lambda: seq2seq("MBart"), pair),
    "marian": (lambda: seq2seq("Marian"), pair),
    "pegasus": (lambda: seq2seq("Pegasus"), pair),
    "m2m100": (lambda: seq2seq("M2M100"), pair),
    "mt5": (lambda: t5("MT5"), pair),
    "umt5": (lambda: t5("UMT5"), pair),
    "xlm-roberta": (lambda: encoder("XLMRoberta"), text),
    "electra": (lambda: encoder("Electra", embedding_size=48), text),
    "hubert": (lambda: wav2vec("Hubert"), wave),
    "deit": (lambda: vision("DeiT"), image),
    "dinov2": (lambda: vision("Dinov2"), image),
    "dinov2-registers": (lambda: vision("Dinov2WithRegisters"), image),
    "esm": (lambda: esm("rotary"), residues),
    "esm-absolute": (lambda: esm("absolute"), residues),
    "roberta-preln": (lambda: encoder("RobertaPreLayerNorm"), text),
    "xlm-roberta-xl": (lambda: encoder("XLMRobertaXL"), text),
    "xmod": (lambda: encoder("Xmod", default_language="en_XX"), text),
    "megatron-bert": (lambda: encoder("MegatronBert"), text),
    "rembert": (lambda: encoder("RemBert", input_embedding_size=48), text),
    "tapas": (lambda: encoder("Tapas"), lambda: text() | {"token_type_ids": torch.zeros(2, 12, 7, dtype=torch.long)}),
    "visual-bert": (
        lambda: encoder("VisualBert", visual_embedding_dim=16),
        lambda: text() | {"visual_embeds": torch.randn(2, 4, 16)},
    ),
    "vilt": (
        lambda: t.ViltModel(t.ViltConfig(**(LM | VISION))),
        lambda: text() | {"image_embeds": torch.randn(2, 4, 48), "pixel_mask": torch.ones(2, 4, dtype=torch.long)},
    ),
    "trocr": (trocr, lambda: text() | {"encoder_hidden_states": torch.randn(2, 5, 32)}),
    "qwen2-audio": (qwen2_audio, sound),
    "voxtral": (voxtral, sound),
    "yolos": (lambda: vision("Yolos", image_size=[32, 32], num_detection_tokens=3), image),
    "videomae": (
        lambda: vision("VideoMAE", num_frames=4, tubelet_size=2),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
    ),
    "vitpose": (
        lambda: t.VitPoseBackbone(
            t.VitPoseBackboneConfig(**(VISION | {"image_size": [32, 32], "patch_size": [8, 8]}), out_indices=[1, 2])
        ),
        image,
    ),
    "dpt": (lambda: vision("DPT"), image),
    "flava-image": (lambda: t.FlavaImageModel(t.FlavaImageConfig(**VISION)), image),
    "owlvit": (lambda: owl("OwlViT"), lambda: text() | image()),
    "owlv2": (lambda: owl("Owlv2"), lambda: text() | image()),
    "blip": (blip, lambda: text() | image()),
    "blip2": (lambda: blip2("Blip2"), queried),
    "instructblip": (lambda: blip2("InstructBlip"), instructed),
    "janus-vision": (lambda: t.JanusVisionModel(t.JanusVisionConfig(**VISION, projection_dim=16, mlp_ratio=2)), image),
    "persimmon": (lambda: causal("Persimmon", **rope(0.5)), text),
    "persimmon-plain": (lambda: causal("Persimmon", qk_layernorm=False, **rope(0.5)), text),
    "chameleon": (chameleon, text),
    "glm4v-text": (lambda: glm4v_text("Glm4v", 1.0), text),
    "glm4v-moe-text": (lambda: glm4v_text("Glm4vMoe", 0.5), text),
    "glm-ocr-text": (lambda: glm4v_text("GlmOcr", 1.0), text),
    "glm-image-text": (lambda: glm4v_text("GlmImage", 0.5), text),
    "decision-transformer": (decision, moves),
    "t5gemma": (t5gemma, pair),
    "glm4-moe-lite": (lambda: moe_mla("Glm4MoeLite"), text),
    "axk1": (lambda: moe_mla("AXK1"), text),
    "youtu": (lambda: causal("Youtu", **MLA), text),
    "minicpm3": (lambda: causal("MiniCPM3", **MLA), text),
    "mistral4": (mistral4, text),
    "kimi-linear": (kimi_linear, text),
    "mllama-text": (mllama_text, text),
    "mllama-vision": (mllama_vision, tiled),
    "ernie4_5-vl": (ernie_vl, text),
    "granite-swa": (lambda: granite_swa("GraniteSWA"), text),
    "olmo-hybrid": (lambda: olmo_hybrid(1e4), text),
    "olmo-hybrid-still": (lambda: olmo_hybrid(None), text),
    "privacy-filter": (privacy_filter, text),
    "esmc": (lambda: encoder("Esmc"), text),
    "dia": (dia, spoken),
    "seamless": (lambda: seamless("SeamlessM4T"), pair),
    "glm-asr": (glm_asr, sound),
    "lasr": (lasr, lambda: {"input_features": torch.randn(2, 40, 16)}),
    "chinese-clip": (lambda: clip_like("ChineseCLIP"), lambda: text() | image()),
    "git": (lambda: t.GitForCausalLM(t.GitConfig(**LM, vision_config=VISION)), lambda: text() | image()),
    "kosmos2-vision": (lambda: Kosmos2VisionModel(t.Kosmos2VisionConfig(**VISION)), image),
    "idefics2-vision": (
        lambda: Idefics2VisionTransformer(t.Idefics2VisionConfig(**VISION)),
        lambda: image() | {"patch_attention_mask": torch.ones(2, 4, 4, dtype=torch.bool)},
    ),
    "mlcd": (lambda: t.MLCDVisionModel(t.MLCDVisionConfig(**VISION)), image),
    "pix2struct": (pix2struct, placed),
    "sapiens2": (lambda: vision("Sapiens2", num_register_tokens=2, num_key_value_heads_per_layer=[2, 4]), image),
}
"""More classes that share one of those rows: the heart of the contract."""

MERGED = ("phimoe", "qwen2-moe", "olmoe")
"""Copies whose files hold the weights of each expert for themselves, each under other names."""
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "vit", "dinov3", "clip", "siglip", "wav2vec2")
SEQ2SEQ = ("whisper", "bart", "t5")
GENERATIVE = [n for n in CASES if n not in (*ENCODERS, *SEQ2SEQ)]
STILL = ("gpt2", "opt", "bloom", "gpt-bigcode", "gpt-bigcode-mha")
"""Language models that rotate nothing."""
LATENT = ("deepseek-v2", "deepseek-v3", "deepseek-v3-halves")
"""Those whose keys and values come out of a latent, and what turns stands beside it."""
MIXED = ("smollm3", "cohere2", "llama4")
"""Those that rotate in some of their layers."""
GROWING = ("ministral3", "llama4", "hunyuan")
"""Those whose queries grow with their position, or that weigh columns behind the rotation: distances aren't all."""
HYBRID = ("granite-hybrid", "lfm2")
"""Those that attend in one of their two layers; the other keeps a state."""
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
    model = make()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values")  # Llama 4's vision; `_constants` brings them back
        model.double().eval()
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
    wanted += out.get("feature_maps") or ()
    return torch.cat([x.flatten() for x in wanted])
