"""From what files hold to model inputs: texts, audio, questions and folders of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from clover.errors import CloverError, reason, warn
from clover.extras import extra
from clover.measure.files import Kind, Utterance, file_kind, read_audio, read_manifest, read_records, read_text
from clover.model.answers import check_words
from clover.model.traits import accepts, decoder_start, is_multilingual, is_whisper, max_positions
from clover.progress import track

T = TypeVar("T")
WRITTEN = 32
"""Tokens that a model writes about an image to calibrate its decoder."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CHARACTERS = 16  # a generous guess at those of one token; decides how much of a long text is tokenised at all


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
    joined: int = 2,
) -> list[dict[str, torch.Tensor]]:
    """Batches for ``model(**batch)``, on the model's device and in its dtype; nothing in them is padding.

    - Text or questions: ``input_ids`` (b, t), windows spread evenly, each with the tokenizer's special tokens; for a
      model with a decoder also ``decoder_input_ids`` (b, t), the same text one token later.
    - Manifest: ``input_features`` (b, mel, frames) or ``input_values`` (1, samples) and, for a model with a decoder,
      ``decoder_input_ids`` (b, t), which are the reference text behind the decoder's start (Whisper's English prompt).
      A model that hears a window of fixed length gets clips joined until it is full, or most of it would be silence.
    - Folder of images: ``pixel_values`` (b, channels, height, width) and, for an image-text model, ``input_ids``
      (b, t) of a short neutral prompt, which is too little to prune its text side by. An image-text model that writes
      takes text instead, which reaches its language part; one that is given nothing but images gets what it writes
      about them as ``decoder_input_ids`` (b, t).

    Args:
        path: a ``.txt``, ``.jsonl`` or manifest ``.tsv``, each with or without ``.gz``, or a folder.
        model: what the batches are for; its ``forward`` says which kind it reads.
        processor: tokenizer, image processor or audio processor; by default that of ``model.config.name_or_path``.
        split: rows of a manifest; by default those of 'calibration' if it has any, else all.
        sequences: windows of text at most.
        length: tokens of a window, special tokens included; no more than the model has positions for.
        limit: at most this many windows, utterances or images, evenly spread; the last two are 128 if it is left out.
        batch: windows or images a batch.
        joined: how often the same clips fill a window, each time in another order, as one batch; 1 where sequences must
            not share clips, 0 leaves each clip alone, such as to measure a loss.

    Raises:
        CloverError: the file is empty, unreadable or of a kind that the model does not read; no processor is found;
            the ``eval`` extra is needed and not installed.
    """
    path = Path(path)
    if min(sequences, length - 1, batch, joined + 1, 1 if limit is None else limit) < 1:
        raise CloverError(
            f"{sequences=}, {length=}, {limit=} and {batch=} must be positive, {joined=} not negative, and length at "
            "least 2"
        )
    kind = file_kind(path)
    _check_kind(path, kind, model)
    most = 128 if limit is None else limit
    if kind == "manifest":
        batches = _audio_batches(path, model, processor, split, most, joined)
    elif kind == "images":
        batches = _image_batches(path, model, processor, most, batch)
    else:
        batches = _text_batches(path, model, processor, min(sequences, most), length, batch)
    return [_place(b, next(model.parameters())) for b in batches]


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
    options: dict[str, Any] = {"backend": "pil"} if kind == "AutoImageProcessor" else {}
    try:
        loaded = getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # of any kind: files of many kinds are read, by as many libraries
        what = f"no {kind.removeprefix('Auto').lower()} can be loaded from {name}"
        raise CloverError(f"{what} ({reason(error)}); copy the original model's there") from error
    tokenizer = getattr(loaded, "tokenizer", loaded)
    # A folder without tokenizer files can yield a tokenizer that knows nothing but its special tokens.
    if hasattr(tokenizer, "all_special_ids") and len(tokenizer) <= len(tokenizer.all_special_ids):
        raise CloverError(f"{name} holds no tokenizer files; copy those of the original model there")
    return loaded


