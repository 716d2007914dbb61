"""Running the command line in tests: what it prints where, and tiny models for it to work on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from typer.testing import CliRunner

from clover.command import cli
from families import build
from samples import tokenizer

TEXT = " ".join(f"w{i * i % 47}" for i in range(400))


def narrow_model(folder: Path) -> Path:
    """A tiny half-precision language model with its tokenizer."""
    build("llama-gqa", torch.float32)[0].half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def wide_model(folder: Path) -> Path:
    """One whose MLP has blocks of full rank."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


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
