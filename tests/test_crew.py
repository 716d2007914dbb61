"""Several processes prune one folder: the result of one process, and no result at all when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clover.jobs.crew import crew
from clover.jobs.draft import hidden
from clover.streaming.stream import prune_folder
from test_streaming import CUT, same, save

RUN = """
import os, signal, sys
from clover.jobs.draft import Draft
from clover.streaming.stream import prune_folder
keep = Draft.keep

def dying(self, what, *rest):
    if what == sys.argv[3] and os.environ["RANK"] == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, what, *rest)

Draft.keep = dying
prune_folder(sys.argv[1], sys.argv[2], qk=0.3, vo=0.4)
"""


def launch(source: Path, out: Path, port: int, dies: tuple[str, int] = ("", -1)) -> subprocess.CompletedProcess[str]:
    """Two processes of ``torchrun`` prune a folder; one may be made to die when it has something of a kind to keep."""
    script = out.parent / "run.py"
    script.write_text(RUN)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", script]
    arguments = [source, out, dies[0], dies[1]]
    return subprocess.run([str(c) for c in command + arguments], env=env, capture_output=True, text=True, timeout=300)


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    source = save("llama-gqa", tmp_path / "dense")
    done = launch(source, tmp_path / "two", 29621)
    assert done.returncode == 0, done.stderr[-4000:]
    prune_folder(source, tmp_path / "one", **CUT)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("kind", "rank"), [("bases", 1), ("done", 0)])
def test_a_process_that_dies_ends_the_run(kind: str, rank: int, tmp_path: Path) -> None:
    source, out = save("llama-gqa", tmp_path / "dense"), tmp_path / "out"
    done = launch(source, out, 29622 + rank, (kind, rank))
    assert done.returncode
    assert signal.Signals.SIGKILL.name in done.stderr
    assert not out.exists()
    assert hidden(out).exists()
    prune_folder(source, out, **CUT, resume=True)  # by one process, what two began
    prune_folder(source, tmp_path / "one", **CUT)
    same(tmp_path / "one", out)


def test_a_scheduler_that_only_tells_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with crew() as we:
        assert (we.rank, we.size) == (0, 1)