def found_beside(name: Any) -> tuple[Any, ...]:
    """What reads text, images or sound for a model, to be saved with what is made of it: its processor, or the parts.

    Warns of what lies there and can't be loaded.

    Args:
        name: as for ``load_processor``.
    """
    whole, why = _first(name, "AutoProcessor", "AutoTokenizer")
    if whole and not isinstance(whole[0], PreTrainedTokenizerBase):
        return whole
    senses, why_not = _first(name, "AutoImageProcessor", "AutoFeatureExtractor")
    lacking = {"processor_config.json": why[:1], "tokenizer_config.json": why[1:] if not whole else []}
    lacking["preprocessor_config.json"] = why_not[:1] if not senses else []
    for file, lost in lacking.items():
        if lost and _lies_there(name, file):
            warn(f"{file} is not saved with the model, copy it by hand: {lost[0]}")
    return (*whole, *senses)


def _first(name: Any, *kinds: str) -> tuple[tuple[Any, ...], list[CloverError]]:
    """The first of these kinds that can be loaded, if any, and why each one before it can't."""
    why: list[CloverError] = []
    for kind in kinds:
        try:
            return (load_processor(name, kind),), why
        except CloverError as error:
            why.append(error)
    return (), why


def _lies_there(model_or_name: Any, file: str) -> bool:
    """Whether a folder or the hub has a file."""
    config: Any = getattr(model_or_name, "config", None)
    with suppress(Exception):  # of any kind: a hub is reached through many libraries
        return cached_file(config.name_or_path if config else str(model_or_name), file) is not None
    return False


def text_tokens(text: str, tokenizer: Any, limit: int | None = None) -> tuple[torch.Tensor, int | None]:
    """Token ids of a text, ``(n,)`` int64, and the token that the tokenizer puts in front of any text, taken off it.

    A model that was trained to see that token first (LLaMA, Gemma) reads a piece without it as if it made no sense.

    Args:
        limit: at least so many are wanted, or all; of a text far longer the rest is not taken apart.
    """
    size = len(text) if limit is None else CHARACTERS * (limit + CHARACTERS)
    ids = tokenizer(text[:size], verbose=False).input_ids
    while size < len(text) and len(ids) < (limit or 0) + CHARACTERS:  # the last ones may be those of half a word
        size *= 2
        ids = tokenizer(text[:size], verbose=False).input_ids
    start = tokenizer.bos_token_id
    if start is None or ids[:1] != [start]:
        return torch.tensor(ids, dtype=torch.long), None
    return torch.tensor(ids[1:], dtype=torch.long), start


def audio_features(files: Sequence[Path], extractor: Any) -> torch.Tensor:
    """What an extractor makes of whole audio files, float32: log-mel ``(files, mel, frames)``, or samples as they are.

    Raises:
        CloverError: a file is unreadable or longer than the window of the extractor (30 s for Whisper).
    """
    return _features([_clip(file, extractor) for file in files], extractor)


def _clip(file: Path, extractor: Any) -> Any:
    """A file as the extractor wants it."""
    rate, most = extractor.sampling_rate, getattr(extractor, "n_samples", None)
    clip = read_audio(file, rate)
    if most and len(clip) > most:  # the extractor would cut it off in silence
        raise CloverError(f"{file} is longer than the {most / rate:g} s the model hears; cut it up")
    return clip


def _features(clips: Sequence[Any], extractor: Any) -> torch.Tensor:
    return extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")[extractor.model_input_names[0]]


def _check_kind(path: Path, kind: Kind, model: Any) -> None:
    reads = accepts(model)
    special = {"input_features": "manifest", "input_values": "manifest", "pixel_values": "images"}
    wanted = next((special[name] for name in special if name in reads), "text")
    if "input_ids" in reads and getattr(model, "can_generate", bool)():  # pictures are only where its reading begins
        wanted = "text"
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
    tokenizer = _part(tokenizer, "tokenizer", "all_special_ids", model, "AutoTokenizer")
    text = read_text(path)
    if file_kind(path) == "questions":
        text = "\n\n".join(f"{r['instruction']}\n{r['output']}" for _, r in read_records(path))
    length = min(length, max_positions(model) or length, tokenizer.model_max_length)
    chosen = torch.tensor(_windows(text, tokenizer, length, sequences, path))
    check_words(chosen, model)
    if "decoder_input_ids" not in accepts(model):
        return ({"input_ids": rows} for rows in chosen.split(batch))
    _check_writer(model)
    later = torch.cat([torch.full_like(chosen[:, :1], decoder_start(model)), chosen[:, :-1]], 1)
    both = zip(chosen.split(batch), later.split(batch), strict=True)
    return ({"input_ids": rows, "decoder_input_ids": read} for rows, read in both)


