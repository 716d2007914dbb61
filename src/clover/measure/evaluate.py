"""Measure what a model can do: perplexity, word error rate, multiple choice, agreement with another model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from clover.errors import CloverError, warn
from clover.extras import extra
from clover.measure.data import audio_features, load_processor, text_tokens
from clover.measure.files import Question, Utterance, file_kind, read_manifest, read_questions, read_text
from clover.model.answers import check_words, padding, valid
from clover.model.precision import ready
from clover.model.running import replaced
from clover.model.traits import accepts, encoder, is_multilingual, is_whisper, max_positions, writes_text
from clover.progress import track
from clover.pruning.checkpoint import load

TASKS = {"perplexity": "text", "wer": "manifest", "choice": "questions"}
NO_NUMBER = "the model's output is NaN; check its weights, or use a dtype with a larger range, float32 or bfloat16"


@dataclass(frozen=True)
class Score:
    """One measured number. ``protocol`` says everything that is needed to measure it again."""

    task: str
    value: float
    protocol: dict

    def to_dict(self) -> dict:
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    start: int | None = None,
) -> Score:
    """Perplexity of a causal language model on one long text.

    Windows of ``window`` tokens start every ``stride`` tokens; each token is scored once, in the first window that
    holds it, with everything before it in that window as context. The first token of the text is never scored; with
    non-overlapping windows (``stride == window``, the default) neither is the first of any window. What is too large
    for a float is infinite.

    Args:
        tokens: token ids of the whole text, shape ``(n,)``, integer.
        window: tokens a window, context included.
        stride: tokens between window starts, 1 to ``window`` (less one, if there is a ``start``).
        limit: read at most this many tokens.
        start: a token that the model wants in front of any text (see ``data.text_tokens``): every window begins
            with it, and it is never scored.

    Raises:
        CloverError: fewer than two tokens, a stride outside ``1..window``, or logits that are NaN.
    """
    front = tokens.new_tensor([] if start is None else [start])
    room = window - len(front)
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        whole = f"the window, {room}" if start is None else f"the window less its first token, {room}"
        raise CloverError(f"stride is {stride}; it must lie between 1 and {whole}")
    tokens, front = (t.to(next(model.parameters()).device) for t in (tokens[:limit], front))
    if len(tokens) < 2:
        raise CloverError(
            f"perplexity needs at least 2 tokens, got {len(tokens)}; give a longer text, or a higher limit"
        )
    check_words(tokens, model)
    body, total, count, scored = _body(model), 0.0, 0, 0
    for at in track(range(0, len(tokens) - 1, stride), "perplexity"):
        piece = tokens[at : at + room]
        fresh = len(piece) - max(scored - at, 1)  # targets that no earlier window has scored
        if fresh <= 0:
            break
        nll = _negative_log_likelihood(model, body, torch.cat([front, piece]))[-fresh:]
        total, count, scored = total + nll.sum().item(), count + fresh, at + len(piece)
    if math.isnan(total):
        raise CloverError(NO_NUMBER)
    protocol = {"window": window, "stride": stride, "tokens": len(tokens), "scored": count, "dtype": _dtype(model)}
    value = torch.tensor(total / count, dtype=torch.float64).exp().item()  # math.exp raises where this gives infinity
    return Score("perplexity", value, protocol | ({} if start is None else {"start": start}))


def _negative_log_likelihood(model: Any, body: Any, piece: torch.Tensor, chunk: int = 128) -> torch.Tensor:
    """Nats for each of ``piece[1:]``; logits are made ``chunk`` rows at a time, for they dwarf the hidden states."""
    hidden, head = _read(model, body, piece[None])
    rows = [
        nn.functional.cross_entropy(head(some), target, reduction="none")
        for some, target in zip(hidden[0, :-1].split(chunk), piece[1:].split(chunk), strict=True)
    ]
    return torch.cat(rows)


def _read(
    model: Any, body: Any, ids: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What a model makes of tokens, ``(batch, tokens, width)``, and what makes float32 logits of some of its rows."""
    if body is None:
        return _whole(model)(input_ids=ids, use_cache=False, **options).logits, torch.Tensor.float
    states = body(ids, use_cache=False, **options)
    return states.last_hidden_state, partial(_logits, model, body, states)


