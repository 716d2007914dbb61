"""What every test shares: no network, one seed, and the real weights and data where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers; subprocesses inherit it
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads that wait for a core cost more than they bring
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import numpy as np
import pytest
import torch

MODELS = Path(os.environ.get("CLOVER_MODELS", Path.home() / ".cache/clover-models"))
DATA = Path(os.environ.get("CLOVER_DATA", Path(__file__).resolve().parents[2] / "shared/data"))
REAL = {"smollm2", "whisper", "minilm", "wikitext2", "speech", "commonsense"}

# Equal runs give equal results, and a busy machine is no failure.
hypothesis.settings.register_profile("clover", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("clover")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``real`` what asks for real weights or data, before ``-m`` selects."""
    for item in items:
        if REAL.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("real")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product of experts knows no float64; transformers has a loop in its place."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)


@pytest.fixture
def exact_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotations and eager softmax (BLOOM and Gemma 2 know no other) compute in float32: what is exact would look
    wrong by 1e-6. Let them stay in the model's float64."""
    to, single = torch.Tensor.to, torch.Tensor.float
    wide = torch.float64

    def cast(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        narrows = x.dtype == wide and torch.float32 in (*args, kwargs.get("dtype"))
        return x if narrows else to(x, *args, **kwargs)

    zeros = torch.zeros_like

    def empty(x: torch.Tensor, **given: Any) -> torch.Tensor:  # where the outputs of experts are summed
        narrows = x.dtype == wide and given.get("dtype") == torch.float32
        return zeros(x, **(given | {"dtype": wide} if narrows else given))

    monkeypatch.setattr(torch, "zeros_like", empty)
    monkeypatch.setattr(torch.Tensor, "to", cast)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == wide else single(x))
    softmax, method = torch.nn.functional.softmax, torch.Tensor.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None, **_: softmax(x, dim))
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim=-1, dtype=None: method(x, dim))


@pytest.fixture
def calm() -> Iterator[None]:
    """For tests of the commands, which quieten transformers for the rest of the process."""
    import transformers

    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny half-precision language model with its tokenizer, a folder."""
    from commands import narrow_model

    return narrow_model(tmp_path_factory.mktemp("models") / "narrow")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose MLP has blocks of full rank."""
    from commands import wide_model

    return wide_model(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three clips of odd rates and formats, one of them stereo; the second is for calibration."""
    import soundfile

    rows = [("a.wav", 8000, 1), ("b.flac", 11025, 1), ("c.ogg", 44100, 2)]
    for name, rate, channels in rows:
        time = np.arange(rate) / rate
        soundfile.write(tmp_path / name, np.stack([0.5 * np.sin(2 * np.pi * 440 * time)] * channels, 1), rate)
    table = 'split\tfile\ttext\ntest\ta.wav\tone "quoted\ncalibration\tb.flac\ttwo\ntest\tc.ogg\tthree\n'
    (tmp_path / "m.tsv").write_text(table)
    return tmp_path / "m.tsv"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "deeper/c.webp"]):
        Image.new("L" if i else "RGBA", (20 + i, 30)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A file of text for those models."""
    from commands import TEXT

    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a transformers folder."""
    return _folder(MODELS / "smollm2", "CLOVER_MODELS")


@pytest.fixture(scope="session")
def whisper() -> Path:
    """Whisper base, a transformers folder."""
    return _folder(MODELS / "whisper-base", "CLOVER_MODELS")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a transformers folder."""
    return _folder(MODELS / "minilm", "CLOVER_MODELS")


@pytest.fixture(scope="session")
def wikitext2() -> Path:
    """WikiText-2, raw: ``{train,validation,test}.txt.gz``."""
    return _folder(DATA / "wikitext2", "CLOVER_DATA")


@pytest.fixture(scope="session")
def speech() -> Path:
    """LJSpeech utterances: ``manifest.tsv`` (file, text, split) and the files that it names."""
    return _folder(DATA / "speech", "CLOVER_DATA")


@pytest.fixture(scope="session")
def commonsense() -> Path:
    """Multiple-choice sets: ``NAME.{train,test}.jsonl.gz``."""
    return _folder(DATA / "commonsense", "CLOVER_DATA")


def _folder(path: Path, variable: str) -> Path:
    """``path``, or skip the test that needs it."""
    if not path.is_dir():
        pytest.skip(f"{path} is missing; set {variable} to the folder that holds {path.name!r}")
    return path
