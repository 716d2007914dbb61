"""Calibration a layer at a time: every family, behind cut layers, resumed, spilled to disk and shared by processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clover
from clover.errors import CloverError
from clover.jobs.crew import Crew
from clover.jobs.draft import Draft, hidden
from clover.streaming import layerwise
from clover.streaming.layerwise import stacks, walk
from clover.streaming.pieces import Pieces
from clover.streaming.sequential import Sample, inside, observe
from clover.streaming.shards import Entry
from clover.streaming.stream import prune_folder
from families import CASES, COPIES, build, outputs
from test_streaming import python, same, tensors

CUT: dict[str, Any] = {"qk": 0.3, "vo": 0.4}


def prepared(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Any], Path]:
    """A model, calibration batches for it, and the folder that it is saved in."""
    model, _ = build(name, dtype)
    batches = [build_batch(name, seed, dtype) for seed in range(4)]
    model.save_pretrained(folder, max_shard_size="40KB")
    return model, batches, folder


def build_batch(name: str, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in (CASES | COPIES)[name][1]().items()}


def error(model: Any, reference: Any, batch: Any) -> float:
    want = outputs(reference, batch)
    return float((outputs(model, batch) - want).norm() / want.norm())


# --- a layer at a time ---


def test_a_model_that_changes_hidden_states_between_layers(tmp_path: Path) -> None:
    model, batch = build("qwen3-vl")
    order = stacks(model, clover.model.survey.blocks(model))
    walk(model, order, [{"input_ids": batch["input_ids"]}], lambda name, _: model.get_submodule(name))
    with pytest.raises(CloverError, match=r"changes hidden states between the layers of model\.language_model\."):
        walk(model, order, [batch], lambda name, _: model.get_submodule(name))


@pytest.mark.parametrize("name", CASES)
def test_a_walk_is_the_models_own_forward(name: str) -> None:
    """What comes out of each layer, and so what each layer was called with, is what the whole model makes of it."""
    model, batch = build(name)
    order = stacks(model, clover.model.survey.blocks(model))
    expected: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> Any:
        return lambda _, __, out: expected.__setitem__(layer, out if isinstance(out, torch.Tensor) else out[0])

    hooks = [model.get_submodule(n).register_forward_hook(keep(n)) for stack in order for n in stack.layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    found: dict[str, torch.Tensor] = {}

    def layer(layer_name: str, inputs: Any) -> Any:
        with torch.no_grad():
            found[layer_name] = layerwise.run(model.get_submodule(layer_name), *next(iter(inputs)))[0]
        return model.get_submodule(layer_name)

    walk(model, order, [batch, {key: value[:1] for key, value in batch.items()}], layer)
    assert found.keys() == expected.keys()
    assert len(found) >= 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)


def test_hidden_states_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, source = prepared("llama-gqa", tmp_path / "dense")
    del model
    prune_folder(source, tmp_path / "memory", **CUT, calibration=batches)
    monkeypatch.setattr(layerwise, "MEMORY", 2 * 12 * 48 * 8)  # of two sequences of 12 tokens: one batch of four
    saved: list[Any] = []
    monkeypatch.setattr(layerwise, "save_file", lambda *a, real=layerwise.save_file: saved.append(a) or real(*a))
    prune_folder(source, tmp_path / "disk", **CUT, calibration=batches)
    assert len({path for _, path in saved}) >= 3
    same(tmp_path / "memory", tmp_path / "disk")


def test_attention_in_no_list_of_layers() -> None:
    model, _ = build("llama-gqa")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(CloverError, match=r"in no list of layers; calibrate the model in memory"):
        stacks(model, clover.model.survey.blocks(model))


# --- what comes out ---


@pytest.mark.parametrize("name", [*CASES, "llava", "marian"])
def test_better_than_by_weights(name: str, tmp_path: Path) -> None:
    model, batches, source = prepared(name, tmp_path / "dense", torch.float32)
    said = prune_folder(source, tmp_path / "calibrated", vo=0.4, calibration=batches)
    prune_folder(source, tmp_path / "weights", vo=0.4)
    calibrated, weights = (clover.load(tmp_path / which) for which in ("calibrated", "weights"))
    assert clover.summary(calibrated) == said
    errors = [sum(error(cut, model, batch) for batch in batches) for cut in (calibrated, weights)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "bert", "clip", "gemma3-image"])
def test_at_full_rank_nothing_changes(name: str, tmp_path: Path) -> None:
    model, batches, source = prepared(name, tmp_path / "dense", torch.float32)
    prune_folder(source, tmp_path / "turned", qk=0, vo=0, calibration=batches)
    turned = clover.load(tmp_path / "turned")
    assert error(turned, model, batches[1]) < 1e-4


def test_who_reads_a_layer_beside_the_last_is_told(tmp_path: Path) -> None:
    """LLaVA's default reads the tower's last layer but one, which is not there any more when the text is read."""
    model, batches, _ = prepared("llava", tmp_path / "dense", torch.float32)
    model.config.vision_feature_layer = -2
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CloverError, match=r"outputs of single layers before it .*; calibrate the model in memory"):
        prune_folder(tmp_path / "other", tmp_path / "cut", vo=0.4, calibration=batches)
    clover.prune(model, vo=0.4, part="decoder", calibration=batches)


def test_moments_are_those_of_the_path_in_memory(tmp_path: Path) -> None:
    """All but the gradient's: of the same tokens, where all queries are sampled."""
    model, batches, _ = prepared("llama-gqa", tmp_path / "dense")
    found = clover.model.survey.blocks(model)
    whole = clover.calibration.calibrate.calibrate(model, found, batches)
    sample, mine = Sample.of(batches, model, Crew(), 0)
    seen: list[Any] = []

    def layer(name: str, inputs: Any) -> Any:
        module = model.get_submodule(name)
        seen.extend(observe(module, inside(name, found, module), inputs, sample, Crew()))
        return module

    walk(model, stacks(model, found), mine, layer)
    assert len(seen) == len(whole) == 2
    for a, b in zip(seen, whole, strict=True):
        assert a.tokens == b.tokens
        for key in ("query", "key", "pair", "output", "mean"):
            torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(a.gradient, b.gradient)
        assert (torch.linalg.eigvalsh(a.gradient) > 0).all()


