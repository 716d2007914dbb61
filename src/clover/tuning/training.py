"""Tune a model by an adapter and merge it: a thin shell over transformers' Trainer, the same for every method.

CLOVER, LoRA, DoRA and PiSSA get the same modules, data, order and schedule, so that a comparison compares methods.
A run that was killed goes on where it was; the adapter's folder appears when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from clover.errors import CloverError, reason, warn
from clover.jobs.crew import crew
from clover.jobs.draft import Draft, draft
from clover.jobs.folders import check_writable
from clover.measure.data import load_processor, text_tokens
from clover.measure.files import file_kind, read_records, read_text
from clover.model.answers import IGNORED, check_words
from clover.model.heads import finite
from clover.model.precision import ready
from clover.model.traits import accepts, max_positions, writes_text
from clover.progress import console
from clover.pruning.checkpoint import load
from clover.tuning.methods import adapter_config
from clover.tuning.recipe import Recipe

CHECKPOINTS = "checkpoints"
"""Where in a run's draft the Trainer keeps them."""


# --- data ---


def examples(path: str | Path, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of every example in a file.

    Args:
        path: ``.jsonl[.gz]`` with ``instruction`` and ``output`` (or ``answer``): the loss is that of the output; or
            ``.txt[.gz]``: windows of ``length`` tokens, all of which are learned.

    Raises:
        CloverError: no examples, or another kind of file.
    """
    kind = file_kind(path)
    if kind == "questions":
        records = (record for _, record in read_records(path))
        found = [answered(f"{r['instruction']}\n", r["output"], tokenizer, length) for r in records]
        _warn_of_cuts(found, path, tokenizer, length)
        return found
    if kind != "text":
        raise CloverError(f"{path} holds {kind}; tuning takes a .txt or a .jsonl, each with or without .gz")
    tokens, start = text_tokens(read_text(path), tokenizer)
    front = [] if start is None else [start]
    room = max(1, length - len(front))
    windows = [front + piece.tolist() for piece in tokens.split(room)]
    found = [{"input_ids": w, "labels": list(w)} for w in windows if len(w) > 1]
    if not found:
        raise CloverError(f"{path} holds too little text to learn from; give at least two tokens")
    return found


def _warn_of_cuts(found: list[dict[str, list[int]]], path: str | Path, tokenizer: Any, length: int) -> None:
    end = tokenizer.eos_token_id
    if cut := 0 if end is None else sum(e["labels"][-1] != end for e in found):
        warn(
            f"{cut} of the {len(found)} answers in {path} end after {length} tokens, question included; raise --length"
        )


def answered(question: str, text: str, tokenizer: Any, length: int) -> dict[str, list[int]]:
    """Ids and labels of ``text`` after ``question``: the loss is that of the text and of the end-of-text token.

    Of what is longer than ``length``, the question loses its beginning, and the text its end.
    """
    prompt = tokenizer(question).input_ids
    answer = tokenizer(text, add_special_tokens=False).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer = (answer + end)[: max(1, length - 1)]  # one that is cut off does not end
    room = max(1, length - len(answer))
    if len(prompt) > room:  # of a long prompt, its end names the choices; what stands in front of any text stays
        front = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
        prompt = front + prompt[len(prompt) - room + len(front) :]
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest: ``input_ids``, ``labels`` and ``attention_mask``, ``(batch, tokens)``."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)

    ids = [list(e["input_ids"]) for e in batch]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([list(e["labels"]) for e in batch], IGNORED),
        "attention_mask": padded([[1] * len(i) for i in ids], 0),
    }


def lean(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same loss of a causal language model, which computes logits only from the first that is needed on.

    Logits dwarf everything else, and questions are not learned. Labels come shifted, as the logits then are.
    """
    following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    needed = (following != IGNORED).any(0).nonzero().flatten().tolist()
    keep = following.shape[1] - needed[0] if needed else 1
    return {**batch, "logits_to_keep": keep, "shift_labels": following[:, -keep:].contiguous()}


def collator(model: Any) -> Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]]:
    """``collate``, and ``lean`` where a model (without its adapter) can compute some of the logits."""
    return (lambda batch: lean(collate(batch))) if "logits_to_keep" in accepts(model) else collate


