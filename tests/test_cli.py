"""The command line: what works, and what it prints where."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import clover
from clover.command import cli, demo
from commands import TEXT, refuse, run, succeed
from families import build
from samples import tokenizer

SUMMARY = {
    "qk_removed", "vo_removed", "attention_parameters_before", "attention_parameters_after", "parameters_before",
    "parameters_after", "kv_bytes_per_token_before", "kv_bytes_per_token_after",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("calm")


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_help_names_the_commands_and_their_options() -> None:
    overview = run("--help").out
    assert all(f" {name} " in overview for name in ("inspect", "prune", "eval", "tune", "merge", "export", "demo"))
    fixed = {
        "inspect": ["plot", "json"],
        "prune": ["qk", "vo", "part", "calibration", "metric", "qk-threshold", "vo-threshold", "granularity", "report"],
        "eval": ["data", "task", "split", "limit", "json"],
        "tune": ["data", "method", "steps", "lr", "batch", "seed", "eval-data", "json"],
        "demo": ["model", "out", "json"],
    }
    for command, names in fixed.items():
        shown = run(command, "--help").out
        assert all(f"--{name}" in shown for name in names), command


def test_version() -> None:
    assert run("--version").out == f"clover {clover.__version__}\n"


def test_defaults_are_those_of_the_library() -> None:
    assert signature(cli.prune).parameters["groups"].default == clover.Limits().groups
    for name in ("granularity", "part", "seed"):
        assert signature(cli.prune).parameters[name].default == signature(clover.prune).parameters[name].default


def test_inspect(narrow: Path, tmp_path: Path) -> None:
    found, _ = succeed("inspect", narrow, "--plot", tmp_path / "spectra.svg")
    assert found["model"] == str(narrow)
    assert [block["name"] for block in found["blocks"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    block = found["blocks"][0]
    assert (block["part"], block["query_heads"], block["kv_heads"]) == ("decoder", 6, 2)
    assert (block["qk_size"], block["vo_size"]) == (8, 8)
    assert [len(block[key]) for key in ("qk", "vo", "qk_norms", "vo_norms")] == [2, 2, 2, 2]
    assert len(block["vo"][0]) == len(block["vo_norms"][0]) == 8
    assert (tmp_path / "spectra.svg").stat().st_size > 1000


def test_inspect_where_a_norm_fixes_what_is_behind_it(tmp_path: Path) -> None:
    build("qwen3", torch.float32)[0].save_pretrained(tmp_path / "model")
    found, _ = succeed("inspect", tmp_path / "model", "--plot", tmp_path / "spectra.png")
    assert all(block["qk"] == [] and block["vo"] for block in found["blocks"])
    assert "fixed by a norm" in run("inspect", tmp_path / "model").out


def test_inspect_says_why_it_suggests_nothing(narrow: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    found, said = succeed("inspect", narrow, "--calibration", tmp_path / "short.txt")
    assert not found["suggestions"] and "gives one batch alone" in said


def test_inspect_prints_a_table(narrow: Path) -> None:
    shown = run("inspect", narrow).out
    assert "model.layers.1.self_attn" in shown
    assert "of 8" in shown


def test_prune_calibrated(narrow: Path, words: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    sizes, said = succeed("prune", narrow, out, "--qk", 0.25, "--vo", 0.5, "--calibration", words, "--report", page)
    assert set(sizes) == SUMMARY
    assert (sizes["qk_removed"], sizes["vo_removed"]) == (0.25, 0.5)
    assert "warning" not in said
    assert str(out) in said
    assert page.read_text().startswith("<!DOCTYPE html>")
    pruned = clover.load(out)
    assert pruned.dtype == torch.float16  # as the original checkpoint
    assert clover.summary(pruned) == sizes
    assert transformers.AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == tokenizer()("w1 w2").input_ids
    assert not hidden(tmp_path)


def test_prune_prints_a_table(narrow: Path, tmp_path: Path) -> None:
    shown = run("prune", narrow, tmp_path / "out", "--vo", 0.5).out
    assert all(word in shown for word in ("before", "after", "V-O directions", "-50.0 %"))


def test_prune_by_weights_warns_once(narrow: Path, tmp_path: Path) -> None:
    sizes, said = succeed("prune", narrow, tmp_path / "out", "--vo", 0.25)
    assert (sizes["qk_removed"], sizes["vo_removed"]) == (0, 0.25)
    assert said.count("warning: ") == said.count("by the weights alone") == 1


def test_prune_to_a_basis_warns_of_nothing(narrow: Path, tmp_path: Path) -> None:
    sizes, said = succeed("prune", narrow, tmp_path / "out", "--qk", 0, "--vo", 0)
    assert sizes["qk_removed"] == sizes["vo_removed"] == 0
    assert "warning" not in said


@pytest.mark.parametrize("calibrated", [False, True])
def test_prune_streams(calibrated: bool, narrow: Path, words: Path, tmp_path: Path) -> None:
    used = ("--calibration", words, "--limit", 4) if calibrated else ()
    cut = ("--qk", 0.25, "--vo", 0.5, *used)
    sizes, said = succeed("prune", narrow, tmp_path / "streamed", *cut, "--stream")
    expected, _ = succeed("prune", narrow, tmp_path / "whole", *cut)
    assert sizes == expected
    assert ("by the weights alone" in said) is not calibrated
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    weights = [clover.load(tmp_path / which).state_dict() for which in ("streamed", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1]) is not calibrated
    assert not hidden(tmp_path)


def test_prune_by_threshold(narrow: Path, words: Path, tmp_path: Path) -> None:
    norms = succeed("inspect", narrow, "--calibration", words)[0]["blocks"][0]["vo_norms"][0]
    arguments = ["--vo-threshold", norms[len(norms) // 2], "--calibration", words, "--granularity", "layer"]
    sizes, _ = succeed("prune", narrow, tmp_path / "out", *arguments)
    assert sizes["qk_removed"] == 0
    assert 0 < sizes["vo_removed"] < 1


@pytest.mark.filterwarnings("default::UserWarning")
def test_prune_says_what_has_to_stay_and_what_is_missing(tmp_path: Path) -> None:
    build("qwen3", torch.float32)[0].save_pretrained(tmp_path / "qwen3")
    _, said = succeed("prune", tmp_path / "qwen3", tmp_path / "out", "--qk", 0.25, "--vo", 0.25)
    assert "warning: Q-K of 2 of 2 blocks stays whole" in said
    assert "warning: --qk 0.25 removes 0.000: " in said and "--vo 0.25 removes" not in said
    assert "no tokenizer or processor" in said


def test_prune_of_one_part(tmp_path: Path) -> None:
    build("whisper", torch.float32)[0].save_pretrained(tmp_path / "whisper")
    succeed("prune", tmp_path / "whisper", tmp_path / "out", "--qk", 0.5, "--part", "cross")
    assert {block.part for block in clover.plan_of(clover.load(tmp_path / "out")).blocks} == {"cross"}


def test_eval(narrow: Path, words: Path) -> None:
    score, _ = succeed("eval", narrow, "--data", words, "--task", "perplexity", "--limit", 100)
    assert set(score) == {"task", "value", "protocol"}
    assert score["task"] == "perplexity"
    assert score["value"] > 1
    assert score["protocol"]["tokens"] == 100


def test_eval_of_a_pruned_model_prints_its_protocol(narrow: Path, words: Path, tmp_path: Path) -> None:
    succeed("prune", narrow, tmp_path / "out", "--vo", 0.25, "--calibration", words)
    shown = run("eval", tmp_path / "out", "--data", words, "--task", "perplexity").out
    assert shown.startswith("perplexity ")
    assert "window: 128" in shown


def test_demo(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "texts", lambda: (TEXT, TEXT[::-1]))
    result, _ = succeed("demo", "--model", narrow, "--out", tmp_path / "made")
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert made == {"calibration.txt", "held-out.txt", "model", "report.html"}
    assert set(result["summary"]) == SUMMARY
    assert result["summary"]["vo_removed"] == 0.25
    assert set(result["measurements"]) == {
        "perplexity, held-out text", "prefill, tokens per second", "decode, tokens per second",
    }  # fmt: skip
    assert clover.summary(clover.load(result["model"])) == result["summary"]
    assert not hidden(tmp_path)


def test_the_demo_has_a_text_of_its_own() -> None:
    calibration, held_out = (set(part.split("\n\n")) for part in demo.texts())
    assert not calibration & held_out
    assert min(sum(map(len, part)) for part in (calibration, held_out)) > 100_000


def test_interrupt_leaves_nothing_behind(
    narrow: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clover.jobs.folders.sync", stop)  # the weights are on disk by then
    for command in (
        ["prune", narrow, tmp_path / "out", "--vo", 0.5, "--calibration", words],
        ["demo", "--model", narrow, "--out", tmp_path / "out"],
    ):
        monkeypatch.setattr(demo, "texts", lambda: (TEXT, TEXT))
        result = run(*command)
        assert result.code == 130
        assert result.said.endswith(
            "interrupted; what is not said to be saved is not there. tune and prune --stream go on if called again\n"
        )
        assert list(tmp_path.iterdir()) == [words]


def test_tune_and_merge(wide: Path, words: Path, tmp_path: Path) -> None:
    sizes = ("--steps", 4, "--batch", 2, "--lr", 0.02, "--length", 32)
    found, said = succeed("tune", wide, tmp_path / "adapter", "--data", words, "--eval-data", words, *sizes)
    assert (found["method"], found["steps"], found["seed"]) == ("clover", 4, 0)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert f"saved {tmp_path / 'adapter'}" in said
    lora, _ = succeed("tune", wide, tmp_path / "lora", "--data", words, *sizes, "--method", "lora")
    assert 0.5 < lora["trainable_parameters"] / found["trainable_parameters"] < 2
    result = run("merge", wide, tmp_path / "adapter", tmp_path / "merged")
    assert (result.code, result.out) == (0, "")
    dense, merged = (
        succeed("eval", model, "--data", words, "--task", "perplexity")[0]["value"]
        for model in (wide, tmp_path / "merged")
    )
    assert merged < dense
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "lora", "merged", "text.txt"]


def test_export(narrow: Path, tmp_path: Path) -> None:
    succeed("prune", narrow, tmp_path / "pruned", "--qk", 0.25, "--vo", 0.25)
    result = run("export", tmp_path / "pruned", tmp_path / "padded", "--format", "padded")
    assert result.code == 0 and "no smaller" in result.said
    assert type(clover.load(tmp_path / "padded")) is transformers.LlamaForCausalLM
    assert (tmp_path / "padded" / "tokenizer.json").exists()
    assert "was not rewritten by clover" in refuse("export", narrow, tmp_path / "other")
    assert not (tmp_path / "other").exists()