def test_later_blocks_are_calibrated_behind_cut_ones(tmp_path: Path) -> None:
    """The last block depends on what was cut before it: cut alone it is another one."""
    _, batches, source = prepared("whisper", tmp_path / "dense", torch.float32)
    prune_folder(source, tmp_path / "all", vo=0.5, calibration=batches, granularity="model")
    prune_folder(source, tmp_path / "cross", vo=0.5, calibration=batches, granularity="model", part="cross")
    key = "model.decoder.layers.1.encoder_attn.o_proj.weight"
    both = [tensors(tmp_path / which)[key] for which in ("all", "cross")]
    assert both[0].shape == both[1].shape
    assert not torch.allclose(both[0].abs(), both[1].abs(), rtol=1e-2)


def test_padding_is_kept_out(tmp_path: Path) -> None:
    _, _, source = prepared("llama-gqa", tmp_path / "dense")
    ids = torch.randint(3, 60, (3, 12))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    for which in (4, 5):  # whatever stands in the padding
        batch = {"input_ids": ids.masked_fill(mask == 0, which), "attention_mask": mask}
        prune_folder(source, tmp_path / str(which), **CUT, calibration=[batch])
    same(tmp_path / "4", tmp_path / "5")


def test_batches_made_from_the_model(tmp_path: Path) -> None:
    _, batches, source = prepared("llama-gqa", tmp_path / "dense")

    def make(model: Any) -> list[Any]:
        assert model.config.vocab_size == 60
        assert next(model.parameters()).device.type != "meta"
        return batches

    prune_folder(source, tmp_path / "made", **CUT, calibration=make)
    prune_folder(source, tmp_path / "given", **CUT, calibration=batches)
    same(tmp_path / "made", tmp_path / "given")


@pytest.mark.filterwarnings("default:.* tokens reached")
def test_too_little_data_is_told_once(tmp_path: Path) -> None:
    _, batches, source = prepared("llama-gqa", tmp_path)
    with pytest.warns(UserWarning, match=r"tokens reached model.layers.0.self_attn, fewer than the 48 columns") as told:
        prune_folder(source, tmp_path / "out", **CUT, calibration=batches[:1])
    assert len([w for w in told if "tokens reached" in str(w.message)]) == 1


def test_no_batches(tmp_path: Path) -> None:
    _, _, source = prepared("llama-gqa", tmp_path / "dense")
    with pytest.raises(CloverError, match="calibration data is empty"):
        prune_folder(source, tmp_path / "out", **CUT, calibration=[])