def contiguous_head(model: Any) -> AbstractContextManager[Any]:
    """Until it is left, the output embeddings see contiguous states, ``(batch, tokens, width)``; only the time changes.

    ``logits_to_keep`` slices the states, and torch multiplies a sliced batch by a frozen weight as a batch of
    products, each with a copy of the weight.
    """
    head = model.get_output_embeddings()
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))


# --- training ---


class _StopAtNaN(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):  # under fp16 a step that overflows is left out
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                first = name == "loss" and state.global_step == 1  # before anything was changed
                remedy = f"lower the learning rate (it is {args.learning_rate:g})"
                remedy = (
                    "the weights or the activations of the base are at fault: repair the model" if first else remedy
                )
                raise CloverError(f"the {name} is {value} at step {state.global_step}; {remedy}")


class _Bar(ProgressCallback):
    """The Trainer's own bar, which would write every step's figures to standard output besides."""

    def on_log(self, *_: Any, **__: Any) -> None: ...


def train(
    model: Any, data: list[Any], recipe: Recipe, folder: Path, *, save_every: int | None = None, shuffle: bool = True
) -> list[Any]:
    """Train what is trainable in ``model``, in place; goes on from the last checkpoint in ``folder``, if there is one.

    Where some weights are bfloat16, the products are (autocast); adapters and their optimiser keep their own dtype.

    Args:
        data: see ``examples``.
        folder: for checkpoints.
        save_every: steps between checkpoints; none when left out.
        shuffle: False takes the examples in their order.

    Returns:
        The Trainer's log: a dict of ``step``, ``loss``, ``learning_rate``, ``grad_norm`` a step.

    Raises:
        CloverError: loss, gradient or a weight became NaN or infinite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=recipe.steps, learning_rate=recipe.rate, seed=recipe.seed,
        per_device_train_batch_size=recipe.batch, warmup_steps=recipe.rise,
        lr_scheduler_type="linear", weight_decay=0.0, logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="steps" if save_every else "no", save_steps=save_every or recipe.steps, save_total_limit=1,
        report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        train_sampling_strategy="random" if shuffle else "sequential",
        bf16=any(p.dtype == torch.bfloat16 for p in model.parameters()), use_cpu=_on_cpu(),
        fp16=not _on_cpu() and any(p.dtype == torch.float16 for p in model.parameters()),
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # more would multiply the batch of a single process in silence
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    callbacks = [_StopAtNaN(), *([_Bar()] if console.is_terminal else [])]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collator(base), callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    last = _last_whole(folder) if save_every else None
    with contiguous_head(base):
        trainer.train(resume_from_checkpoint=last)
    if bad := next((n for n, p in model.named_parameters() if p.requires_grad and not finite(p)), None):
        raise CloverError(  # of the last step, no loss tells
            f"{bad} is NaN or infinite after the last step; lower the learning rate (it is {recipe.rate:g})"
        )
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, which is the Trainer's state."""
    whole = {path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)}
    return max(map(str, whole), key=lambda name: int(name.rpartition("-")[2]), default=None)


def _is_json(file: Path) -> bool:
    """Whether a file was written to its end."""
    with suppress(ValueError):
        json.loads(file.read_text())
        return True
    return False


@torch.inference_mode()
def mean_loss(model: Any, data: Sequence[Any], batch: int = 8) -> float:
    """Mean negative log-likelihood in nats per learned token."""
    total, count = 0.0, 0
    model.eval()
    together = collator(model.get_base_model() if isinstance(model, PeftModel) else model)
    for start in range(0, len(data), batch):
        made = together(data[start : start + batch])
        inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in made.items()}
        if learned := int((inputs["labels"][:, 1:] != IGNORED).sum()):
            total += float(model(**inputs).loss) * learned
            count += learned
    return total / max(1, count)


