"""Pruning from folder to folder: the same bits as in memory, and nothing lost or half-written whatever happens."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModel

import clover
from clover.command.options import load_ready
from clover.errors import CloverError
from clover.jobs.crew import Crew
from clover.jobs.draft import Draft, draft, hidden
from clover.streaming import stream as streaming
from clover.streaming.shards import Entry, Shard
from clover.streaming.stream import prune_folder
from families import CASES, MERGED, build

CUT: dict[str, Any] = {"qk": 0.3, "vo": 0.4}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Q-K of . of . blocks stays whole")
        yield


def save(name: str, folder: Path, dtype: torch.dtype = torch.float16, shard: str = "40KB") -> Path:
    build(name, dtype)[0].save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny model of two layers in two files."""
    return save("llama-gqa", tmp_path / "dense")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    return found


def in_memory(source: Path, out: Path, **cut: Any) -> Path:
    """What ``clover prune`` makes of a folder without ``--stream``."""
    model, restore = load_ready(str(source))
    clover.prune(model, **cut)
    return clover.save(restore(model), out)


def same(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        wide = key.endswith("e_score_correction_bias")  # transformers loads it as float32, whatever the file holds
        assert tensor.dtype == right[key].dtype or wide
        assert torch.equal(tensor, right[key].to(tensor.dtype)), key
    for file in ("config.json", "generation_config.json"):
        assert (a / file).exists() == (b / file).exists()
        if (a / file).exists():
            assert json.loads((a / file).read_text()) == json.loads((b / file).read_text())


# --- the same bits ---


@pytest.mark.parametrize("name", [*CASES, *MERGED])
@pytest.mark.parametrize(("dtype", "shard"), [(torch.float32, "5GB"), (torch.float16, "40KB")])
def test_equal_to_the_path_in_memory(name: str, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "dense", dtype, shard)
    said = prune_folder(source, tmp_path / "streamed", **CUT)
    same(in_memory(source, tmp_path / "cut", **CUT), tmp_path / "streamed")
    model = clover.load(tmp_path / "streamed")
    assert model.dtype == dtype
    assert clover.summary(model) == said
    assert not hidden(tmp_path / "streamed").exists()
    assert len(list(source.glob("*.safetensors"))) == len(list((tmp_path / "streamed").glob("*.safetensors")))


@pytest.mark.parametrize(
    "cut",
    [
        {"qk_threshold": 3.0, "vo": 0.2},
        {"vo_energy": 0.8},
        {"vo": 0.5, "granularity": "layer", "limits": clover.Limits(multiple=4)},
    ],
)
def test_every_rule(cut: Any, llama: Path, tmp_path: Path) -> None:
    prune_folder(llama, tmp_path / "streamed", **cut)
    same(in_memory(llama, tmp_path / "cut", **cut), tmp_path / "streamed")


def test_one_part(tmp_path: Path) -> None:
    source = save("whisper", tmp_path / "dense")
    prune_folder(source, tmp_path / "streamed", vo=0.5, part="cross")
    same(in_memory(source, tmp_path / "cut", vo=0.5, part="cross"), tmp_path / "streamed")


@pytest.mark.parametrize(("name", "add"), [("llama-gqa", False), ("gpt2", False), ("bert", True)])
def test_names_with_another_prefix(name: str, add: bool, tmp_path: Path) -> None:
    """A base model's tensors in a language model's folder, or the other way round, as transformers takes them."""
    source = save(name, tmp_path / "dense", shard="5GB")
    model = clover.load(source)
    prefix = model.base_model_prefix + "."
    old = tensors(source)
    new = {prefix + k if add else k.removeprefix(prefix): v for k, v in old.items()}
    assert new.keys() != old.keys()
    safetensors.torch.save_file(new, source / "model.safetensors", {"format": "pt"})
    prune_folder(source, tmp_path / "streamed", **CUT)
    same(in_memory(source, tmp_path / "cut", **CUT), tmp_path / "streamed")


def test_a_config_without_a_dtype(llama: Path, tmp_path: Path) -> None:
    """Of files that hold norms in another dtype, which stand in front: the model's is that of the first by name."""
    for file in llama.glob("*.safetensors"):
        held = safetensors.torch.load_file(file)
        wide = {name: value.float() if "norm" in name else value for name, value in held.items()}
        safetensors.torch.save_file(wide, file, metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    del config["dtype"]
    (llama / "config.json").write_text(json.dumps(config))
    prune_folder(llama, tmp_path / "streamed", **CUT)
    streamed, cut = (clover.load(f) for f in (tmp_path / "streamed", in_memory(llama, tmp_path / "cut", **CUT)))
    assert streamed.dtype == cut.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(streamed.parameters(), cut.parameters(), strict=True))


def test_a_tied_tensor_under_its_other_name(tmp_path: Path) -> None:
    """As ``safetensors.torch.save_model`` leaves it."""
    source = save("gpt2", tmp_path / "dense", shard="1GB")
    held = tensors(source)
    held["lm_head.weight"] = held.pop("transformer.wte.weight")
    safetensors.torch.save_file(held, source / "model.safetensors", {"format": "pt"})
    prune_folder(source, tmp_path / "streamed", **CUT)
    one, other = (clover.load(p) for p in (in_memory(source, tmp_path / "whole", **CUT), tmp_path / "streamed"))
    assert torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert torch.equal(one.get_output_embeddings().weight, other.get_output_embeddings().weight)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_tensors_that_the_config_ties_and_the_file_holds_both(shift: float, tmp_path: Path) -> None:
    """Two where they differ, as in memory; else one."""
    source = save("gpt2", tmp_path / "dense", shard="1GB")
    held = tensors(source)
    held["lm_head.weight"] = held["transformer.wte.weight"] + shift
    safetensors.torch.save_file(held, source / "model.safetensors", {"format": "pt"})
    told = prune_folder(source, tmp_path / "streamed", **CUT)
    whole = clover.load(in_memory(source, tmp_path / "whole", **CUT))
    streamed = clover.load(tmp_path / "streamed")
    assert told["parameters_after"] == clover.summary(whole)["parameters_after"]
    assert told["parameters_before"] == clover.summary(whole)["parameters_before"]
    for side in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(whole, side)().weight, getattr(streamed, side)().weight)


