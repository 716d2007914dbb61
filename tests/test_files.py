"""Files are read as they are meant, and what is wrong with one is said in one sentence that names it."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import transformers as t

from clover.errors import CloverError
from clover.measure import data, files
from samples import ARC, clip, questions_file


def test_text_is_read_plain_and_packed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffschön\r\n".encode())
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("schön\n")
    assert files.read_text(tmp_path / "a.txt") == files.read_text(tmp_path / "a.txt.gz") == "schön\n"


@pytest.mark.parametrize(
    "name, content",
    [("a.txt", b"\xff\xfe\xff"), ("a.txt.gz", b"no gzip"), ("b.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9])],
)
def test_unreadable_text_is_named(tmp_path: Path, name: str, content: bytes) -> None:  # mtime: workers collect alike
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CloverError, match=name):
        files.read_text(tmp_path / name)


@pytest.mark.parametrize(
    "name, kind", [("a.txt", "text"), ("a.TXT.gz", "text"), ("a.tsv", "manifest"), ("a.b.jsonl.gz", "questions")]
)
def test_kind_of_a_file(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    assert files.file_kind(tmp_path / name) == kind
    assert files.file_kind(str(tmp_path)) == "images"


@pytest.mark.parametrize("name", ["a.csv", "gone.txt", "a", "gone" * 99])
def test_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    if "gone" not in name:
        (tmp_path / name).touch()
    with pytest.raises(CloverError, match=name):
        files.file_kind(tmp_path / name)


def test_manifest(manifest: Path) -> None:
    everything = files.read_manifest(manifest)
    assert [u.file.name for u in everything] == ["a.wav", "b.flac", "c.ogg"]
    assert everything[0] == files.Utterance(manifest.parent / "a.wav", 'one "quoted', "test")
    assert files.read_manifest(manifest, "test") == [everything[0], everything[2]]


@pytest.mark.parametrize("table, split, said", [
    ("file\twords\nx.wav\thello\n", None, "column 'text'"),
    ("file\ttext\nx.wav\thello\n", "test", "column 'split'"),
    ("file\ttext\nx.wav\thello\n", None, "x.wav"),
    ("file\ttext\na.wav\n", None, "a.wav"),
    ("file\ttext\na.wav\thello\tthere\n", None, "there.*remove the tabs"),
    ("file\ttext\na.wav\t  \n", None, "without file or text"),
    ("file\ttext\n", None, "no rows"),
    (f"file\ttext\n{'a sentence ' * 30}\ta.wav\n", None, "a sentence"),
    ("", None, "holds no text"),
    ("file\ttext\tsplit\na.wav\thello\ttest\n", "train", "'train'.*'test'"),
])  # fmt: skip
def test_bad_manifest_is_named(manifest: Path, table: str, split: str | None, said: str) -> None:
    bad = manifest.with_name("bad.tsv")
    bad.write_text(table)
    with pytest.raises(CloverError, match=rf"(?s)bad\.tsv.*{said}|{said}.*bad\.tsv"):
        files.read_manifest(bad, split)


def test_a_manifest_with_a_broken_line_is_named(manifest: Path) -> None:
    bad = manifest.with_name("bad.tsv")
    bad.write_bytes(b"file\ttext\na.wav\thello\rworld\n")
    with pytest.raises(CloverError, match=r"bad\.tsv is no table with tabs .*; correct that line"):
        files.read_manifest(bad)


@pytest.mark.parametrize("name", ["a.wav", "b.flac", "c.ogg"])
def test_audio_of_any_rate_becomes_mono_at_the_rate_asked_for(manifest: Path, name: str) -> None:
    samples = files.read_audio(manifest.with_name(name), 16000)
    assert samples.dtype == np.float32 and samples.shape == (16000,)
    assert abs(np.fft.rfft(samples)).argmax() == 440  # one second: bins are Hz
    assert samples.std() == pytest.approx(0.5 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("content", [None, b"", b"RIFF and nothing else", b"fLaC" + bytes(99)])
def test_missing_or_corrupt_audio_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(CloverError, match=r"bad\.wav"):
        files.read_audio(tmp_path / "bad.wav", 16000)


def test_audio_without_a_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.raw").write_bytes(bytes(99))
    with pytest.raises(CloverError, match=r"bad\.raw"):
        files.read_audio(tmp_path / "bad.raw", 16000)


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([0.0, np.nan])])
def test_empty_or_infinite_audio_is_named(tmp_path: Path, samples: np.ndarray) -> None:
    soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(CloverError, match=r"bad\.wav"):
        files.read_audio(tmp_path / "bad.wav", 16000)


@pytest.mark.parametrize("module", ["soundfile", "soxr", "PIL.Image"])
def test_missing_extra_is_named(manifest: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    model, images = clip().vision_model, t.CLIPImageProcessorPil()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CloverError, match=rf'{module}.*pip install "clover-attention\[eval\]"'):
        if module == "PIL.Image":
            data.calibration_batches(pictures, model, processor=images)
        else:
            files.read_audio(manifest.with_name("b.flac"), 16000)


def test_questions(tmp_path: Path) -> None:
    boolean = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    blank = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Bob so _ hid."
        "\n\nOption1: Ann Option2: Bob Answer format: option1/option2"
    )
    records = [{"instruction": i, "answer": a} for i, a in [(ARC, "answer2"), (boolean, "false"), (blank, "option1")]]
    first, second, third = files.read_questions(questions_file(tmp_path / "q.jsonl.gz", *records))
    assert first == files.Question(ARC, "Why?", ("answer1", "answer2"), ("So.", "Not so: no."), 1)
    assert (second.stem, second.texts, second.answer) == ("is it?", ("true", "false"), 1)
    assert (third.stem, third.texts, third.answer) == ("Ann saw Bob so _ hid.", ("Ann", "Bob"), 0)


@pytest.mark.parametrize("record, said", [
    ({"instruction": ARC}, "line 2"),
    ({"instruction": ARC, "output": ""}, "line 2.*not empty"),
    ([1], "line 2"),
    ({"instruction": "half a pair \ud83d", "answer": "answer1"}, "line 2"),
    ({"instruction": "Why?", "answer": "answer1"}, "line 2.*Answer format"),
    ({"instruction": ARC, "answer": "answer3"}, "line 2.*'answer3'"),
])  # fmt: skip
def test_bad_question_is_named(tmp_path: Path, record: object, said: str) -> None:
    path = questions_file(tmp_path / "q.jsonl", {"instruction": ARC, "answer": "answer1"}, record)
    with pytest.raises(CloverError, match=said):
        files.read_questions(path)


@pytest.mark.parametrize("content, said", [("\n\n", "no text"), ("{broken\n", "line 1")])
def test_file_without_questions(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(CloverError, match=said):
        files.read_questions(tmp_path / "q.jsonl")


def test_sound_without_texts(manifest: Path) -> None:
    rows = [line.split("\t") for line in manifest.read_text().splitlines()]
    at = rows[0].index("text")
    manifest.write_text("\n".join("\t".join(c for i, c in enumerate(row) if i != at) for row in rows))
    with pytest.raises(CloverError, match="no column 'text'"):
        files.read_manifest(manifest)
    assert len(files.read_manifest(manifest, spoken=False)) == len(rows) - 1


def test_a_table_with_commas(tmp_path: Path) -> None:
    (tmp_path / "clips.tsv").write_text("file,text\na.wav,hello\n")
    with pytest.raises(CloverError, match=r"no column 'file', .* part columns by tabs"):
        files.read_manifest(tmp_path / "clips.tsv")
