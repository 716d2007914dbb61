"""Exported graphs: run by ONNX Runtime, they compute what PyTorch does, for any sizes and with their cache."""

from __future__ import annotations

import copy
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import clover
from clover import CloverError
from clover.planning.budget import Limits
from clover.runtimes import onnx
from clover.runtimes.graphs import Graph, graphs
from commands import run
from families import build
from samples import tokenizer

runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing; pip install 'clover-attention[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript is missing; pip install 'clover-attention[onnx]'")

NAMES = {"llama-gqa": ["model"], "clip": ["text_model", "vision_model"], "whisper": ["decoder_model", "encoder_model"]}


@cache
def model(name: str) -> tuple[Any, dict[str, Tensor]]:
    """Of two group sizes at most: what takes time here is the number of nodes."""
    dense, batch = build(name, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Q-K of . of . blocks stays whole")
        return clover.prune(dense, qk=0.3, vo=0.3, calibration=[batch], limits=Limits(groups=2)), batch


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned models of each kind, as ONNX."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, files in NAMES.items():
        seen = onnx.export(model(name)[0], folder / name)
        assert sorted(seen) == files
        assert all(0 <= gap < 1e-3 for gap in seen.values())
    return folder


def session(folder: Path, file: str) -> Any:
    return runtime.InferenceSession(str(folder / f"{file}.onnx"), providers=["CPUExecutionProvider"])


def test_the_folder_holds_graphs_and_config(exported: Path) -> None:
    for name, files in NAMES.items():
        assert sorted(p.stem for p in (exported / name).glob("*.onnx")) == files
        assert json.loads((exported / name / "config.json").read_text())["clover"]["blocks"]
    assert sorted(p.name for p in exported.iterdir()) == sorted(NAMES)  # and no draft beside them


def test_the_cache_is_flat_and_its_inputs_say_so(exported: Path) -> None:
    inputs = {i.name: i.shape for i in session(exported / "llama-gqa", "model").get_inputs()}
    outputs = {o.name for o in session(exported / "llama-gqa", "model").get_outputs()}
    for i, block in enumerate(clover.plan_of(model("llama-gqa")[0]).blocks):
        for kind, columns in (("key", block.qk_kept), ("value", block.vo_kept)):
            shape = inputs[f"past_key_values.{i}.{kind}"]
            assert shape[1] == 1 and shape[3] == columns
            assert isinstance(shape[0], str) and isinstance(shape[2], str), "batch and past are free"
            assert f"present.{i}.{kind}" in outputs
    assert all(isinstance(size, str) for size in inputs["input_ids"] + inputs["attention_mask"])


def test_a_language_model_writes_what_it_writes_in_pytorch(exported: Path) -> None:
    """Two prompts of unequal lengths, so padded on the left, read at once and continued token by token."""
    dense, batch = model("llama-gqa")
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    mask[0, :3] = 0
    expected = dense.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    (graph,), runner = graphs(dense), session(exported / "llama-gqa", "model")
    sizes = {"batch": len(ids), "past": 0, "sequence": 1}
    past = {k: v for k, v in graph.fill(sizes).items() if k.startswith("past")}
    written, fresh = ids, ids
    for _ in range(8):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        inputs = {"input_ids": fresh, "attention_mask": mask, "position_ids": positions, **past}
        out = onnx.run(runner, inputs)
        fresh = out["logits"][:, -1:].argmax(-1)
        past = {k.replace("present", "past_key_values"): v for k, v in out.items() if k != "logits"}
        written, mask = torch.cat([written, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
    assert torch.equal(written, expected)


def test_speech_is_encoded_once_and_decoded_with_both_caches(exported: Path) -> None:
    dense, batch = model("whisper")
    heard = onnx.run(session(exported / "whisper", "encoder_model"), {"input_features": batch["input_features"]})
    cross = {k.replace("present", "past_key_values"): v for k, v in heard.items() if k.startswith("present")}
    runner, ids = session(exported / "whisper", "decoder_model"), batch["decoder_input_ids"]
    decoder = next(g for g in graphs(dense) if g.name == "decoder_model")
    past = {k: v for k, v in decoder.fill({"batch": 2, "past": 0, "sequence": 1}).items() if ".decoder." in k}
    logits = []
    for fresh in ids.split(1, 1):
        out = onnx.run(runner, {"input_ids": fresh, **past, **cross})
        logits.append(out["logits"])
        past = {k.replace("present", "past_key_values"): v for k, v in out.items() if k != "logits"}
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, 1), dense(**batch).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "opt", "bloom", "qwen3", "mistral"])
def test_graphs_name_all_that_goes_in_and_out(name: str) -> None:
    dense, batch = model(name)
    (graph,) = graphs(dense)
    inputs = graph.fill(graph.free[0])
    assert set(batch) <= set(inputs) == set(graph.inputs)
    out = graph.run(inputs)
    assert all(v.shape[0] == 2 for v in out.values())
    for name, shape in graph.inputs.items():
        sizes = {"past + sequence": sum(graph.free[0].get(k, 0) for k in ("past", "sequence")), **graph.free[0]}
        assert tuple(inputs[name].shape) == tuple(sizes.get(s, s) for s in shape)