def test_how_an_older_model_generates_is_in_its_config(tmp_path: Path) -> None:
    source = save("bart", tmp_path / "dense")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_beams": 4, "max_length": 77}))
    prune_folder(source, tmp_path / "out", **CUT)
    made = clover.load(tmp_path / "out").generation_config
    assert (made.num_beams, made.max_length) == (4, 77)


def test_of_a_hub_name_only_what_is_read_is_fetched(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert ignore_patterns == ["*/*"]
        asked.extend(allow_patterns)
        return str(llama)

    monkeypatch.setattr(streaming, "snapshot_download", fetch)
    prune_folder("somebody/model", tmp_path / "out", **CUT)
    weights = {f.name for f in llama.glob("*.safetensors")}
    assert set(asked) == {"*.json", "model.safetensors", *weights}


def test_tensors_that_are_not_cut_are_copied_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    prune_folder(llama, tmp_path / "streamed", vo=0.5)
    before, after = tensors(llama), tensors(tmp_path / "streamed")
    others = [key for key in before if "self_attn" not in key]
    assert len(others) > 5
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in others)


def test_experts_are_copied_one_by_one(tmp_path: Path) -> None:
    """What is one tensor in memory stays in parts on disk, and any class of the family puts them together."""
    source = save("mixtral", tmp_path / "dense", torch.float32)
    prune_folder(source, tmp_path / "streamed", vo=0.5)
    before, after = tensors(source), tensors(tmp_path / "streamed")
    parts = [key for key in before if ".experts." in key]
    assert len(parts) == 2 * 4 * 3
    assert all(torch.equal(before[key], after[key.replace("block_sparse_moe", "mlp")]) for key in parts)
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        whole = clover.load(tmp_path / "streamed").model(ids).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path / "streamed").eval()
        assert torch.equal(base(ids).last_hidden_state, whole)
        base.save_pretrained(tmp_path / "base")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base").eval()(ids).last_hidden_state, whole)


def test_never_the_whole_model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    read = Entry.read
    seen: list[str] = []
    monkeypatch.setattr(Entry, "read", lambda self, name: seen.append(name) or read(self, name))
    prune_folder(llama, tmp_path / "streamed", vo=0.5)
    assert seen
    assert all("self_attn" in name for name in seen)


# --- killed, and gone on with ---

KILLED = """
import os, signal, sys, threading
from clover.jobs.draft import Draft
from clover.streaming.shards import Shard
from clover.streaming.stream import prune_folder
kind, left = sys.argv[3], int(sys.argv[4])
one_at_a_time = threading.Lock()
keep, write = Draft.keep, Shard.write

def counted(self, what, name, tensors):
    global left
    with one_at_a_time:  # a thread copies beside the cuts
        if what == kind:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        keep(self, what, name, tensors)

def torn(self, items):
    global left
    for item in items:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, [item])

if kind == "tensor":
    Shard.write = torn
else:
    Draft.keep = counted
if kind == "name":
    Draft.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
prune_folder(sys.argv[1], sys.argv[2], qk=0.3, vo=0.4)
"""


def python(code: str, *args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **kwargs)


