"""Streaming refuses files that are damaged or contradict each other: by name, and before anything has the final one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import clover
from clover.errors import CloverError
from clover.streaming.layout import Layout
from clover.streaming.shards import INDEX
from clover.streaming.stream import prune_folder
from families import build, pruned
from test_streaming import CUT, save


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny model of two layers in two files."""
    return save("llama-gqa", tmp_path / "dense")


def _truncate(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return rf"{file.name} is damaged or cut off"


def _beheaded(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 4)
    return rf"{file.name} is damaged or cut off"


def _no_file(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.unlink()
    return rf"{file.name} is missing"


def _index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _wrong_place(folder: Path) -> str:
    def move(places: dict[str, str]) -> None:
        places["model.embed_tokens.weight"] = next(
            f for f in places.values() if f != places["model.embed_tokens.weight"]
        )

    _index(folder, move)
    return "index.json (says that|does not place)|model.embed_tokens.weight"


def _not_listed(folder: Path) -> str:
    _index(folder, lambda places: places.pop("model.norm.weight"))
    return "model.norm.weight, which .*index.json does not place there"


def _no_index(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return "index.json is no index of safetensors"


def _outside(folder: Path) -> str:
    _index(folder, lambda places: places.update({"model.norm.weight": "../secret.safetensors"}))
    return "index.json is no index of safetensors"


def _drop(folder: Path, name: str) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    file = folder / places[name]
    left = {k: v for k, v in safetensors.torch.load_file(file).items() if k != name}
    safetensors.torch.save_file(left, file, {"format": "pt"})
    _index(folder, lambda places: places.pop(name))


def _no_value(folder: Path) -> str:
    _drop(folder, "model.layers.1.self_attn.v_proj.weight")
    return "no tensor for model.layers.1.self_attn.v_proj.weight"


def _no_norm(folder: Path) -> str:
    _drop(folder, "model.norm.weight")
    return "no tensor for model.norm.weight"


def _other_heads(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    return r"k_proj.weight has shape \(16, 48\), but config.json gives \(24, 48\)"


def _nan(folder: Path) -> str:
    file = folder / "model-00001-of-00002.safetensors"
    held = safetensors.torch.load_file(file)
    held["model.layers.0.self_attn.q_proj.weight"][3, 3] = torch.nan
    safetensors.torch.save_file(held, file, {"format": "pt"})
    return "layers.0.self_attn.*(nan|NaN|finite)"


def _quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    return "quantised; prune the unquantised model"


def _odd_heads(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    return "is no model that can be loaded|but config.json gives"


def _generation(folder: Path) -> str:
    (folder / "generation_config.json").write_text("{")
    _drop(folder, "model.norm.weight")
    return "no tensor for model.norm.weight"  # as transformers, it takes the settings of the config


@pytest.mark.parametrize(
    "damage",
    [_truncate, _beheaded, _no_file, _wrong_place, _not_listed, _no_index, _outside, _no_value, _no_norm, _other_heads,
     _nan, _quantised, _odd_heads, _generation],
)  # fmt: skip
def test_damaged_source(damage: Any, llama: Path, tmp_path: Path) -> None:
    message = damage(llama)
    with pytest.raises(CloverError, match=message):
        prune_folder(llama, tmp_path / "out", **CUT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("lost", "said"), [("0.w1", "don't fit"), ("3.w2", r"has shape \(3, 48, 64\), but")])
def test_an_expert_is_missing(lost: str, said: str, tmp_path: Path) -> None:
    source = save("mixtral", tmp_path / "dense")
    _drop(source, f"model.layers.1.block_sparse_moe.experts.{lost}.weight")
    with pytest.raises(CloverError, match=rf"layers.1.mlp.experts.*{said}"):
        prune_folder(source, tmp_path / "out", **CUT)


def test_source_that_is_cut_off_meanwhile(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Layout.begin

    def then_cut(self: Layout, *rest: Any) -> None:
        begin(self, *rest)
        for file in llama.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-3000])

    monkeypatch.setattr(Layout, "begin", then_cut)
    with pytest.raises(CloverError, match=r"(ends inside|was cut off while)"):
        prune_folder(llama, tmp_path / "out", **CUT)
    assert not (tmp_path / "out").exists()


def test_only_pickled_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CloverError, match="streaming reads safetensors alone"):
        prune_folder(tmp_path, tmp_path / "out", **CUT)


def test_pruned_already(tmp_path: Path) -> None:
    clover.save(pruned("llama-gqa")[0], tmp_path / "pruned")
    with pytest.raises(CloverError, match="rewritten by clover before"):
        prune_folder(tmp_path / "pruned", tmp_path / "out", **CUT)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="is no model that can be loaded"):
        prune_folder("nobody/nothing", tmp_path / "out", **CUT)


def test_overflow_is_an_error(tmp_path: Path) -> None:
    model = build("llama-gqa", torch.float16)[0]
    for which in ("v_proj", "o_proj"):
        getattr(model.model.layers[0].self_attn, which).weight.data.fill_(6e4)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CloverError, match=r"overflows torch.float16"):
        prune_folder(tmp_path / "dense", tmp_path / "out", **CUT)
