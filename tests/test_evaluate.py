"""Every score equals a slow reference that follows its stated protocol word by word."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import soundfile
import torch
import transformers as t
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import families
from clover.errors import CloverError
from clover.measure import evaluate as ev
from clover.measure.data import text_tokens
from clover.measure.files import Question, Utterance

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = "Question: Answer: Why? So. No. the correct answer is answer1 answer2 Ann Bob saw so hid _ long text"
ARC = (
    "Please choose the correct answer to the question: Why?\n\n"
    "Answer1: So. Answer2: No. No.\n\nAnswer format: answer1/answer2"
)
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


@pytest.fixture(scope="module")
def llama() -> t.LlamaForCausalLM:
    torch.manual_seed(0)
    config = t.LlamaConfig(vocab_size=60, max_position_embeddings=64, initializer_range=0.5, **TINY)
    return t.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> t.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *TEXT.split()])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="module")
def processor() -> t.WhisperProcessor:
    """Byte tokens and two seconds of sound."""
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), SPECIAL[0]])}
    speech = t.WhisperTokenizer(vocab=vocab, merges=[], pad_token=SPECIAL[0])
    speech.add_tokens(SPECIAL[1:], special_tokens=True)
    extractor = t.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    return t.WhisperProcessor(feature_extractor=extractor, tokenizer=speech)


@pytest.fixture
def clips(tmp_path: Path) -> list[Utterance]:
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, np.zeros(8000), 8000)
    texts = ["Hello, World!", "It's twenty one.", "Mr. Smith"]
    return [Utterance(tmp_path / f"{n}.wav", text) for n, text in zip("abc", texts, strict=True)]


class Typist(nn.Module):
    """Stands in for a speech model: writes what it was told to, and keeps the calls."""

    def __init__(self, processor: Any, lines: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float16))
        self.device, self.dtype = self.weight.device, self.weight.dtype
        self.generation_config = t.GenerationConfig(is_multilingual=True, lang_to_id={"<|en|>": 258})
        self.tokenizer, self.lines, self.calls = processor.tokenizer, iter(lines), []

    def generate(self, features: torch.Tensor, **options: Any) -> list[list[int]]:
        self.calls.append((features, options))
        return [self.tokenizer(next(self.lines)).input_ids for _ in features]


# --- perplexity ---


def slow_perplexity(model: Any, tokens: torch.Tensor, window: int, stride: int, front: list[int]) -> tuple[float, int]:
    """Score every token by itself, in the first window that holds it and something before it."""
    nats = []
    for target in range(1, len(tokens)):
        start = next((s for s in range(0, target, stride) if s < target < s + window), None)
        if start is not None:
            read = torch.cat([torch.tensor(front, dtype=torch.long), tokens[start:target]])
            logits = model(read[None]).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[tokens[target]].item())
    return math.exp(sum(nats) / len(nats)), len(nats)


@given(n=st.integers(2, 24), window=st.integers(3, 30), front=st.sampled_from([[], [7]]), data=st.data())
def test_perplexity_is_that_of_its_protocol(
    llama: Any, n: int, window: int, front: list[int], data: st.DataObject
) -> None:
    room = window - len(front)
    stride = data.draw(st.integers(1, room))
    tokens = torch.randint(60, (n,), generator=torch.Generator().manual_seed(n))
    with torch.inference_mode():
        value, scored = slow_perplexity(llama, tokens, room, stride, front)
    score = ev.perplexity(llama, tokens, window=window, stride=stride, start=next(iter(front), None))
    assert score.value == pytest.approx(value, rel=1e-4)
    told = {"window": window, "stride": stride, "tokens": n, "scored": scored, "dtype": "float32"}
    assert score.protocol == told | ({"start": 7} if front else {})


BEHIND = {
    "gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.3},
    "nanochat": {"final_logit_softcapping": 0.5}, "falcon-h1": {"lm_head_multiplier": 0.3},
}  # fmt: skip
"""Families whose own forward does something behind the output embeddings: a cap, a scale."""
COPIED = ("hyperclovax", "modernbert-decoder", "granite", "nanochat", "llava", "gemma3-image", "smolvlm", "qwen2-vl")
DECODERS = (
    "Bart",
    "BigBirdPegasus",
    "Blenderbot",
    "BlenderbotSmall",
    "MBart",
    "Marian",
    "Mvp",
    "Pegasus",
    "PLBart",
    "Whisper",
)


@pytest.mark.parametrize("name", [*families.GENERATIVE, *COPIED])
def test_logits_are_those_that_the_model_gives(name: str) -> None:
    model, _ = families.build(name, torch.float32)
    for setting, value in BEHIND.get(name, {}).items():
        assert hasattr(model.config, setting)
        setattr(model.config, setting, value)
        for owner in (model, model.model):
            if hasattr(owner, setting):
                setattr(owner, setting, value)
    check_perplexity(model)


@pytest.mark.parametrize("kind", DECODERS)
def test_logits_of_a_decoder_by_itself(kind: str) -> None:
    """Its forward goes past what it calls its base."""
    check_perplexity(decoder(kind))


def decoder(kind: str) -> Any:
    sizes = {"vocab_size": 60, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    torch.manual_seed(0)
    model = getattr(t, f"{kind}ForCausalLM")(getattr(t, f"{kind}Config")(**sizes, pad_token_id=0, init_std=0.3))
    return model.eval()


def check_perplexity(model: Any) -> None:
    tokens = torch.randint(3, 50, (14,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        value, _ = slow_perplexity(model, tokens, 9, 5, [])
    assert ev.perplexity(model, tokens, window=9, stride=5).value == pytest.approx(value, rel=1e-4)
    assert not any("forward" in vars(part) for part in model.modules()), "its own forward is back"


def test_a_model_without_a_part_that_hands_out_hidden_states() -> None:
    """Its logits are made whole."""

    class Plain(t.PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(t.PreTrainedConfig())
            self.table = nn.Embedding(60, 60)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
            return SimpleNamespace(logits=self.table(input_ids))

    check_perplexity(Plain())


def test_perplexity_beyond_all_numbers(llama: Any) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert ev.perplexity(model, torch.arange(20), window=8).value == math.inf


def test_outputs_that_are_no_numbers(llama: Any, tokenizer: Any) -> None:
    model, batches = copy.deepcopy(llama), [{"input_ids": torch.arange(6)[None]}]
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for measure in (
        lambda: ev.perplexity(model, torch.arange(20), window=8),
        lambda: ev.multiple_choice(model, tokenizer, [Question(ARC, "Why?", ("a", "b"), ("So.", "No."), 0)]),
        lambda: ev.embedding_cosine(llama.model, model.model, batches),
    ):
        with pytest.raises(CloverError, match="output is NaN; check its weights"):
            measure()


def test_tokens_that_the_model_does_not_know(llama: Any) -> None:
    with pytest.raises(CloverError, match="gives token 60, but the model knows 60; take the model's own"):
        ev.perplexity(llama, torch.arange(61), window=8)


def test_perplexity_of_an_untrained_guess_and_limit(llama: Any) -> None:
    head = llama.get_output_embeddings()
    with torch.no_grad():
        old, head.weight.data = head.weight.data, torch.zeros_like(head.weight)
        score = ev.perplexity(llama, torch.arange(50), window=8, limit=20)
        head.weight.data = old
    assert score.value == pytest.approx(60) and score.protocol["tokens"] == 20
    assert score.protocol["scored"] == 20 - 3  # the first of each window isn't scored


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 9}, {"limit": 1}])
def test_perplexity_of_nothing(llama: Any, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"stride is|at least 2 tokens"):
        ev.perplexity(llama, torch.arange(20), window=8, **options)


# --- word error rate ---


def test_word_error_rate_after_normalisation(processor: Any, clips: list[Utterance]) -> None:
    model = Typist(processor, [" hello word", " it is 21", " mister Smith um"])
    score = ev.word_error_rate(model, processor, clips, batch=2)
    assert score.task == "wer" and score.value == pytest.approx(100 * 1 / 7)  # 'word' for 'world'
    assert [len(features) for features, _ in model.calls] == [2, 1]
    features, options = model.calls[0]
    assert features.shape == (2, 8, 200) and features.dtype == torch.float16
    assert options == {
        "num_beams": 1,
        "do_sample": False,
        "return_timestamps": False,
        "language": "en",
        "task": "transcribe",
    }
    expected = {
        "utterances": 3,
        "words": 7,
        "substitutions": 1,
        "deletions": 0,
        "insertions": 0,
        "beams": 1,
        "language": "en",
    }
    assert expected.items() <= score.protocol.items() and "no spelling table" in score.protocol["normaliser"]


def test_spelling_table_of_the_tokenizer_is_used(
    processor: Any, clips: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.tokenizer, "english_spelling_normalizer", {"colour": "color"})
    clip = Utterance(clips[0].file, "color")
    score = ev.word_error_rate(Typist(processor, [" colour"]), processor, [clip])
    assert score.value == 0 and "spelling table of the tokenizer" in score.protocol["normaliser"]


def test_english_only_model_is_told_no_language(processor: Any, clips: list[Utterance]) -> None:
    model = Typist(processor, [" hello world"])
    model.generation_config.is_multilingual = False
    score = ev.word_error_rate(model, processor, clips, limit=1)
    assert score.value == 0 and score.protocol["utterances"] == 1 and "language" not in model.calls[0][1]


def test_nothing_to_transcribe(processor: Any, clips: list[Utterance]) -> None:
    with pytest.raises(CloverError, match="no utterances"):
        ev.word_error_rate(Typist(processor, []), processor, [])
    with pytest.raises(CloverError, match=r"a\.wav after normalisation"):
        ev.word_error_rate(Typist(processor, []), processor, [Utterance(clips[0].file, "?!")])
    model = Typist(processor, [])
    del model.generation_config.lang_to_id
    with pytest.raises(CloverError, match="lang_to_id"):
        ev.word_error_rate(model, processor, clips)


# --- multiple choice ---

QUESTIONS = [
    Question(ARC, "Why?", ("answer1", "answer2"), ("So.", "No. No."), 0),
    Question(ARC, "Why? Ann saw Bob", ("answer1", "answer2"), ("the long text", "So."), 1),
    Question("given sentence: Ann saw", "Ann saw", ("answer1", "answer2"), ("Bob", "text so long"), 1),
    Question(
        "given sentence: Ann saw _ so Bob hid", "Ann saw _ so Bob hid", ("answer1", "answer2"), ("Ann", "long text"), 0
    ),
]


def pairs(question: Question, candidates: str) -> list[tuple[str, str]]:
    if candidates == "labels":
        return [(question.instruction, f"the correct answer is {label}") for label in question.labels]
    if "_" in question.stem:
        return [(f"Ann saw {text}", "so Bob hid") for text in question.texts]
    stem = question.stem if "sentence" in question.instruction else f"Question: {question.stem} Answer:"
    return [(stem, text) for text in question.texts]


@pytest.mark.parametrize("candidates", ["texts", "labels"])
def test_choice_is_the_likeliest_candidate_per_token(llama: Any, tokenizer: Any, candidates: Any) -> None:
    right = 0
    for question in QUESTIONS:
        scores = []
        for prompt, text in pairs(question, candidates):
            ids, tail = tokenizer(f"{prompt} {text}").input_ids, tokenizer(text).input_ids
            logits = llama(torch.tensor([ids])).logits[0, -len(tail) - 1 : -1].log_softmax(-1)
            scores.append(logits[range(len(tail)), tail].mean().item())
        assert ev._likelihoods(llama, tokenizer, ev.continuations(question, candidates)).tolist() == pytest.approx(
            scores, rel=1e-4
        )
        right += scores.index(max(scores)) == question.answer
    score = ev.multiple_choice(llama, tokenizer, QUESTIONS, candidates=candidates)
    assert score.value == right / 4
    assert ev.multiple_choice(llama, tokenizer, QUESTIONS, candidates=candidates, batch=3) == score
    assert {
        "questions": 4,
        "candidates": candidates,
        "chance": 0.5,
        "dtype": "float32",
    }.items() <= score.protocol.items()


def test_choice_of_a_decoder_by_itself(tokenizer: Any) -> None:
    model = decoder("Bart")
    ids = tokenizer("Ann saw Bob").input_ids
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert ev._likelihoods(model, tokenizer, [("Ann saw", " Bob")]).item() == pytest.approx(
        logits[1, ids[2]].item(), rel=1e-4
    )


def test_tokens_that_merge_with_the_prompt_are_scored() -> None:
    assert ev._shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert ev._shared([], [1, 2]) == 1


def test_no_questions_and_too_long_a_question(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(CloverError, match="no questions"):
        ev.multiple_choice(llama, tokenizer, [])
    endless = Question(ARC, "Why? " * 70, ("answer1", "answer2"), ("So.", "No."), 0)
    with pytest.raises(CloverError, match="64 positions"):
        ev.multiple_choice(llama, tokenizer, [endless])


# --- agreement ---


def test_cosine_of_mean_pooled_embeddings() -> None:
    torch.manual_seed(0)
    dense, pruned = (t.BertModel(t.BertConfig(vocab_size=60, max_position_embeddings=32, **TINY)).eval() for _ in "ab")
    ids, mask = torch.randint(1, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}]
    assert ev.embedding_cosine(dense, dense, batches).value == pytest.approx(1)
    with torch.no_grad():
        rows = [
            [m(ids[i : i + 1, :n]).last_hidden_state[0].mean(0) for m in (dense, pruned)]
            for i, n in [(0, 9), (1, 5), (0, 9)]
        ]
    expected = [torch.cosine_similarity(a, b, 0).item() for a, b in rows]
    score = ev.embedding_cosine(dense, pruned, batches)
    assert score.value == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert score.protocol["items"] == 3 and score.protocol["lowest"] == pytest.approx(min(expected), abs=1e-5)
    with pytest.raises(CloverError, match="nothing to embed"):
        ev.embedding_cosine(dense, dense, [])


@pytest.mark.parametrize("name", ["dinov3", "internvl", "llama4", "llava", "switch-transformers"])
def test_cosine_where_the_base_is_not_what_reads_the_inputs(name: str) -> None:
    model, batch = families.build(name, torch.float32)
    assert ev.embedding_cosine(model, model, [batch]).value == pytest.approx(1)


def test_cosine_where_the_mask_is_one_of_samples() -> None:
    model, batch = families.build("wav2vec2", torch.float32)
    mask = torch.ones_like(batch["input_values"], dtype=torch.long)
    assert ev.embedding_cosine(model, model, [batch | {"attention_mask": mask}]).value == pytest.approx(1)


def test_a_learned_prompt_is_not_left_out_in_silence(llama: Any) -> None:
    prompted = peft.get_peft_model(
        copy.deepcopy(llama), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(CloverError, match=r"PROMPT_TUNING.* measure adapters of weights"):
        ev.perplexity(prompted, torch.arange(9))


# --- the verb ---


@pytest.fixture
def language_folder(tmp_path: Path, llama: Any, tokenizer: Any) -> Path:
    for thing in (llama, tokenizer):
        thing.save_pretrained(tmp_path / "language")
    return tmp_path / "language"


def test_evaluate_perplexity(language_folder: Path, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(f"{TEXT} " * 10)
    score = ev.evaluate(language_folder, tmp_path / "t.txt", "perplexity", limit=150)
    tokens = tokenizer((tmp_path / "t.txt").read_text(), return_tensors="pt").input_ids[0]
    assert score.value == pytest.approx(ev.perplexity(llama, tokens, window=64, limit=150).value, rel=1e-5)
    assert score.to_dict().keys() == {"task", "value", "protocol"} and json.dumps(score.to_dict())


def test_a_token_in_front_of_any_text(tokenizer: Any) -> None:
    """It belongs to every window, not to the text."""
    plain, none = text_tokens(TEXT, tokenizer)
    assert none is None

    class Starting:
        bos_token_id = 1

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[1, *tokenizer(text).input_ids])

    tokens, start = text_tokens(TEXT, Starting())
    assert start == 1 and torch.equal(tokens, plain) and tokens.dtype == torch.int64


def test_evaluate_choice(language_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": ARC, "output": "-", "answer": f"answer{1 + i % 2}"}) for i in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    score = ev.evaluate(str(language_folder), str(tmp_path / "q.jsonl"), "choice")
    assert score.task == "choice" and score.value == 0.5 and score.protocol["questions"] == 4
    assert ev.evaluate(language_folder, tmp_path / "q.jsonl", "choice", limit=3).protocol["questions"] == 3


def test_evaluate_speech(processor: Any, clips: list[Utterance], tmp_path: Path) -> None:
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    tiny = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 256) | {"decoder_start_token_id": 257}
    sizes = {
        "vocab_size": 261,
        "num_mel_bins": 8,
        "d_model": 16,
        "max_source_positions": 100,
        "max_target_positions": 24,
    }
    model = t.WhisperForConditionalGeneration(t.WhisperConfig(**tiny, **tokens, **sizes, begin_suppress_tokens=None))
    names = {"lang_to_id": {"<|en|>": 258}, "task_to_id": {"transcribe": 259}, "no_timestamps_token_id": 260}
    for name, value in {**names, "is_multilingual": True, "max_length": 8, "_from_model_config": False}.items():
        setattr(model.generation_config, name, value)
    for thing in (model, processor):
        thing.save_pretrained(tmp_path / "speech")
    (tmp_path / "m.tsv").write_text("file\ttext\tsplit\na.wav\tone\ttest\nb.wav\ttwo\ttest\nc.wav\tthree\tdev\n")
    score = ev.evaluate(tmp_path / "speech", tmp_path / "m.tsv", "wer", split="test")
    assert score.task == "wer" and score.protocol["utterances"] == 2 and score.value > 0


@pytest.mark.parametrize("name, task, options, said", [
    ("t.txt", "speed", {}, "task is 'speed'"),
    ("t.txt", "wer", {}, r"t\.txt holds text"),
    ("q.jsonl", "perplexity", {}, r"q\.jsonl holds questions"),
    ("t.txt", "perplexity", {"split": "test"}, "split is 'test'"),
    ("t.txt", "perplexity", {"limit": 1}, "limit is 1"),
    ("q.jsonl", "choice", {"limit": 0}, "limit is 0"),
    ("q.jsonl", "choice", {}, "holds no text"),
    ("gone.txt", "perplexity", {}, "does not exist"),
    ("t.txt", "perplexity", {}, "holds no text"),
])  # fmt: skip
def test_what_cannot_be_evaluated(
    language_folder: Path, tmp_path: Path, name: str, task: str, options: dict[str, Any], said: str
) -> None:
    for empty in ("t.txt", "q.jsonl"):
        (tmp_path / empty).touch()
    with pytest.raises(CloverError, match=said):
        ev.evaluate(language_folder, tmp_path / name, task, **options)


def test_model_that_does_not_suit_the_task(language_folder: Path, clips: list[Utterance], tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text("file\ttext\na.wav\tone\n")
    with pytest.raises(CloverError, match=r"Whisper model, but .*LlamaForCausalLM"):
        ev.evaluate(language_folder, tmp_path / "m.tsv", "wer")
    families.build("speech2text", torch.float32)[0].save_pretrained(tmp_path / "other")
    with pytest.raises(CloverError, match=r"Whisper model, but .*Speech2TextForConditionalGeneration"):
        ev.evaluate(tmp_path / "other", tmp_path / "m.tsv", "wer")
    t.BertModel(t.BertConfig(vocab_size=60, **TINY)).save_pretrained(tmp_path / "bert")
    (tmp_path / "t.txt").write_text("long text")
    with pytest.raises(CloverError, match=r"causal language model, but .*BertModel"):
        ev.evaluate(tmp_path / "bert", tmp_path / "t.txt", "perplexity")


def test_missing_extra(processor: Any, clips: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
    with pytest.raises(CloverError, match=r"jiwer.*clover-attention\[eval\]"):
        ev.word_error_rate(Typist(processor, []), processor, clips)


def test_real_speech(whisper: Path, speech: Path) -> None:
    score = ev.evaluate(whisper, speech / "manifest.tsv", "wer", split="test", limit=1)
    assert score.value < 10 and score.protocol["words"] == 27
