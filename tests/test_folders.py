"""Output folders: whole or not there, whatever goes wrong, and nothing of others is touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import clover
from clover.errors import CloverError
from clover.jobs.folders import check_writable, fresh_folder
from commands import refuse
from families import build, outputs


def test_output_folder_that_exists(tmp_path: Path) -> None:
    model, _ = build("gpt2")
    (tmp_path / "kept").write_text("precious")
    with pytest.raises(CloverError, match=f"{tmp_path} exists; remove it or choose another folder"):
        clover.save(model, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(CloverError, match="kept exists"):
        clover.save(model, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "precious"


def test_output_folder_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CloverError, match="link exists; remove it"):
        check_writable(tmp_path / "link")


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("command", [["prune", "--vo", 0.3], ["prune", "--vo", 0.3, "--stream"], ["export"]])
def test_a_tokenizer_that_fails(command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the work, not after it."""

    def fails(_: str) -> None:
        raise CloverError("an odd tokenizer")

    monkeypatch.setattr("clover.command.options.check_there", lambda _: None)
    monkeypatch.setattr("clover.command.options.found_beside", fails)
    for name in ("load", "load_ready", "prune_folder"):
        monkeypatch.setattr(f"clover.command.cli.{name}", lambda *_, **__: pytest.fail("work was begun"))
    first, *options = command
    assert "an odd tokenizer" in refuse(first, "somewhere", tmp_path / "out", *options)


def test_parent_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CloverError, match=r"file/model can't be written: .*; choose another place"):
        clover.save(build("gpt2")[0], tmp_path / "file/model")
    assert (tmp_path / "file").read_text() == "precious"


def test_parent_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # a root user's tests can't take the right away in earnest
    with pytest.raises(CloverError, match="can't be written; choose another place"):
        clover.save(build("gpt2")[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_cut_that_overflows_when_saved_is_refused(tmp_path: Path) -> None:
    """It fits float32, which it was made in, and not the dtype that it is saved in."""
    model, batch = build("llama-gqa", torch.float32)
    clover.prune(model, vo=0.5, calibration=[batch])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e6)
    with pytest.raises(CloverError, match=r"layers\.1\.self_attn\.o_proj\.weight overflows torch.float16; save in"):
        clover.save(model.half(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["transformers.modeling_utils.safe_save_file", "os.fsync", "pathlib.Path.rename"])
def test_disk_that_is_full(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, batch = build("gpt2")
    clover.prune(model, vo=0.3)
    before = outputs(model, batch)
    monkeypatch.setattr(where, full)
    with pytest.raises(
        CloverError, match="model can't be written: No space left on device; free space or choose another"
    ):
        clover.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert torch.equal(outputs(model, batch), before)
    monkeypatch.undo()
    clover.save(model, tmp_path / "model")


def test_a_tokenizer_that_finds_the_disk_full(tmp_path: Path) -> None:
    """Its library raises nothing but an Exception."""
    model, _ = build("gpt2")

    class Full:
        def save_pretrained(self, _: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(CloverError, match=r"model can't be written: No space left on device"):
        clover.save(model, tmp_path / "model", beside=(Full(),))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_run_makes_meanwhile(tmp_path: Path) -> None:
    model, _ = build("gpt2")

    class Rival:
        def save_pretrained(self, _: Path) -> None:
            (tmp_path / "model").mkdir()
            (tmp_path / "model/precious").touch()

    with pytest.raises(CloverError, match=r"model was made by another run meanwhile; this one's is in .*\.model\."):
        clover.save(model, tmp_path / "model", beside=(Rival(),))
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["precious"]
    (ours,) = tmp_path.glob(".model.*")
    assert (ours / "model.safetensors").exists()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="longer than 240 bytes; choose a shorter one"):
        check_writable(tmp_path / ("é" * 121))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_folder_and_its_files_have_the_rights_that_the_user_wants(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = clover.save(build("gpt2")[0], tmp_path / "model")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


def test_disk_quota_in_earnest(tmp_path: Path) -> None:
    """The limit is the system's; safetensors reports it by an exception of its own, which is no OSError."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, _ = build("gpt2")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CloverError, match=r"model can't be written: .*too large.*; free space or choose another"):
            clover.save(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("no such model on the hub"), RuntimeError("bad shape"), Exception("bug")])
def test_an_error_in_the_work_is_told_as_it_is(error: Exception, tmp_path: Path) -> None:
    """Only what the system says about files is told as a folder that can't be written."""
    with pytest.raises(type(error), match=str(error)), fresh_folder(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())
