"""What users' files hold: texts, audio manifests and lists of questions."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clover.errors import CloverError
from clover.extras import extra

Kind = Literal["text", "manifest", "questions", "images"]
KINDS: dict[str, Kind] = {".txt": "text", ".tsv": "manifest", ".jsonl": "questions"}


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
    if os.path.isdir(path := Path(path)):
        return "images"
    if not os.path.exists(path):
        raise CloverError(f"{path} does not exist; give a .txt, .tsv or .jsonl file or a folder of images")
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending not in KINDS:
        raise CloverError(f"{path} is of no known kind; give {', '.join(KINDS)}, any with .gz, or a folder of images")
    return KINDS[ending]


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, unpacked where the name ends in ``.gz``.

    Raises:
        CloverError: the file is missing, unreadable, corrupt, no UTF-8 or blank.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if Path(path).suffix.lower() == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CloverError(f"{path} cannot be read as UTF-8 text ({error}); give another file") from error
    if not text.strip():
        raise CloverError(f"{path} holds no text; give another file")
    return text.replace("\r\n", "\n")


def read_manifest(
    path: str | Path, split: str | None = None, *, prefer: str | None = None, spoken: bool = True
) -> list[Utterance]:
    """The rows of a tab-separated file with columns ``file``, ``text`` and optionally ``split``, in their order.

    Args:
        path: the manifest; its audio files are named relative to its folder.
        split: keep only the rows of this split.
        prefer: where no split is asked for, that of which rows are kept if there are any.
        spoken: whether what is said matters; else texts may be missing.

    Raises:
        CloverError: a column, a field or an audio file is missing, or no row is left.
    """
    path = Path(path)
    table = csv.DictReader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        columns, rows = table.fieldnames or [], list(table)
    except csv.Error as error:
        raise CloverError(f"{path} is no table with tabs ({error}); correct that line") from error
    for column in ["file", *(["text"] if spoken else []), *(["split"] if split is not None else [])]:
        if column not in columns:
            remedy = "part columns by tabs" if len(columns) == 1 and "," in columns[0] else "name it in the first line"
            raise CloverError(f"{path} has no column '{column}', only {list(columns)}; {remedy}")
    if split is None and any(row.get("split") == prefer for row in rows if prefer):
        split = prefer
    chosen = [row for row in rows if split is None or row["split"] == split]
    if not chosen:
        found = f"its splits are {sorted({row['split'] or '' for row in rows})}" if rows and split else "it has no rows"
        raise CloverError(f"{path} holds no utterance{f' of split {split!r}' if split else ''}; {found}")
    return [_utterance(path, row, spoken) for row in chosen]


def _utterance(manifest: Path, row: dict[str, str | None], spoken: bool) -> Utterance:
    name, text = row["file"], row.get("text") or ""
    if not name or (spoken and not text.strip()):
        raise CloverError(f"{manifest} has a row without file or text: {list(row.values())}; complete it")
    if more := row.get(None):  # type: ignore[call-overload]
        raise CloverError(f"{manifest} has a row of more fields than columns, with {more} beyond them; remove the tabs")
    file = manifest.parent / name
    if not os.path.isfile(file):  # unlike Path's, never raises: a text in the wrong column is a name too long
        raise CloverError(f"audio file {file}, listed in {manifest}, does not exist; correct the row or add the file")
    return Utterance(file, text, row.get("split"))


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """One audio file in any format that libsndfile reads: float32 samples of shape ``(n,)``, mono, at ``rate`` Hz.

    Channels are averaged, then resampled with soxr.

    Raises:
        CloverError: the file is missing, corrupt, empty or not finite, or the ``eval`` extra is not installed.
    """
    soundfile = extra("soundfile")
    if not os.path.isfile(path):
        raise CloverError(f"audio file {path} does not exist; correct the path")
    try:
        samples, original = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:
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
    """Objects of a ``.jsonl[.gz]`` file, with where they stand: ``instruction``, and ``output`` or ``answer``."""
    lines = [(f"line {i} of {path}", line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return [(where, _record(line, where)) for where, line in lines]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        record = found | {"output": found.get("output") or found.get("answer")}
        if found.get("input"):  # what the instruction is about
            record["instruction"] += "\n" + found["input"]
        if isinstance(record["instruction"], str) and isinstance(record["output"], str) and record["output"]:
            (record["instruction"] + record["output"]).encode()  # half a surrogate pair is no text
            return record
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    wanted = "'instruction' and 'answer' (or 'output') that are not empty"
    raise CloverError(f"{where} must be a JSON object with strings {wanted}; got {line[:80]!r}")


def _question(record: dict[str, Any], where: str) -> Question:
    instruction, answer = record["instruction"], record.get("answer")
    ending = re.search(r"\s*Answer format: (\S+/\S+)\s*$", instruction)
    if not ending:
        raise CloverError(
            f"{where}: the instruction does not end in 'Answer format: a/b/...', which names the choices; add it"
        )
    labels = tuple(ending[1].split("/"))
    if answer not in labels:
        raise CloverError(
            f"{where}: the answer is '{answer}', which is none of the choices {list(labels)}; correct one"
        )
    body = instruction[: ending.start()]
    choices = "".join(rf"\s+{re.escape(label.capitalize())}:\s*(.+?)" for label in labels)
    spelled = re.search(choices + r"\s*$", body, re.DOTALL)
    stem = body[: spelled.start()] if spelled else body
    stem = re.split(r"\b(?:question|sentence): ", stem, maxsplit=1)[-1].strip()
    return Question(instruction, stem, labels, spelled.groups() if spelled else labels, labels.index(answer))