def test_a_sliding_window_holds_in_the_plain_cache() -> None:
    """The graph's cache keeps all tokens; the mask alone must bound what is seen."""
    dense, batch = model("mistral")
    (graph,), ids = graphs(dense), torch.cat([batch["input_ids"]] * 2, 1)
    made = graph.fill({"batch": 2, "sequence": 1, "past": ids.shape[1] - 1})
    with torch.no_grad():
        out = dense(input_ids=ids[:, :-1], past_key_values=DynamicCache(), use_cache=True).past_key_values
        cached = [t for layer in out.layers for t in (layer.keys, layer.values)]
        made |= dict(zip([k for k in made if k.startswith("past")], cached, strict=True))
        made |= {"input_ids": ids[:, -1:], "attention_mask": torch.ones_like(ids)}
        made["position_ids"] = torch.full_like(ids[:, -1:], ids.shape[1] - 1)
        torch.testing.assert_close(graph.run(made)["logits"], dense(input_ids=ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


class Liar(nn.Module):
    """Computes something else while it is traced."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (x + 0.25 if torch.compiler.is_exporting() else x + 0.0,)


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ({"batch": 2}, {"batch": 3})
    wrong = Graph("model", Liar(), {"x": ("batch", 4)}, ("y",), lambda free: {"x": torch.ones(free["batch"], 4)}, free)
    monkeypatch.setattr(onnx, "graphs", lambda model: [wrong])
    with pytest.raises(CloverError, match=r"model.onnx computes y wrongly for .*: 0.25 away from PyTorch"):
        onnx.export(model("llama-gqa")[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fickle(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            (x,) = tensors
            return (x if x.sum() > 0 else -x,)

    free = ({"batch": 2},)
    graph = Graph("model", Fickle(), {"x": ("batch", 4)}, ("y",), lambda _: {"x": torch.ones(2, 4)}, free)
    monkeypatch.setattr(onnx, "graphs", lambda model: [graph])
    with pytest.raises(CloverError, match="model can't be written as ONNX"):
        onnx.export(model("llama-gqa")[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_a_folder(tmp_path: Path) -> None:
    """Saved in half precision, as models are; the graph is float32."""
    clover.save(copy.deepcopy(model("llama-gqa")[0]).half(), tmp_path / "small", beside=(tokenizer(),))
    done = run("export", tmp_path / "small", tmp_path / "out", "--format", "onnx")
    assert done.code == 0, done.said
    assert "model.onnx within" in done.said
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert session(tmp_path / "out", "model").get_inputs()[2].name == "position_ids"
    again = run("export", tmp_path / "small", tmp_path / "out", "--format", "onnx")
    assert again.code == 2 and "exists" in again.said


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, name: str) -> None:
        raise CloverError(f"this needs {module}: {name}")

    monkeypatch.setattr(onnx, "extra", missing)
    with pytest.raises(CloverError, match="this needs onnx: onnx"):
        onnx.export(model("llama-gqa")[0], tmp_path / "out")


def test_a_decoder_behind_an_encoder_reads_its_caches_alone() -> None:
    dense, batch = model("whisper")
    decoder = next(g for g in graphs(dense) if g.name == "decoder_model")
    with torch.no_grad():
        whole = dense(**batch, use_cache=True)
        caches: EncoderDecoderCache = whole.past_key_values
        ids = batch["decoder_input_ids"][:, :1]
        inputs = {"input_ids": ids}
        for part, held in (("decoder", caches.self_attention_cache), ("encoder", caches.cross_attention_cache)):
            for i, layer in enumerate(held.layers):
                inputs |= {
                    f"past_key_values.{i}.{part}.key": layer.keys,
                    f"past_key_values.{i}.{part}.value": layer.values,
                }
        ordered = {k: inputs[k].clone() for k in decoder.inputs}
        longer = torch.cat([batch["decoder_input_ids"], ids], 1)
        expected = dense(**batch | {"decoder_input_ids": longer}).logits[:, -1:]
        torch.testing.assert_close(decoder.run(ordered)["logits"], expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_experts_has_no_graph(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"MixtralForCausalLM has MixtralExperts.*run it in PyTorch"):
        onnx.export(build("mixtral", torch.float32)[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_also_sees_has_no_graph_of_text_alone(tmp_path: Path) -> None:
    model, _ = build("llava", torch.float32)
    with pytest.raises(CloverError, match=r"also reads pixel_values.*--format padded"):
        onnx.export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
