"""Tuning and merging from files: what is learned, what a kill leaves, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import clover
from clover import CloverError
from clover.tuning import merging, training
from clover.tuning.config import CloverConfig
from clover.tuning.merging import merge
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import METHODS, Recipe
from clover.tuning.training import (
    IGNORED,
    answered,
    collate,
    contiguous_head,
    examples,
    lean,
    mean_loss,
    tune,
)
from families import GENERATIVE, build
from samples import tokenizer

SMALL = {"steps": 6, "batch": 2, "length": 16, "lr": 3e-2, "warmup": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0)
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(" ".join(f"w{i * i % 47}" for i in range(400)))
    return file


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# --- what is learned ---


def test_of_a_record_the_output_is_learned() -> None:
    made = answered("w1 w2 w3\n", "w4 w5", tokenizer(), 16)
    ids = tokenizer()("w1 w2 w3 w4 w5").input_ids
    assert made == {"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]}


@pytest.mark.parametrize(
    "said", [{"output": "w3"}, {"answer": "w3"}, {"output": "w3", "answer": "w4"}, {"output": "", "answer": "w3"}]
)
def test_a_file_of_records(said: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(json.dumps({"instruction": "w1 w2", **said}) + "\n")
    ids = tokenizer()("w1 w2 w3").input_ids
    assert examples(tmp_path / "records.jsonl", tokenizer(), 8) == [
        {"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]}
    ]


def test_of_a_long_prompt_the_end_is_kept() -> None:
    made = answered("w1 w2 w3 w4\n", "w5", tokenizer(), 3)
    assert made["input_ids"] == tokenizer()("w3 w4 w5").input_ids


def test_of_a_long_prompt_the_beginning_of_any_text_is_kept() -> None:
    """LLaMA and Gemma read a text without its first token as if it made no sense."""
    made = tokenizer(brackets=True)
    made.bos_token = "[CLS]"
    whole = answered("w1 w2 w3 w4\n", "w5", made, 16)["input_ids"]
    kept = answered("w1 w2 w3 w4\n", "w5", made, 4)["input_ids"]
    assert kept == [made.bos_token_id, *whole[-3:]] and whole[0] == made.bos_token_id


def test_what_an_instruction_is_about_is_part_of_the_question(tmp_path: Path) -> None:
    records = [
        {"instruction": "w1", "input": "w2 w3", "output": "w4"},
        {"instruction": "w1", "input": "", "output": "w4"},
    ]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, records)))
    first, second = examples(tmp_path / "alpaca.jsonl", tokenizer(), 8)
    assert first["input_ids"] == tokenizer()("w1 w2 w3 w4").input_ids
    assert second["input_ids"] == tokenizer()("w1 w4").input_ids
    (tmp_path / "bad.jsonl").write_text(json.dumps({"instruction": "w1", "input": ["w2"], "output": "w4"}))
    with pytest.raises(CloverError, match="must be a JSON object with strings"):
        examples(tmp_path / "bad.jsonl", tokenizer(), 8)


def test_a_text_is_learned_whole(text: Path) -> None:
    windows = examples(text, tokenizer(), 64)
    assert [len(w["input_ids"]) for w in windows] == [64] * 6 + [16]
    assert all(w["input_ids"] == w["labels"] for w in windows)


def test_padding_is_neither_seen_nor_learned() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("name", GENERATIVE)
def test_leaving_out_logits_keeps_loss_and_gradients(name: str) -> None:
    model, _ = build(name, torch.float32)
    data = [{"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]} for ids in ([5, 6, 7, 8], [9, 5, 6])]
    results = []
    for batch in (collate(data), lean(collate(data))):
        out = model(**batch)
        (grad,) = torch.autograd.grad(out.loss, model.get_input_embeddings().weight)
        results.append((out.loss, grad, out.logits.shape[1]))
    (loss, grad, every), (lean_loss, lean_grad, few) = results
    assert (every, few) == (4, 3)
    torch.testing.assert_close((lean_loss, lean_grad), (loss, grad))


def test_the_head_multiplies_states_that_lie_side_by_side() -> None:
    """A slice of the states makes torch copy the weight of the head for every sequence."""
    model, batch = build("llama-gqa", torch.float32)
    head, seen = model.get_output_embeddings(), []
    plain = model(**batch, logits_to_keep=3).logits
    with contiguous_head(model):
        watch = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
        kept = model(**batch, logits_to_keep=3).logits
        watch.remove()
    assert seen == [True]
    assert not head._forward_pre_hooks
    torch.testing.assert_close(kept, plain)


def test_a_bfloat16_base_trains_as_float32_does(tmp_path: Path) -> None:
    data = [{"input_ids": [i, i + 1, i + 2, i + 3]} for i in range(5, 25)]
    data = [{**e, "labels": e["input_ids"]} for e in data]
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama-gqa", torch.bfloat16)[0].to(dtype)
        adapted = get_peft_model(model, adapter_config(model, Recipe(parts=("qk", "q", "vo"))))
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        log = training.train(adapted, data, Recipe(steps=10, lr=1e-2, batch=4), tmp_path, shuffle=False)
        curves.append([e["loss"] for e in log])
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_mean_loss_weighs_every_token_alike() -> None:
    model, _ = build("llama-gqa", torch.float32)
    data = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3, 4, 5], [6, 7], [8, 9, 10])]
    assert mean_loss(model, data, batch=1) == pytest.approx(mean_loss(model, data, batch=3), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_tune_lowers_the_loss(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(method, **{**SMALL, "steps": 12})
    result = tune(str(llama), tmp_path / "adapter", text, recipe, eval_data=text)
    assert result["eval_loss_after"] < 0.9 * result["eval_loss_before"]
    saved = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert [entry["step"] for entry in saved["log"]] == list(range(1, 13))
    assert (tmp_path / "adapter" / "loss.png").stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    base: Any = clover.load(llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert mean_loss(loaded, examples(text, tokenizer(), 16)) == pytest.approx(result["eval_loss_after"], rel=1e-5)


def test_every_method_trains_about_as_many_parameters_on_the_same_modules() -> None:
    counts, modules = {}, {}
    for method in METHODS:
        model = build("llama-gqa", torch.float32)[0]
        config = adapter_config(model, Recipe(method, parts=("qk", "vo")))
        adapted = get_peft_model(model, config)
        trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
        modules[method] = {n.split("_proj")[0] for n in trained}
        counts[method] = sum(v for n, v in trained.items() if "magnitude" not in n)
    assert len(set(map(frozenset, modules.values()))) == 1
    one_rank = 2 * 2 * (48 + 16)  # two layers, two projections
    assert all(abs(c - counts["clover"]) <= max(one_rank / 2, one_rank - counts["clover"]) for c in counts.values())


@pytest.mark.parametrize("method", METHODS)
def test_of_a_model_that_sees_what_writes_is_tuned(method: str) -> None:
    model, batch = build("llava", torch.float32)
    adapted = get_peft_model(model, adapter_config(model, Recipe(method, block_size=16)))
    ids = batch["input_ids"].clamp_max(50)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in n and p.grad is not None for n, p in trained.items())


# --- kills and mistakes ---


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**SMALL)
    tune(str(llama), tmp_path / "whole", text, recipe)

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    guard = training._StopAtNaN
    with monkeypatch.context() as patch:
        patch.setattr(training, "_StopAtNaN", Kill)
        with pytest.raises(KeyboardInterrupt):
            tune(str(llama), tmp_path / "killed", text, recipe, save_every=2)
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.tuning" / "checkpoints" / "checkpoint-4").is_dir()

    steps: list[int] = []

    class Count(guard):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    monkeypatch.setattr(training, "_StopAtNaN", Count)
    half = tmp_path / ".killed.tuning" / "checkpoints" / "checkpoint-5"  # killed while it was written
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 5, "log_')
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text("w1 w2 w3")
    with pytest.raises(CloverError, match=r"draft of another request \(data .*; remove it"):
        tune(str(llama), tmp_path / "killed", other, recipe, save_every=2)
    with pytest.raises(CloverError, match=r"draft of another request \(lr 0.03 there, 0.02 here"):
        tune(str(llama), tmp_path / "killed", text, Recipe(**{**SMALL, "lr": 2e-2}), save_every=2)
    tune(str(llama), tmp_path / "killed", text, recipe, save_every=2)
    assert steps == [5, 6]
    assert not (tmp_path / ".killed.tuning").exists()
    for name, tensor in adapter(tmp_path / "whole").items():
        assert torch.equal(adapter(tmp_path / "killed")[name], tensor), name


def test_two_runs_do_not_write_one_folder(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("clover.jobs.draft.sync", synced.append)
    refused: list[str] = []

    class Second(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with pytest.raises(CloverError) as error:
                tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))
            refused.append(str(error.value))

    monkeypatch.setattr(training, "_StopAtNaN", Second)
    tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))
    assert len(refused) == SMALL["steps"]
    assert all("adapter is being made by another run; wait for it" in said for said in refused)
    assert synced == [tmp_path / ".adapter.tuning" / "out"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("module", "name"), [(peft.peft_model, "safe_save_file"), (torch, "save"), (training, "_draw")]
)
def test_a_full_disk_is_told_and_the_run_goes_on(
    module: Any, name: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint (adapter or optimiser), or at the end: from then on no file grows beyond 500 bytes."""
    resource = pytest.importorskip("resource")
    most, write = resource.getrlimit(resource.RLIMIT_FSIZE), getattr(module, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, most[1]))
        return write(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CloverError, match=r"adapter can't be written.*free space"):
        patch.setattr(module, name, limited)
        try:
            tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL), save_every=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
    tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL), save_every=2)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_run_does_not_go_on_upon_another_base(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_finish", killed)
        tune(str(base), tmp_path / "adapter", text, Recipe(**SMALL), save_every=2)
    os.utime(base / "model.safetensors")
    with pytest.raises(CloverError, match=r"\.adapter\.tuning is the draft of another request \(files "):
        tune(str(base), tmp_path / "adapter", text, Recipe(**SMALL), save_every=2)
    (tmp_path / ".adapter.tuning/request.json").write_text("")
    with pytest.raises(CloverError, match=r"request.json is damaged; remove .*\.adapter\.tuning and begin anew"):
        tune(str(base), tmp_path / "adapter", text, Recipe(**SMALL), save_every=2)


def test_a_loss_that_is_no_number_stops_the_run(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"(loss|grad_norm) is (nan|inf) at step \d; lower the learning rate"):
        tune(str(llama), tmp_path / "adapter", text, Recipe(**{**SMALL, "lr": 1e38}))
    assert not any(tmp_path.iterdir())


def test_a_last_step_that_leaves_no_number_stops_the_run(llama: Path, text: Path, tmp_path: Path) -> None:
    """Its loss is that of before it."""
    with pytest.raises(CloverError, match=r"is NaN or infinite after the last step; lower the learning rate"):
        tune(str(llama), tmp_path / "adapter", text, Recipe(**{**SMALL, "lr": 1e39, "steps": 1, "warmup": 0}))
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_no_good_is_not_blamed_on_the_learning_rate(llama: Path, text: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    model = LlamaForCausalLM.from_pretrained(base)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(CloverError, match=r"the loss is nan at step 1; .*repair the model"):
        tune(str(base), tmp_path / "adapter", text, Recipe(**SMALL))


def test_a_mended_command_takes_over_the_draft_of_one_that_did_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(training, "train", raising(torch.OutOfMemoryError))
        tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))
    tune(str(llama), tmp_path / "adapter", text, Recipe(**{**SMALL, "batch": 1}))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def raising(error: type[Exception]) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def test_a_full_disk_is_told_where_a_tokenizer_is_written(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library raises an exception of no class."""
    monkeypatch.setattr(training, "_finish", lambda *_: raising_plainly("No space left on device (os error 28)"))
    with pytest.raises(CloverError, match=r"can't be written: No space left .*; free space"):
        tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))


def raising_plainly(message: str) -> None:
    raise Exception(message)


def test_words_that_a_model_does_not_know_are_refused(llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(8)
    model.save_pretrained(base)
    (tmp_path / "text.txt").write_text("w1 w40 " * 20)
    with pytest.raises(CloverError, match="tokenizer"):
        tune(str(base), tmp_path / "adapter", tmp_path / "text.txt", Recipe(**SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adalora"}, "method 'adalora' is unknown; choose among clover, lora, dora, pissa"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 8}, "rank is 8, but clover has none"),
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"block_size": 0}, "block_size is 0"),
        ({"parts": ("down",)}, "'down'"),
    ],
)
def test_a_bad_recipe_is_refused(change: Any, message: str, llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=message):
        tune(str(llama), tmp_path / "adapter", text, Recipe(**{**SMALL, **change}))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("one.txt", "w1", "too little text"),
        ("empty.jsonl", "\n", "holds no text"),
        ("half.jsonl", '{"instruction": "w1"}\n', "answer"),
        ("list.tsv", "file\ttext\n", "holds manifest; tuning takes"),
    ],
)
def test_bad_data_is_refused(name: str, content: str, message: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CloverError, match=message):
        tune(str(llama), tmp_path / "adapter", tmp_path / name, Recipe(**SMALL))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["t5", "bert", "whisper"])
def test_only_causal_language_models_are_tuned(name: str, text: Path, tmp_path: Path) -> None:
    build(name, torch.float32)[0].save_pretrained(tmp_path / name)
    with pytest.raises(CloverError, match=r"clover tune trains causal language models"):
        tune(str(tmp_path / name), tmp_path / "adapter", text, Recipe(**SMALL))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_output_that_exists_is_refused_before_anything_is_loaded(tmp_path: Path, text: Path) -> None:
    with pytest.raises(CloverError, match="exists"):
        tune("no model", tmp_path, text, Recipe(**SMALL))


# --- with TRL ---


def test_sft_trainer(llama: Path, tmp_path: Path) -> None:
    """In a process of its own: trl warns when it is imported."""
    code = """
import sys
from pathlib import Path
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from clover import CloverConfig

folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.eos_token = "w0"
settings = SFTConfig(output_dir=out, max_steps=4, learning_rate=3e-2, per_device_train_batch_size=4, logging_steps=1,
                     report_to=[], use_cpu=True, bf16=False, save_strategy="steps", save_steps=2)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=settings, processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4 w5"] * 16}), peft_config=CloverConfig(),
)
trainer.train()
losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
assert losses[-1] < 0.5 * losses[0], losses
assert (Path(out) / "checkpoint-2" / "adapter_model.safetensors").exists()
"""
    command = [sys.executable, "-c", code, str(llama), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


# --- merge ---


@pytest.mark.parametrize("method", ["clover", "lora"])
def test_the_merged_model_computes_what_the_adapter_does(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    result = tune(str(llama), tmp_path / "adapter", text, Recipe(method, **SMALL), eval_data=text)
    merged = clover.load(merge(str(llama), tmp_path / "adapter", tmp_path / "merged"), dtype=torch.float32)
    found = mean_loss(merged, examples(text, tokenizer(), 16))
    assert found == pytest.approx(result["eval_loss_after"], rel=1e-3)  # the base is in half precision
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_pruned_model_is_tuned_and_merged_like_any_other(llama: Path, text: Path, tmp_path: Path) -> None:
    model: Any = clover.load(llama, dtype=torch.float32)
    clover.prune(model, qk=0.25, vo=0.25)
    pruned = clover.save(model, tmp_path / "pruned", beside=(tokenizer(),))
    result = tune(str(pruned), tmp_path / "adapter", text, Recipe(**SMALL), eval_data=text)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    merged = clover.load(merge(str(pruned), tmp_path / "adapter", tmp_path / "merged"))
    assert mean_loss(merged, examples(text, tokenizer(), 16)) == pytest.approx(result["eval_loss_after"], rel=1e-4)


def test_an_adapter_for_another_model_is_not_merged(llama: Path, text: Path, tmp_path: Path) -> None:
    tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))
    other: Any = clover.load(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CloverError, match=r"can't be merged into .*other \(.* tuned on another base model"):
        merge(str(tmp_path / "other"), tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(CloverError, match=r"has no adapter_config\.json"):
        merge(str(llama), tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_the_dense_model_is_not_half_merged_into_the_pruned_one(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    tune(str(llama), tmp_path / "adapter", text, Recipe(method, **SMALL))
    assert merge(str(llama), tmp_path / "adapter", tmp_path / "merged").exists()
    model: Any = clover.load(llama)
    clover.prune(model, qk=0.25, vo=0.25)
    pruned = clover.save(model, tmp_path / "pruned")
    with pytest.raises(CloverError, match=r"model\.layers\.0\.self_attn\.k_proj.* made for"):
        merge(str(pruned), tmp_path / "adapter", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_lies_beside_a_model_is_looked_for_before_it_is_merged(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))

    def damaged(name: str) -> None:
        raise CloverError("the tokenizer is damaged")

    monkeypatch.setattr(merging, "found_beside", damaged)
    monkeypatch.setattr(merging, "load", lambda _: pytest.fail("loaded before"))
    with pytest.raises(CloverError, match="tokenizer is damaged"):
        merge(str(llama), tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("damage", ["no weights", "cut off", "config", "another architecture"])
def test_a_damaged_adapter_is_told_in_one_sentence(damage: str, llama: Path, text: Path, tmp_path: Path) -> None:
    adapter, model = tmp_path / "adapter", llama
    tune(str(llama), adapter, text, Recipe(**SMALL))
    weights = adapter / "adapter_model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (adapter / "adapter_config.json").write_text("{")
    else:
        model = tmp_path / "gpt2"
        build("gpt2")[0].save_pretrained(model)
    told = "the weights in .* are damaged .* restore the file" if damage == "cut off" else "can't be merged into"
    with pytest.raises(CloverError, match=told):
        merge(str(model), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_tied_output_embeddings_is_not_merged(text: Path, tmp_path: Path) -> None:
    """The input's would change with them."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    for tied in (True, False):
        base, adapter = tmp_path / f"base-{tied}", tmp_path / f"adapter-{tied}"
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied))
        model.save_pretrained(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft tells at length
            adapted = get_peft_model(model, CloverConfig(target_modules=["lm_head", "k_proj"], block_size=16))
            adapted.save_pretrained(adapter)
            if tied:
                with pytest.raises(CloverError, match="tunes the output embeddings, which are tied to the input's"):
                    merge(str(base), adapter, tmp_path / "merged")
            else:
                merge(str(base), adapter, tmp_path / "merged")
        assert (tmp_path / "merged").exists() == (not tied)


def test_no_example_is_longer_than_asked() -> None:
    long = training.answered("a question " * 10, "an answer " * 300, tokenizer(), 64)
    assert len(long["input_ids"]) == len(long["labels"]) == 64
    assert long["labels"][0] == training.IGNORED and long["labels"][1] != training.IGNORED


def test_an_answer_that_is_cut_off_does_not_end(tmp_path: Path) -> None:
    """Or every long example would teach to stop in the middle of a sentence."""
    words = tokenizer()
    words.eos_token = "w49"
    whole, cut = (training.answered("w1", " ".join(["w2"] * n), words, 9)["labels"] for n in (3, 30))
    assert whole[-1] == words.eos_token_id and cut[-1] != words.eos_token_id
    file = tmp_path / "long.jsonl"
    rows = [{"instruction": "w1", "output": " ".join(["w2"] * n)} for n in (3, 30, 40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"2 of the 3 answers in .*long.jsonl end after 9 tokens"):
        examples(file, words, 9)


def test_examples_have_no_more_tokens_than_positions(tmp_path: Path) -> None:
    build("gpt2", torch.float32)[0].save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 47}" for i in range(400)))
    recipe = Recipe(**{**SMALL, "steps": 1, "length": 300, "block_size": 16})
    result = tune(str(tmp_path / "gpt2"), tmp_path / "adapter", tmp_path / "text.txt", recipe)
    assert result["length"] == clover.load(tmp_path / "gpt2").config.n_positions


def test_a_bar_writes_nothing_to_standard_output(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.console, "_force_terminal", True)
    tune(str(llama), tmp_path / "adapter", text, Recipe(**SMALL))
    out, err = capsys.readouterr()
    assert out == "" and "6/6" in err
