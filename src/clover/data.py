"""From files to model inputs: texts, audio manifests, question lists and folders of images."""

from __future__ import annotations

import csv
import gzip
import importlib
import inspect
import io
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import transformers
from torch import nn

from clover.errors import CloverError
from clover.progress import track

T = TypeVar("T")
Kind = Literal["text", "manifest", "questions", "images"]
KINDS: dict[str, Kind] = {".txt": "text", ".tsv": "manifest", ".jsonl": "questions"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CHARACTERS = 16  # a generous guess at those of one token; decides how much of a long text is tokenised at all


@dataclass(frozen=True)
class Utterance:
    """One audio file, what is said in it, and the split that the manifest puts it in."""

    file: Path
    text: str
    split: str | None = None


@dataclass(frozen=True)
class Question:
    """One multiple-choice question in the template of LLM-Adapters.

    ``instruction`` is all of it, ``stem`` the bare question or unfinished sentence, ``labels`` the choices by name
    ("answer1", "true"), ``texts`` what they stand for (or the labels again), ``answer`` the index of the right one.
    """

    instruction: str
    stem: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: int


def file_kind(path: str | Path) -> Kind:
    """What a path holds, judged by its name: text, manifest, questions (each may end in ``.gz``) or images (a folder).

    Raises:
        CloverError: nothing is there, or the ending is none of those.
    """
    if (path := Path(path)).is_dir():
        return "images"
    if not path.exists():
        raise CloverError(f"{path} does not exist; give a .txt, .tsv or .jsonl file or a folder of images")
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in KINDS:
        raise CloverError(f"{path} is of no known kind; give {', '.join(KINDS)}, any with .gz, or a folder of images")
    return KINDS[ending]


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, unpacked where the name ends in ``.gz``.

    Raises:
        CloverError: the file is missing, unreadable, corrupt or no UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if Path(path).suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CloverError(f"{path} cannot be read as UTF-8 text ({error}); give another file") from error
    return text.replace("\r\n", "\n")


def read_manifest(path: str | Path, split: str | None = None) -> list[Utterance]:
    """The rows of a tab-separated file with columns ``file``, ``text`` and optionally ``split``, in their order.

    Args:
        path: the manifest; its audio files are named relative to its folder.
        split: keep only the rows of this split.

    Raises:
        CloverError: a column, a field or an audio file is missing, or no row is left.
    """
    path = Path(path)
    table = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns, rows = table.fieldnames or [], list(table)
    for column in ("file", "text") if split is None else ("file", "text", "split"):
        if column not in columns:
            raise CloverError(f"{path} has no column '{column}', only {list(columns)}; name it in the first line")
    chosen = [row for row in rows if split is None or row["split"] == split]
    if not chosen:
        found = f"its splits are {sorted({str(row['split']) for row in rows})}" if rows and split else "it has no rows"
        raise CloverError(f"{path} holds no utterance{f' of split {split!r}' if split else ''}; {found}")
    return [_utterance(path, row) for row in chosen]


def _utterance(manifest: Path, row: dict[str, str | None]) -> Utterance:
    name, text = row["file"], row["text"]
    if not name or not text:
        raise CloverError(f"{manifest} has a row without file or text: {list(row.values())}; complete it")
    file = manifest.parent / name
    if not file.is_file():
        raise CloverError(f"audio file {file}, listed in {manifest}, does not exist; correct the row or add the file")
    return Utterance(file, text, row.get("split"))


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """One audio file in any format that libsndfile reads: float32 samples of shape ``(n,)``, mono, at ``rate`` Hz.

    Channels are averaged, then resampled with soxr.

    Raises:
        CloverError: the file is missing, corrupt, empty or not finite, or the ``eval`` extra is not installed.
    """
    soundfile = extra("soundfile")
    if not Path(path).is_file():
        raise CloverError(f"audio file {path} does not exist; correct the path")
    try:
        samples, original = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise CloverError(f"audio file {path} cannot be decoded ({error}); replace it") from error
    if not len(samples) or not np.isfinite(samples).all():
        raise CloverError(f"audio file {path} is empty or holds NaN or infinite samples; replace it")
    samples = samples.mean(axis=1)
    return samples if original == rate else extra("soxr").resample(samples, original, rate)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a ``.jsonl[.gz]`` file whose lines hold ``instruction`` and ``answer`` (LLM-Adapters).

    An instruction ends in ``Answer format: a/b/...``, which names the choices; what they stand for is read from
    ``A: ... B: ...`` in front of it.

    Raises:
        CloverError: the file is empty, or a line is no JSON object, lacks a field or names no choices.
    """
    return [_question(record, where) for where, record in read_records(path)]


def read_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a ``.jsonl[.gz]`` file that have ``instruction`` and ``answer``, each with where it stands."""
    lines = [(f"line {i} of {path}", line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise CloverError(f"{path} holds no questions; give one JSON object a line")
    return [(where, _record(line, where)) for where, line in lines]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["instruction"], str) and isinstance(record["answer"], str):
            return record
    except (json.JSONDecodeError, KeyError, TypeError):
        pass
    raise CloverError(f"{where} must be a JSON object with strings 'instruction' and 'answer'; got {line[:80]!r}")


def _question(record: dict[str, Any], where: str) -> Question:
    instruction, answer = record["instruction"], record["answer"]
    ending = re.search(r"\s*Answer format: (\S+/\S+)\s*$", instruction)
    if not ending:
        raise CloverError(f"{where}: the instruction does not end in 'Answer format: a/b/...', which names the choices")
    labels = tuple(ending[1].split("/"))
    if answer not in labels:
        raise CloverError(f"{where}: the answer is '{answer}', which is none of the choices {list(labels)}")
    body = instruction[: ending.start()]
    choices = "".join(rf"\s+{re.escape(label.capitalize())}:\s*(.+?)" for label in labels)
    spelled = re.search(choices + r"\s*$", body, re.DOTALL)
    stem = body[: spelled.start()] if spelled else body
    stem = re.split(r"\b(?:question|sentence): ", stem, maxsplit=1)[-1].strip()
    return Question(instruction, stem, labels, spelled.groups() if spelled else labels, labels.index(answer))


def calibration_batches(
    path: str | Path,
    model: nn.Module,
    *,
    processor: Any = None,
    split: str | None = None,
    sequences: int = 16,
    length: int = 512,
    limit: int | None = None,
    batch: int = 4,
) -> list[dict[str, torch.Tensor]]:
    """Batches for ``model(**batch)``, on the model's device and in its dtype; nothing in them is padding.

    - Text or questions: ``input_ids`` (b, t), windows spread evenly, each with the tokenizer's special tokens.
    - Manifest: ``input_features`` (1, mel, frames) and, for a model with a decoder, ``decoder_input_ids`` (1, t),
      which are Whisper's English prompt and the reference text.
    - Folder of images: ``pixel_values`` (b, channels, height, width) and, for an image-text model, ``input_ids``
      (1, t) of a short neutral prompt, which is too little to prune its text side by.

    Args:
        path: a ``.txt``, ``.jsonl`` or manifest ``.tsv``, each with or without ``.gz``, or a folder.
        model: what the batches are for; its ``forward`` says which kind it reads.
        processor: tokenizer, image processor or audio processor; by default that of ``model.config.name_or_path``.
        split: rows of a manifest; by default those of 'calibration' if it has any, else all.
        sequences: windows of text at most.
        length: tokens of a window, special tokens included; no more than the model has positions for.
        limit: at most this many windows, utterances or images, evenly spread; the last two are 128 if it is left out.
        batch: windows or images a batch.

    Raises:
        CloverError: the file is empty, unreadable or of a kind that the model does not read; no processor is found;
            the ``eval`` extra is needed and not installed.
    """
    path = Path(path)
    if min(sequences, length - 1, batch, 1 if limit is None else limit) < 1:
        raise CloverError(f"{sequences=}, {length=}, {limit=} and {batch=} must be positive, and length at least 2")
    kind = file_kind(path)
    _check_kind(path, kind, model)
    most = 128 if limit is None else limit
    if kind == "manifest":
        batches = _audio_batches(path, model, processor, split, most)
    elif kind == "images":
        batches = _image_batches(path, model, processor, most, batch)
    else:
        batches = _text_batches(path, model, processor, min(sequences, most), length, batch)
    return [_place(b, next(model.parameters())) for b in batches]


def extra(module: str, name: str = "eval") -> ModuleType:
    """Import a module of an extra, see ``pyproject.toml``.

    Raises:
        CloverError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CloverError(f'this needs {module}, which is missing: pip install "clover-attention[{name}]"') from error


def load_processor(model_or_name: nn.Module | str | Path, kind: str) -> Any:
    """The tokenizer, processor or image processor that was saved beside a model.

    Args:
        model_or_name: a folder, a hub name, or a model that remembers where it came from.
        kind: a class of transformers: "AutoTokenizer", "AutoProcessor" or "AutoImageProcessor".

    Raises:
        CloverError: there is none.
    """
    config: Any = getattr(model_or_name, "config", None)
    name = config.name_or_path if config else str(model_or_name)
    if not name:
        raise CloverError("the model does not say where it was loaded from; pass its tokenizer or processor")
    # Without torchvision the default image backend is a stub that fails; the PIL one gives the same numbers.
    options = {"backend": "pil"} if kind == "AutoImageProcessor" else {}
    try:
        loaded = getattr(transformers, kind).from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        what = f"no {kind.removeprefix('Auto').lower()} can be loaded from {name}"
        raise CloverError(f"{what} ({str(error).strip().splitlines()[0]}); copy the original model's there") from error
    tokenizer = getattr(loaded, "tokenizer", loaded)
    # A folder without tokenizer files can yield a tokenizer that knows nothing but its special tokens.
    if hasattr(tokenizer, "all_special_ids") and len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CloverError(f"{name} holds no tokenizer files; copy those of the original model there")
    return loaded


def audio_features(files: Sequence[Path], extractor: Any) -> torch.Tensor:
    """Log-mel features of whole audio files, float32, shape ``(files, mel, frames)``.

    Raises:
        CloverError: a file is unreadable or longer than the window of the extractor (30 s for Whisper).
    """
    rate = extractor.sampling_rate
    clips = [read_audio(file, rate) for file in files]
    for file, clip in zip(files, clips, strict=True):
        if len(clip) > extractor.n_samples:  # the extractor would cut it off in silence
            raise CloverError(f"{file} is longer than the {extractor.n_samples / rate:g} s the model hears; cut it up")
    return extractor(clips, sampling_rate=rate, return_tensors="pt").input_features


def is_multilingual(model: nn.Module) -> bool:
    """Whether a Whisper model is told language and task; English-only ones must not be."""
    return getattr(getattr(model, "generation_config", None), "is_multilingual", True)


def max_positions(model: nn.Module) -> int | None:
    """Most tokens that the model reads at once, or None if its config sets no bound."""
    bound = getattr(model.config, "max_position_embeddings", None)
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((i for m in tables if (i := getattr(m, "padding_idx", None)) is not None), None)
    # A position table with a padding row starts counting behind that row.
    return bound if bound is None or padding is None else bound - padding - 1


def _check_kind(path: Path, kind: Kind, model: nn.Module) -> None:
    reads = inspect.signature(model.forward).parameters
    special = {"input_features": "manifest", "pixel_values": "images"}
    wanted = next((special[name] for name in special if name in reads), "text")
    if wanted != ("text" if kind == "questions" else kind):
        raise CloverError(f"{path} holds {kind}, but {type(model).__name__} reads {wanted}; give it that")


def _place(batch: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    return {k: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items at even distances."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _text_batches(
    path: Path, model: nn.Module, tokenizer: Any, sequences: int, length: int, batch: int
) -> Iterable[dict[str, torch.Tensor]]:
    tokenizer = tokenizer or load_processor(model, "AutoTokenizer")
    text = read_text(path)
    if file_kind(path) == "questions":
        text = "\n\n".join(f"{r['instruction']}\n{r.get('output', r['answer'])}" for _, r in read_records(path))
    length = min(length, max_positions(model) or length, tokenizer.model_max_length)
    chosen = torch.tensor(_windows(text, tokenizer, length, sequences, path))
    return ({"input_ids": rows} for rows in chosen.split(batch))


def _windows(text: str, tokenizer: Any, length: int, sequences: int, path: Path) -> list[list[int]]:
    """Windows of ``length`` tokens, evenly spread; one shorter window where the whole text does not fill one."""
    excerpt = CHARACTERS * length
    if len(text) > excerpt * sequences:
        starts = (i * (len(text) - excerpt) // max(sequences - 1, 1) for i in range(sequences))
        pieces = [text[start : start + excerpt] for start in starts]
    else:
        pieces = [text]
    windows = tokenizer(pieces, truncation=True, max_length=length, return_overflowing_tokens=True).input_ids
    full = [window for window in windows if len(window) == length] or windows[:1]
    if not text.strip() or len(full[0]) < 2:
        raise CloverError(f"{path} is no calibration data: it holds {'too little' if text.strip() else 'no'} text")
    return _spread(full, sequences)


def _audio_batches(
    path: Path, model: nn.Module, processor: Any, split: str | None, most: int
) -> Iterable[dict[str, torch.Tensor]]:
    utterances = read_manifest(path, split)
    if split is None:
        utterances = [u for u in utterances if u.split == "calibration"] or utterances
    processor = processor or load_processor(model, "AutoProcessor")
    decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    for utterance in track(_spread(utterances, most), "reading audio"):
        batch = {"input_features": audio_features([utterance.file], processor.feature_extractor)}
        if decodes:  # one utterance a batch, for padding would be counted as if it were speech
            batch["decoder_input_ids"] = torch.tensor([_teacher(utterance.text, model, processor.tokenizer)])
        yield batch


def _teacher(text: str, model: Any, tokenizer: Any) -> list[int]:
    """What the decoder has read when it has written ``text`` in English without timestamps."""
    prompt = ["<|en|>", "<|transcribe|>"] if is_multilingual(model) else []
    start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", *prompt, "<|notimestamps|>"])
    if None in start or tokenizer.unk_token_id in start:
        raise CloverError("the tokenizer lacks Whisper's start tokens; pass the model's own processor")
    written = tokenizer(f" {text.strip()}", add_special_tokens=False).input_ids
    return (start + written)[: model.config.max_target_positions]


def _image_batches(
    path: Path, model: nn.Module, processor: Any, most: int, batch: int
) -> Iterable[dict[str, torch.Tensor]]:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGES)
    if not files:
        raise CloverError(f"{path} is no calibration data: it holds no images ({', '.join(IMAGES)})")
    images = processor or load_processor(model, "AutoImageProcessor")
    images = getattr(images, "image_processor", images)
    prompt = _prompt(model, processor) if "input_ids" in inspect.signature(model.forward).parameters else {}
    chosen = _spread(files, most)
    for start in track(range(0, len(chosen), batch), "reading images"):
        pictures = [_read_image(file) for file in chosen[start : start + batch]]
        yield {"pixel_values": images(images=pictures, return_tensors="pt")["pixel_values"], **prompt}


def _read_image(file: Path) -> Any:
    image = extra("PIL.Image")
    try:
        with image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow reports some broken PNG files as a SyntaxError
        raise CloverError(f"image {file} cannot be decoded ({error}); replace it") from error


def _prompt(model: nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    tokenizer = getattr(processor, "tokenizer", None) or load_processor(model, "AutoTokenizer")
    return {"input_ids": tokenizer("a photo", return_tensors="pt").input_ids}