def _logits(model: Any, body: Any, states: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``(rows, vocabulary)``, float32, of some last hidden states ``(rows, width)``.

    The model's own forward makes them, with whatever it does behind its output embeddings (a soft cap, a scale): only
    its body hands out ``hidden`` in the place of ``states``.
    """
    given = copy.copy(states)
    given["last_hidden_state"] = hidden[None]
    nothing = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with replaced({body: lambda *args, **kwargs: given}):
        return _whole(model)(input_ids=nothing, use_cache=False).logits[0].float()


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@torch.inference_mode()
def word_error_rate(
    model: Any, processor: Any, utterances: Sequence[Utterance], batch: int = 4, limit: int | None = None
) -> Score:
    """Word error rate, in percent, of English transcriptions by a Whisper-like model.

    Decoding is greedy, in one window, without timestamps; a multilingual model is told that the language is English
    and the task is to transcribe, and everything else (such as suppressed tokens) is as its generation config says.
    Reference and transcription go through Whisper's English normaliser. It maps British to American spelling only if
    the tokenizer brings the table for it (``normalizer.json``).

    Args:
        model: has ``generate``.
        processor: its feature extractor and tokenizer.
        utterances: audio files and what is said in them.
        batch: utterances at once.
        limit: use only the first so many utterances.

    Raises:
        CloverError: nothing to transcribe, a bad audio file, a generation config without languages, or the ``eval``
            extra is not installed.
    """
    jiwer = extra("jiwer")
    chosen = list(utterances[:limit])
    spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None) or {}
    normalise = EnglishTextNormalizer(spelling)
    references = [normalise(u.text) for u in chosen]
    if empty := [str(u.file) for u, text in zip(chosen, references, strict=True) if not text.strip()]:
        raise CloverError(f"no words are left of the reference of {empty[0]} after normalisation; correct its text")
    if not chosen:
        raise CloverError("there are no utterances to transcribe; give at least one")
    multilingual = is_multilingual(model)
    if multilingual and not hasattr(model.generation_config, "lang_to_id"):
        raise CloverError("generation_config.json names no languages (lang_to_id); take it from the original model")
    language = {"language": "en", "task": "transcribe"} if multilingual else {}
    transcripts: list[str] = []
    for start in track(range(0, len(chosen), batch), "transcribing"):
        files = [u.file for u in chosen[start : start + batch]]
        features = audio_features(files, processor.feature_extractor).to(model.device, model.dtype)
        written = model.generate(features, num_beams=1, do_sample=False, return_timestamps=False, **language)
        transcripts += processor.tokenizer.batch_decode(written, skip_special_tokens=True)
    counts = jiwer.process_words(references, [normalise(text) for text in transcripts])
    protocol = {
        "utterances": len(chosen),
        "words": sum(len(words) for words in counts.references),
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "unit": "percent",
        "beams": 1,
        "language": "en" if multilingual else "not set: the model knows only one",
        "normaliser": "Whisper's EnglishTextNormalizer of transformers, numbers as digits, "
        + ("spelling table of the tokenizer" if spelling else "no spelling table"),
        "batch": batch,
        "dtype": _dtype(model),
    }
    return Score("wer", 100 * counts.wer, protocol)


@torch.inference_mode()
def multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    limit: int | None = None,
    *,
    candidates: Literal["texts", "labels"] = "texts",
    batch: int = 1,
) -> Score:
    """Share of questions, 0 to 1, whose right answer has the largest log-likelihood per token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: what to ask.
        limit: use only the first so many questions.
        candidates: "texts" scores what the choices say after the bare question, for models that were not tuned on
            the template: ``Question: STEM``, then ``Answer:`` and a choice; an unfinished sentence and a choice;
            or, where the sentence has a blank, what follows the blank once a choice fills it. "labels" scores
            ``the correct answer is answer1`` after the whole instruction, for models that were.
        batch: questions at once, those of like length together.

    Raises:
        CloverError: there are no questions, one is too long for the model, or logits are NaN.
    """
    chosen = list(questions[:limit])
    if not chosen:
        raise CloverError("there are no questions to answer; give at least one")
    right = 0
    chosen.sort(key=lambda question: len(question.instruction))
    for start in track(range(0, len(chosen), batch), "answering"):
        asked = [(q, continuations(q, candidates)) for q in chosen[start : start + batch]]
        scores = _likelihoods(model, tokenizer, [pair for _, pairs in asked for pair in pairs])
        if scores.isnan().any():
            raise CloverError(NO_NUMBER)
        each = scores.split([len(pairs) for _, pairs in asked])
        right += sum(int(mine.argmax()) == q.answer for (q, _), mine in zip(asked, each, strict=True))
    protocol = {
        "questions": len(chosen),
        "candidates": candidates,
        "score": "mean log-likelihood per token of the candidate",
        "chance": sum(1 / len(q.labels) for q in chosen) / len(chosen),
        "dtype": _dtype(model),
    }
    return Score("choice", right / len(chosen), protocol)


def continuations(question: Question, candidates: str) -> list[tuple[str, str]]:
    """(prompt, scored text) of every choice; see ``candidates`` of ``multiple_choice``."""
    if candidates == "labels":
        return [(f"{question.instruction}\n", f"the correct answer is {label}") for label in question.labels]
    before, blank, after = question.stem.partition("_")
    if "given sentence: " not in question.instruction:
        return [(f"Question: {question.stem}\nAnswer:", f" {text}") for text in question.texts]
    if blank and after.strip():
        return [(f"{before}{text}", after) for text in question.texts]
    return [(question.stem, f" {text}") for text in question.texts]


def _likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Mean log-likelihood per token of each scored text after its prompt, shape ``(pairs,)``."""
    wholes = [tokenizer(prompt + text).input_ids for prompt, text in pairs]
    starts = [_shared(tokenizer(prompt).input_ids, ids) for (prompt, _), ids in zip(pairs, wholes, strict=True)]
    longest, bound = max(map(len, wholes)), max_positions(model)
    if bound and longest > bound:
        raise CloverError(f"a question takes {longest} tokens, but the model has {bound} positions; leave it out")
    # Padding on the right is out of sight of causal attention.
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in wholes], batch_first=True).to(model.device)
    check_words(ids, model)
    mask = torch.arange(longest) < torch.tensor([len(whole) for whole in wholes])[:, None]
    hidden, head = _read(model, _body(model), ids, attention_mask=mask.long().to(ids.device))
    spans = [(i, start, len(whole)) for i, (start, whole) in enumerate(zip(starts, wholes, strict=True))]
    logits = head(torch.cat([hidden[i, a - 1 : b - 1] for i, a, b in spans]))
    targets = torch.cat([ids[i, a:b] for i, a, b in spans])
    nats = nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([-piece.mean() for piece in nats.split([b - a for _, a, b in spans])])


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning, at least 1: tokens at the border may merge, and the first is never scored."""
    return max(1, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


@torch.inference_mode()
def embedding_cosine(dense: nn.Module, pruned: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Score:
    """Mean cosine between the embeddings that two models give to the same inputs; 1 is full agreement.

    An embedding is the mean of the encoder's last hidden states, over what ``attention_mask`` shows.

    Args:
        dense: the model to agree with.
        pruned: the other one.
        batches: inputs of the encoder, such as :func:`clover.measure.data.calibration_batches` gives.

    Raises:
        CloverError: there are no batches, or a model has no last hidden state, or one that is NaN.
    """
    cosines = [
        nn.functional.cosine_similarity(_embed(dense, b), _embed(pruned, b)) for b in track(batches, "embedding")
    ]
    if not cosines:
        raise CloverError("there is nothing to embed; give at least one batch")
    items = torch.cat(cosines)
    if items.isnan().any():
        raise CloverError(NO_NUMBER)
    protocol = {"items": len(items), "lowest": items.min().item(), "pooling": "mean", "dtype": _dtype(pruned)}
    return Score("cosine", items.mean().item(), protocol)


def _embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    run = encoder(model)
    reads = accepts(run)
    hidden = getattr(run(**{k: v for k, v in batch.items() if k in reads}), "last_hidden_state", None)
    if hidden is None:
        raise CloverError(f"{type(run).__name__} gives no last hidden state; compare its text or vision model")
    mask = valid(hidden, padding(batch, model).encoder)[..., None].double()
    return (hidden.double() * mask).sum(1) / mask.sum(1)


def evaluate(
    model_name_or_path: str | Path, data: str | Path, task: str, split: str | None = None, limit: int | None = None
) -> Score:
    """Measure a saved model, pruned or not, on a file; on the GPU if there is one, else in float32 on the CPU.

    Args:
        model_name_or_path: a folder or a hub name; its tokenizer or processor is read from the same place.
        data: a text for "perplexity" (windows of 1024 tokens, or of all positions that the model has), a manifest for
            "wer", questions for "choice".
        task: "perplexity", "wer" (percent) or "choice" (share of right answers, 0 to 1).
        split: rows of the manifest; by default all.
        limit: use only the first so many tokens, utterances or questions.

    Raises:
        CloverError: an unknown task, a file or a model that does not go with it, or a limit too small.
    """
    if task not in TASKS:
        raise CloverError(f"task is '{task}'; choose one of {', '.join(TASKS)}")
    if (kind := file_kind(data)) != TASKS[task]:
        raise CloverError(f"{data} holds {kind}, but {task} is measured on {TASKS[task]}; give such a file")
    if split is not None and kind != "manifest":
        raise CloverError(f"split is '{split}', but only a manifest has splits, and {data} is none; leave it out")
    if limit is not None and limit < (least := 2 if kind == "text" else 1):
        raise CloverError(f"limit is {limit}; it must be at least {least}")
    read: Any = {"text": read_text, "questions": read_questions}.get(kind, partial(read_manifest, split=split))
    content = read(data)
    if kind == "manifest" and split is None and any(u.split == "calibration" for u in content):
        warn(f"{data} has rows of split calibration, which clover prune calibrates on; choose others by a split")
    model = _load(model_name_or_path, task)
    if task == "wer":
        processor = load_processor(model_name_or_path, "AutoProcessor")
        if not hasattr(processor, "feature_extractor"):
            raise CloverError(f"{model_name_or_path} lacks its feature extractor; copy preprocessor_config.json there")
        return word_error_rate(model, processor, content, limit=limit)
    tokenizer = load_processor(model_name_or_path, "AutoTokenizer")
    if task == "choice":
        return multiple_choice(model, tokenizer, content, limit)
    tokens, start = text_tokens(content, tokenizer, limit)
    return perplexity(model, tokens, window=min(1024, max_positions(model) or 1024), limit=limit, start=start)


def _whole(model: Any) -> Any:
    """The model; of one with a peft adapter, what the adapter is in.

    Raises:
        CloverError: the adapter is none of weights.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise CloverError(
            f"a prompt learned by {model.active_peft_config.peft_type.value} stands outside of the model and would be "
            "left out; measure adapters of weights"
        )
    return getattr(model, "get_base_model", lambda: model)()


def _body(model: Any) -> Any:
    """The part of a causal language model that its head has the last hidden states from; None if there is none.

    A run on one token tells, for it is not always ``base_model``: some forwards go past that to the decoder in it, and
    some models have only themselves for a base. Of parts in one another the outermost ends last.
    """
    whole, ended = _whole(model), []

    def note(part: nn.Module, _: Any, out: Any) -> None:
        if hasattr(out, "last_hidden_state"):
            ended.append(part)

    parts = [part for part in whole.modules() if isinstance(part, PreTrainedModel) and part is not whole]
    hooks = [part.register_forward_hook(note) for part in parts]
    try:
        whole(input_ids=torch.zeros(1, 1, dtype=torch.long, device=whole.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return ended[-1] if ended else None


def _load(name: str | Path, task: str) -> Any:
    """A model that can do the task."""
    model, _ = ready(load(str(name)))
    if not (is_whisper(model) and model.can_generate() if task == "wer" else writes_text(model)):
        wanted = "a Whisper model" if task == "wer" else "a causal language model"
        raise CloverError(f"{task} needs {wanted}, but {name} is a {type(model).__name__}; choose another model")
    return model.eval()