def test_batches_that_miss_a_part(tmp_path: Path) -> None:
    _, batches, source = prepared("whisper", tmp_path / "dense")
    only_encoder = [{"input_features": b["input_features"], "decoder_input_ids": None} for b in batches]
    with pytest.raises((CloverError, ValueError), match=r"(no calibration batch reached|decoder_input_ids)"):
        prune_folder(source, tmp_path / "out", **CUT, calibration=only_encoder)


def test_text_alone_for_a_model_of_images(tmp_path: Path) -> None:
    model, _, source = prepared("llava", tmp_path / "dense")
    text = [{"input_ids": torch.randint(3, 60, (2, 9))} for _ in range(3)]
    prune_folder(source, tmp_path / "out", vo=0.4, part="decoder", calibration=text)
    made = clover.load(tmp_path / "out", dtype=torch.float64)
    clover.prune(model, vo=0.4, part="decoder")
    whole = build("llava")[0]
    assert error(made, whole, text[0]) < error(model, whole, text[0])


def test_never_more_than_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a layer are dropped before the next one's are read; those of the head never are."""
    _, batches, source = prepared("llama-gqa", tmp_path / "dense")
    alive: list[int] = []
    fill = Pieces.fill

    def watched(self: Pieces, *args: Any) -> Any:
        import gc
        import weakref

        module = fill(self, *args)
        gc.collect()
        refs.append(weakref.ref(module))
        alive.append(sum(ref() is not None for ref in refs))
        return module

    refs: list[Any] = []
    monkeypatch.setattr(Pieces, "fill", watched)
    read: list[str] = []
    whole = Entry.read
    monkeypatch.setattr(Entry, "read", lambda self, name: read.append(name) or whole(self, name))
    prune_folder(source, tmp_path / "out", **CUT, calibration=batches)
    assert len(alive) == 4
    assert max(alive) <= 2
    assert "lm_head.weight" not in read


# --- killed, and by two processes ---

RUN = """
import os, signal, sys
import torch
from clover.jobs.draft import Draft
from clover.streaming.stream import prune_folder
keep, left = Draft.keep, int(sys.argv[4])

def dying(self, what, *rest):
    global left
    if what == sys.argv[3] and os.environ.get("RANK", "0") == "0":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    keep(self, what, *rest)

Draft.keep = dying
ids = torch.randint(3, 60, (4, 2, 12), generator=torch.Generator().manual_seed(0))
prune_folder(sys.argv[1], sys.argv[2], qk=0.3, vo=0.4, calibration=[{"input_ids": part} for part in ids])
"""


def batches_of_run() -> list[Any]:
    ids = torch.randint(3, 60, (4, 2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids]


@pytest.mark.parametrize(("kind", "after"), [("bases", 1), ("done", 1)])
def test_killed_and_resumed(kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, source = prepared("llama-gqa", tmp_path / "dense", torch.float16)
    out = tmp_path / "out"
    assert python(RUN, source, out, kind, after).returncode == -signal.SIGKILL
    assert not out.exists()
    assert hidden(out).exists()
    kept: list[str] = []
    keep = Draft.keep
    monkeypatch.setattr(Draft, "keep", lambda self, what, *rest: kept.append(what) or keep(self, what, *rest))
    prune_folder(source, out, **CUT, calibration=batches_of_run(), resume=True)
    assert kept[0] == kind
    assert kept.count(kind) < 2 + (kind == "done") * 2
    prune_folder(source, tmp_path / "straight", **CUT, calibration=batches_of_run())
    same(tmp_path / "straight", out)


def test_other_batches_are_another_request(tmp_path: Path) -> None:
    _, batches, source = prepared("llama-gqa", tmp_path / "dense", torch.float16)
    python(RUN, source, tmp_path / "out", "done", 1)
    with pytest.raises(CloverError, match=r"draft of another request .calibration "):
        prune_folder(source, tmp_path / "out", **CUT, calibration=batches)


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    _, _, source = prepared("llama-gqa", tmp_path / "dense", torch.float32)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29631", script]
    run = [str(c) for c in [*command, source, tmp_path / "two", "never", 99]]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    prune_folder(source, tmp_path / "one", **CUT, calibration=batches_of_run())
    one, two = clover.load(tmp_path / "one"), clover.load(tmp_path / "two")
    assert clover.plan_of(one) == clover.plan_of(two)
    for batch in batches_of_run():
        torch.testing.assert_close(outputs(one, batch), outputs(two, batch), rtol=1e-4, atol=1e-4)
