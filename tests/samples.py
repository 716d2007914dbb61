"""Tokenizers, processors, tiny models for them, and files: what tests of data are given."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(50)]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
ARC = (
    "Please choose the correct answer to the question: Why?\n\n"
    "Answer1: So. Answer2: Not so: no. Answer format: answer1/answer2"
)


def tokenizer(brackets: bool = False) -> t.PreTrainedTokenizerFast:
    """One token a word; ``brackets`` puts [CLS] and [SEP] around a text, as BERT does."""
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}, "[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if brackets:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def whisper_processor() -> t.WhisperProcessor:
    """Byte tokens and two seconds of sound."""
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), SPECIAL[0]])}
    speech = t.WhisperTokenizer(vocab=vocab, merges=[])
    speech.add_tokens(SPECIAL[1:], special_tokens=True)
    return t.WhisperProcessor(
        feature_extractor=t.WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer=speech
    )


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> t.LlamaForCausalLM:
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=60, max_position_embeddings=64, **TINY)).eval()


def bert(kind: str) -> Any:
    config = getattr(t, f"{kind}Config")(vocab_size=60, max_position_embeddings=34, pad_token_id=0, **TINY)
    return getattr(t, f"{kind}Model")(config).eval()


def whisper_config() -> t.WhisperConfig:
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    tiny = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 256)
    sizes = {
        "vocab_size": 270,
        "num_mel_bins": 8,
        "d_model": 16,
        "max_source_positions": 100,
        "max_target_positions": 24,
    }
    return t.WhisperConfig(**tiny, **tokens, **sizes, decoder_start_token_id=257)


def clip() -> t.CLIPModel:
    text = TINY | {"vocab_size": 60, "max_position_embeddings": 20}
    vision = TINY | {"image_size": 16, "patch_size": 8}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)).eval()


def text_file(folder: Path, words: int) -> Path:
    path = folder / "t.txt"
    path.write_text(" ".join(WORDS[i % len(WORDS)] for i in range(words)))
    return path


def questions_file(path: Path, *records: object) -> Path:
    content = "\n".join(json.dumps(r) for r in records) + "\n\n"
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(content)
    return path