def _check_writer(model: Any) -> None:
    """Refuse a model of two whose writer doesn't read what the reader's tokenizer gives, such as codes of sound."""
    reader, writer = (
        next((side for name in names if (side := getattr(model.config, name, None)) is not None), None)
        for names in (("encoder", "text_encoder"), ("decoder",))
    )
    words = getattr(writer, "vocab_size", None)
    if writer is not None and words != getattr(reader, "vocab_size", None):
        raise CloverError(
            f"the decoder of {type(model).__name__} reads {words} tokens of its own; give batches with "
            "decoder_input_ids instead of text"
        )


def _windows(text: str, tokenizer: Any, length: int, sequences: int, path: Path) -> list[list[int]]:
    """Windows of ``length`` tokens, evenly spread; one shorter window where the whole text does not fill one."""
    excerpt = CHARACTERS * length
    if len(text) > excerpt * sequences:
        starts = (i * (len(text) - excerpt) // max(sequences - 1, 1) for i in range(sequences))
        pieces = [text[start : start + excerpt] for start in starts]
    else:
        pieces = [text]
    windows = _in_windows(pieces, tokenizer, length)
    full = [window for window in windows if len(window) == length] or windows[:1]
    if not full or len(full[0]) < 2:
        raise CloverError(f"{path} is no calibration data: it holds too little text; give more")
    return _spread(full, sequences)


def _in_windows(pieces: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """All tokens of each piece, ``length`` at a time; the last window of a piece may be shorter."""
    if tokenizer.is_fast:
        return tokenizer(pieces, truncation=True, max_length=length, return_overflowing_tokens=True).input_ids
    # Tokenizers in plain Python give back the first window alone.
    room = length - tokenizer.num_special_tokens_to_add()
    written = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
    parts = [ids[start : start + room] for ids in written for start in range(0, len(ids), room)]
    return [tokenizer.build_inputs_with_special_tokens(part) for part in parts]


def _audio_batches(
    path: Path, model: nn.Module, processor: Any, split: str | None, most: int, joined: int
) -> Iterable[dict[str, torch.Tensor]]:
    decodes = "decoder_input_ids" in accepts(model)
    utterances = read_manifest(path, split, prefer="calibration", spoken=decodes)
    extractor = _part(processor, "feature_extractor", "sampling_rate", model, "AutoFeatureExtractor")
    tokenizer = _part(processor, "tokenizer", "all_special_ids", model, "AutoTokenizer") if decodes else None
    frames = getattr(model, "_get_feat_extract_output_lengths", None)
    chosen = track(_spread(utterances, most), "reading audio")
    for heard in _windows_of_sound(chosen, extractor, getattr(extractor, "n_samples", 0) if joined else 0):
        orders = [heard[at:] + heard[:at] for at in range(0, len(heard), -(-len(heard) // max(1, joined)))]
        sound = _features([np.concatenate([clip for _, clip in order]) for order in orders], extractor)
        heard_in = 1 if frames is None else frames(torch.tensor(sound.shape[-1]))
        if min(heard_in if isinstance(heard_in, tuple) else (heard_in,)) < 1:
            raise CloverError(f"the clip of {heard[0][0][:40]!r} in {path} is too short for the model; leave it out")
        batch = {extractor.model_input_names[0]: sound}
        if decodes:  # the same texts in any order are equally long, and padding would be counted as if it were speech
            texts = [[text for text, _ in order] for order in orders]
            batch["decoder_input_ids"] = torch.tensor([_teacher(each, model, tokenizer) for each in texts])
        yield batch


def _windows_of_sound(utterances: Iterable[Utterance], extractor: Any, room: int) -> Iterator[list[tuple[str, Any]]]:
    """Texts and clips that fit together into as many samples; at least one."""
    found: list[tuple[str, Any]] = []
    for utterance in utterances:
        clip = _clip(utterance.file, extractor)
        if found and sum(len(c) for _, c in found) + len(clip) > room:
            yield found
            found = []
        found.append((utterance.text, clip))
    yield found


def _part(processor: Any, name: str, has: str, model: nn.Module, kind: str) -> Any:
    """A part of a processor, or itself where it is that part and has what that has, or what was saved with the model.

    Raises:
        CloverError: as ``load_processor``.
    """
    part = getattr(processor, name, processor)
    return part if hasattr(part, has) else load_processor(model, kind)


def _teacher(texts: Sequence[str], model: Any, tokenizer: Any) -> list[int]:
    """What the decoder has read when it has written ``texts``, in English without timestamps if it is Whisper's."""
    start = [decoder_start(model)]
    if is_whisper(model):
        prompt = ["<|en|>", "<|transcribe|>"] if is_multilingual(model) else []
        start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", *prompt, "<|notimestamps|>"])
        if None in start or tokenizer.unk_token_id in start:
            raise CloverError("the tokenizer lacks Whisper's start tokens; pass the model's own processor")
    written = tokenizer([f" {text.strip()}" for text in texts], add_special_tokens=False).input_ids
    return [*start, *chain(*written)][: getattr(model.config, "max_target_positions", None) or max_positions(model)]


def _image_batches(
    path: Path, model: nn.Module, processor: Any, most: int, batch: int
) -> Iterable[dict[str, torch.Tensor]]:
    # Beside each file macOS leaves one that begins with "._" and is no picture.
    found = (f for f in path.rglob("*") if f.suffix.lower() in IMAGES and not f.name.startswith("._"))
    files = sorted(f for f in found if f.is_file())
    if not files:
        raise CloverError(f"{path} is no calibration data: it holds no images ({', '.join(IMAGES)}); name their folder")
    images = processor or load_processor(model, "AutoImageProcessor")
    images = getattr(images, "image_processor", images)
    reads = accepts(model)
    prompt = _prompt(model, processor) if "input_ids" in reads else {}
    chosen = _spread(files, most)
    for start in track(range(0, len(chosen), batch), "reading images"):
        pictures = [_read_image(file) for file in chosen[start : start + batch]]
        made = images(images=pictures, return_tensors="pt")
        seen = {name: made[name] for name in made if name in reads}  # some say what of the pixels is no picture
        told = {name: ids.expand(len(pictures), -1) for name, ids in prompt.items()}
        yield seen | told | (_written(model, seen) if "decoder_input_ids" in reads else {})


def _written(model: Any, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the decoder has read when it has written what it has to say of images; all rows are equally long.

    Raises:
        CloverError: the model can't write: it names no token to begin with, or its weights are not in memory.
    """
    first = next(model.parameters())
    if any(p.is_meta for p in model.parameters()):
        raise CloverError(f"{type(model).__name__} must write about the images to calibrate; calibrate it in memory")
    tokens = min(WRITTEN, (max_positions(model) or WRITTEN + 1) - 1)
    ids = model.generate(
        **_place(seen, first), decoder_start_token_id=decoder_start(model), do_sample=False, num_beams=1,
        min_new_tokens=tokens, max_new_tokens=tokens, return_dict_in_generate=False,
    )  # fmt: skip
    return {"decoder_input_ids": ids}


def _read_image(file: Path) -> Any:
    image = extra("PIL.Image")
    try:
        with image.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, image.DecompressionBombError) as error:  # SyntaxError is of some broken PNG files
        raise CloverError(f"image {file} cannot be decoded ({error}); replace it") from error


def _prompt(model: nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    tokenizer = getattr(processor, "tokenizer", None) or load_processor(model, "AutoTokenizer")
    return {"input_ids": tokenizer("a photo", return_tensors="pt").input_ids}