@pytest.mark.parametrize(
    ("kind", "after", "bases", "done"),
    [
        ("bases", 1, 1, 0),
        ("done", 1, 2, 1),
        ("tensor", 2, 2, 0),
        ("name", 0, 2, 4),
    ],
)
def test_killed_and_resumed(
    kind: str, after: int, bases: int, done: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert python(KILLED, llama, out, kind, after).returncode == -signal.SIGKILL
    assert not out.exists()
    found = {what: len(list((hidden(out) / what).glob("*.safetensors"))) for what in ("bases", "done")}
    assert found == {"bases": bases, "done": done}

    kept: list[str] = []
    keep = Draft.keep
    monkeypatch.setattr(Draft, "keep", lambda self, what, *rest: kept.append(what) or keep(self, what, *rest))
    prune_folder(llama, out, **CUT, resume=True)
    assert kept == ["bases"] * (2 - bases) + ["done"] * (4 - done)  # two blocks and two files
    same(in_memory(llama, tmp_path / "cut", **CUT), out)
    assert not hidden(out).exists()


def test_a_file_of_the_draft_that_went_is_written_again(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    python(KILLED, llama, out, "name", 0)
    next((hidden(out) / "out").glob("*.safetensors")).unlink()
    prune_folder(llama, out, **CUT)
    same(in_memory(llama, tmp_path / "cut", **CUT), out)


def test_draft_of_another_request(llama: Path, tmp_path: Path) -> None:
    python(KILLED, llama, tmp_path / "out", "done", 1)
    with pytest.raises(CloverError, match=r"draft of another request .vo 'Share.share=0.4.' there, 'Share.share=0.5.'"):
        prune_folder(llama, tmp_path / "out", qk=0.3, vo=0.5)
    os.utime(llama / sorted(tensors_files(llama))[0])
    with pytest.raises(CloverError, match=r"draft of another request .model "):
        prune_folder(llama, tmp_path / "out", **CUT)


def tensors_files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.safetensors")]


def test_nothing_to_resume(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"no draft of .*out to resume"):
        prune_folder(llama, tmp_path / "out", **CUT, resume=True)
    assert not hidden(tmp_path / "out").exists()


# --- a full disk ---


def test_file_size_limit(llama: Path, tmp_path: Path) -> None:
    """Any error of the system while writing: one sentence, nothing under the name, and the rest can be gone on with."""
    code = """
import resource, sys
from clover.command.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.argv = ["clover", "prune", sys.argv[1], sys.argv[2], "--qk", "0.3", "--vo", "0.4", "--stream"]
main()
"""
    out = tmp_path / "out"
    run = python(code, llama, out)
    assert run.returncode == 2
    assert "can't be written: File too large; free space and give the same command again" in run.stderr
    assert not out.exists()
    prune_folder(llama, out, **CUT, resume=True)
    same(in_memory(llama, tmp_path / "cut", **CUT), out)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a few pages in memory."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes the rights of root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["16k", "100k"])  # full at the first basis, or when room for files is taken
def test_full_disk(size: str, llama: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(CloverError, match=r"No space left on device.*; free space and give the same command again"):
            prune_folder(llama, disk / "out", **CUT)
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        prune_folder(llama, disk / "out", **CUT, resume=True)
        same(in_memory(llama, tmp_path / "cut", **CUT), disk / "out")


# --- two runs, one output ---


def test_two_runs_on_one_output(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from clover.streaming.stream import prune_folder; prune_folder(*sys.argv[1:3], qk=0.3, vo=0.4)"
    with draft(out, {"other": 1}, Crew(), kinds=("bases", "done")):
        run = python(code, llama, out)
        assert run.returncode
        assert "is being made by another run" in run.stderr
    assert not out.exists()


def test_a_name_that_was_taken_meanwhile(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    finish = Draft.finish

    def late(self: Draft) -> Path:
        out.mkdir()
        (out / "theirs").write_text("precious")
        return finish(self)

    monkeypatch.setattr(Draft, "finish", late)
    with pytest.raises(CloverError, match="was made by someone else meanwhile"):
        prune_folder(llama, out, **CUT)
    assert [p.name for p in out.iterdir()] == ["theirs"]


def test_output_that_exists(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CloverError, match="out exists"):
        prune_folder(llama, tmp_path / "out", **CUT)


def test_a_piece_that_nobody_wrote_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama-gqa", torch.float32)[0].save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(streaming.Weights, "cut", lambda *_: None)
    with pytest.raises(CloverError, match=r"self_attn was not written to .*; give the same command again"):
        prune_folder(tmp_path / "dense", tmp_path / "out", vo=0.25)
    assert not (tmp_path / "out").exists()


def test_what_fails_while_copying_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama-gqa", torch.float32)[0].save_pretrained(tmp_path / "dense")
    write = Shard.write

    def fail(self: Shard, items: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, items)

    with monkeypatch.context() as patch, pytest.raises(CloverError, match=r"No space left on device; free space"):
        patch.setattr(Shard, "write", fail)
        prune_folder(tmp_path / "dense", tmp_path / "out", vo=0.25)
    assert not (tmp_path / "out").exists()
    prune_folder(tmp_path / "dense", tmp_path / "out", vo=0.25, resume=True)
    assert (tmp_path / "out").exists()