def tune(
    model: str,
    out: str | Path,
    data: str | Path,
    recipe: Recipe,
    *,
    eval_data: str | Path | None = None,
    save_every: int = 50,
) -> dict[str, Any]:
    """Tune a model and write the adapter: what ``clover tune`` does.

    Args:
        model: folder or hub name of a causal language model.
        out: the adapter's folder; must not exist. Beside it lies ``.NAME.tuning`` until the run is done: the same
            call goes on from there after a kill.
        data: see ``examples``.
        eval_data: likewise; its loss is measured before and after.

    Returns:
        The recipe, ``trainable_parameters``, ``loss`` (mean of the last ten steps), and with ``eval_data``
        ``eval_loss_before`` and ``eval_loss_after``, nats per token.

    Raises:
        CloverError: bad input, see the parts.
    """
    recipe.check()
    check_writable(out)
    processes = PartialState(cpu=_on_cpu())  # first: it gives each process its own device
    base = _trainable(model)
    tokenizer = load_processor(model, "AutoTokenizer")
    recipe = replace(recipe, length=min(recipe.length, max_positions(base) or recipe.length))
    learned = examples(data, tokenizer, recipe.length)
    held_out = None if eval_data is None else examples(eval_data, tokenizer, recipe.length)
    for found in filter(None, (learned, held_out)):
        check_words(torch.tensor([max(e["input_ids"]) for e in found]), base)
    config = adapter_config(base, recipe)
    content = hashlib.sha256(Path(data).read_bytes()).hexdigest()
    weights = (f for kind in ("*.safetensors", "*.bin") for f in sorted(Path(model).glob(kind)))
    files: dict[str, Any] = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in weights}
    files |= {"commit": getattr(base.config, "_commit_hash", None), "processes": processes.num_processes}
    request = {"model": model, "files": files, "data": str(data), "sha256": content, **recipe.to_dict()}
    with crew() as we, draft(out, request, we, kinds=(CHECKPOINTS,), ending="tuning") as made:
        set_seed(recipe.seed)
        losses = {} if held_out is None else {"eval_loss_before": mean_loss(base, held_out, recipe.batch)}
        with _nothing_left(made):
            adapted = get_peft_model(base, config)
        for buffer in adapted.buffers():  # once: during training they stand still
            broadcast(buffer)
        log = _trained(adapted, learned, recipe, made, save_every)
        if held_out is not None:
            losses["eval_loss_after"] = mean_loss(adapted, held_out, recipe.batch)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        last = [entry["loss"] for entry in log[-10:]]
        result = {**recipe.to_dict(), "trainable_parameters": count, "loss": sum(last) / len(last), **losses}
        if processes.is_main_process:
            _finish(adapted, tokenizer, {**result, "log": log}, made)
    processes.wait_for_everyone()
    return result


@contextmanager
def _nothing_left(made: Draft) -> Iterator[None]:
    """After a mistake there is nothing to go on from."""
    try:
        yield
    except CloverError:
        shutil.rmtree(made.folder, ignore_errors=True)
        raise


def _trained(model: Any, data: list[Any], recipe: Recipe, made: Draft, save_every: int) -> list[Any]:
    """The log of ``train``, which goes on from the draft's checkpoints."""
    try:
        with _nothing_left(made):
            return train(model, data, recipe, made.folder / CHECKPOINTS, save_every=save_every)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"torch.save had no space, it seems ({reason(error)})") from error


def _trainable(model: str) -> Any:
    """A causal language model in a dtype that it can be trained in."""
    base, _ = ready(load(model))
    if not writes_text(base):
        raise CloverError(
            f"{model} is a {type(base).__name__}; clover tune trains causal language models: tune others through peft"
        )
    if base.dtype == torch.float16 and not getattr(base, "is_quantized", False):
        return base.float()  # its range is too small for gradients
    return base


def _on_cpu() -> bool:
    """Whether training stays on CPUs; accelerate must be told, or several processes would not find one another."""
    return not torch.cuda.is_available()


def _finish(adapted: Any, tokenizer: Any, record: dict[str, Any], made: Draft) -> None:
    """Write the adapter whole, then give it its name."""
    adapted.save_pretrained(str(made.out), safe_serialization=True)
    tokenizer.save_pretrained(str(made.out))
    (made.out / "training.json").write_text(json.dumps(record, indent=1))
    _draw(record["log"], made.out / "loss.png")
    made.finish()


def _draw(log: list[Any], path: Path) -> None:
    """The loss curve, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([e["step"] for e in log], [e["loss"] for e in log], linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
