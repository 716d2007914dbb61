"""Two saved models side by side, in Python and on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import clover
from clover.command.show import show_runtime
from clover.errors import CloverError
from clover.measure import bench
from clover.measure.bench import compare_runtime
from clover.measure.cost import compare_throughput, random_inputs
from commands import run, succeed
from families import build, pruned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model and its cut, saved."""
    folder = tmp_path_factory.mktemp("pair")
    build("llama-gqa", torch.float32)[0].save_pretrained(folder / "dense")
    clover.save(pruned("llama-gqa", dtype=torch.float32)[0], folder / "pruned")
    return folder / "dense", folder / "pruned"


def test_bench_runtime(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = succeed(
        "bench", "runtime", *pair, "--context", 8, "--context", 16, "--new-tokens", 2, "--repeats", 1, "--batch", 2
    )
    assert list(result["contexts"]) == ["8", "16"] and result["batch"] == 2 and result["dtype"] == "float32"
    summary = clover.summary(clover.load(pair[1]))
    for context, figures in result["contexts"].items():
        tokens = 2 * (int(context) + 2)
        assert figures["kv_bytes"] == [tokens * summary[f"kv_bytes_per_token_{side}"] for side in ("before", "after")]
        weights = [4 * summary[f"parameters_{side}"] for side in ("before", "after")]
        assert figures["weight_bytes"] == weights
        moved = [w + c for w, c in zip(weights, figures["kv_bytes"], strict=True)]
        assert figures["decode_bound"] == [1.0, pytest.approx(moved[0] / moved[1])]
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"):
            assert min(figures[key]) > 0
        assert figures["peak_bytes"][0] > 50 * 2**20, "an interpreter with torch is larger"
    show_runtime(result)
    assert "decode tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "contexts"), [("bert", ["8", "16"]), ("vit", [""]), ("dinov3", [""]), ("wav2vec2", [""])]
)
def test_an_encoder_reads_a_context_or_what_has_its_own_size(
    name: str, contexts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("clover.measure.bench._peak", lambda *_: 1)
    build(name, torch.float32)[0].save_pretrained(tmp_path / name)
    seen: list[int] = []

    def watch(models: Any, context: int, **options: Any) -> Any:
        seen.append(random_inputs(models["dense"], 1, context).get("input_ids", torch.zeros(1, 0)).shape[1])
        return compare_throughput(models, context=context, **options)

    monkeypatch.setattr("clover.measure.bench.compare_throughput", watch)
    result = compare_runtime(str(tmp_path / name), str(tmp_path / name), contexts=(8, 16), repeats=1)
    assert list(result["contexts"]) == contexts and seen == [int(c or 0) for c in contexts]
    for figures in result["contexts"].values():
        assert set(figures) == {"items_per_second", "weight_bytes", "peak_bytes"}


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_a_language_model_that_sees_is_timed_on_text(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("clover.measure.bench._peak", lambda *_: 1)
    build(name, torch.float32)[0].save_pretrained(tmp_path / name)
    result = compare_runtime(str(tmp_path / name), str(tmp_path / name), contexts=(8,), new_tokens=2, repeats=1)
    assert min(result["contexts"]["8"]["decode_tokens_per_second"]) > 0 and min(result["contexts"]["8"]["kv_bytes"]) > 0


def test_a_model_that_reads_what_nobody_knows() -> None:
    class Reader(torch.nn.Module):
        config, dtype, device = None, torch.float32, torch.device("cpu")

        def forward(self, smells: torch.Tensor) -> torch.Tensor:
            return smells

    with pytest.raises(CloverError, match="Reader reads smells; take a part of it"):
        random_inputs(Reader(), 1, 4)


def die(*_: Any) -> None:
    os._exit(1)


def test_a_process_that_is_killed_takes_no_other_figure_with_it(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clover.measure.bench.peak_bytes", die)
    with pytest.warns(UserWarning, match="the process that measured the memory of .*dense was killed"):
        assert bench._peak(str(pair[0]), "float32", {}) is None
    result: dict[str, Any] = dict.fromkeys(("device", "dtype", "batch"), "")
    show_runtime(
        result | {"ratios": {"8": {}}, "contexts": {"8": {"peak_bytes": [None, 2**20], "weight_bytes": [2**20, None]}}}
    )
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "MiB" in line] == ["1.00", "1.00"]


def test_models_of_different_kinds_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    build("bert", torch.float32)[0].save_pretrained(tmp_path / "bert")
    with pytest.raises(CloverError, match="models of different kinds; compare a model with its own cut"):
        compare_runtime(str(pair[0]), str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--context", 0], "must be at least 1"), (["--context", 500], "exceed the 128 positions")]
)
def test_bad_contexts(pair: tuple[Path, Path], arguments: list[Any], said: str) -> None:
    result = run("bench", "runtime", *pair, *arguments)
    assert result.code == 2 and said in " ".join(result.said.split())
