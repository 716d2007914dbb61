"""Pruned models in ONNX Runtime beside the dense ones: in turns, in one process, float32, medians.

    python benchmarks/runtimes.py [smollm2] [whisper]     (all when left out)

smollm2: prefill and decode with the cache, dense and with half of Q-K and V-O cut; "full rank" is the dense
model in this project's attention, so that what the graph's form does is not taken for what pruning does.
whisper: encoder, decoder and transcripts of Whisper-base, dense and at the shares of the speed benchmark.
Each graph was compared with PyTorch when it was written; "difference" is the largest that was seen. Where OpenVINO is
installed it runs the same files.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import clover
import speech
from clover.measure.data import audio_features
from clover.measure.files import read_manifest
from clover.runtimes import onnx
from common import chosen, record, side_by_side
from speed import ENCODER, cut_all, language_models, loaded

CONTEXTS = (128, 2048)
PREFILL, NEW_TOKENS, REPEATS = 512, 16, 7
PROMPT = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


def write(models: dict[str, Any], scratch: Path) -> dict[str, dict]:
    """Every model as ONNX; how long that takes, how large it is and how far from PyTorch."""
    result = {}
    for number, (name, model) in enumerate(models.items()):
        start = time.perf_counter()
        seen = onnx.export(model, scratch / str(number))
        files = {f.stem: f.stat().st_size for f in (scratch / str(number)).glob("*.onnx")}
        result[name] = {"seconds": time.perf_counter() - start, "difference": seen, "bytes": files}
    return result


def session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def sizes(runner: Any, free: dict[str, int]) -> dict[str, list[int]]:
    """Shapes of a session's inputs, the free sizes filled in."""
    free = free | {"past + sequence": free["past"] + free["sequence"]}
    return {i.name: [free.get(s, s) for s in i.shape] for i in runner.get_inputs()}


def random(runner: Any, free: dict[str, int]) -> dict[str, Any]:
    """Inputs of a session, as it keeps them itself."""
    source = np.random.default_rng(0)
    made: dict[str, Any] = {
        k: source.standard_normal(s, dtype=np.float32) for k, s in sizes(runner, free).items() if "past_" in k
    }
    batch, new, had = free["batch"], free["sequence"], free["past"]
    made["input_ids"] = source.integers(1000, size=(batch, new))
    made["attention_mask"] = np.ones((batch, had + new), np.int64)
    made["position_ids"] = np.broadcast_to(np.arange(had, had + new), (batch, new)).copy()
    return {i.name: onnxruntime.OrtValue.ortvalue_from_numpy(made[i.name]) for i in runner.get_inputs()}


def ids(values: list[int]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.array([values], np.int64))


def reader(runner: Any) -> Callable[[], float]:
    """Seconds to read a prompt."""
    inputs = random(runner, {"batch": 1, "sequence": PREFILL, "past": 0})

    def call() -> float:
        start = time.perf_counter()
        runner.run_with_ort_values(["logits"], inputs)
        return time.perf_counter() - start

    return call


def writer(runner: Any, context: int) -> Callable[[], float]:
    """Seconds to write a token behind a context: what comes out of a step goes into the next without a copy."""
    names = [o.name for o in runner.get_outputs()]

    def call() -> float:
        inputs = random(runner, {"batch": 1, "sequence": 1, "past": context})
        start = time.perf_counter()
        for step in range(1, NEW_TOKENS + 1):
            out = dict(zip(names, runner.run_with_ort_values(names, inputs), strict=True))
            inputs |= {k.replace("present", "past_key_values"): v for k, v in out.items() if k != "logits"}
            inputs |= {"input_ids": ids([7]), "attention_mask": ids([1] * (context + step + 1))}
            inputs |= {"position_ids": ids([context + step])}
        return (time.perf_counter() - start) / NEW_TOKENS

    return call


def cache_bytes(runner: Any) -> int:
    """Bytes of keys and values of one token."""
    shapes = sizes(runner, {"batch": 1, "sequence": 1, "past": 1})
    return sum(4 * int(np.prod(s)) for k, s in shapes.items() if "past_" in k and "encoder" not in k)


def smollm2() -> dict:
    with language_models() as folders:
        models = loaded(folders)
    full = clover.orthogonalize(copy.deepcopy(models["dense"]))
    models = {"dense": models["dense"], "full rank": full, "50 %": models["50 %"]}
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"written": write(models, Path(scratch))}
        files = {name: Path(scratch) / str(i) / "model.onnx" for i, name in enumerate(models)}
        runners = {name: session(file) for name, file in files.items()}
        result["kv_bytes_per_token"] = {name: cache_bytes(r) for name, r in runners.items()}
        result["prefill"] = side_by_side({name: reader(r) for name, r in runners.items()}, REPEATS)
        for context in CONTEXTS:
            calls = {name: writer(r, context) for name, r in runners.items()}
            result[f"decode at {context}"] = side_by_side(calls, REPEATS)
        return {"protocol": protocol(), **result, "openvino": openvino(runners, files)}


def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    """As numpy's own types: 64-bit integers of ONNX Runtime bear C's other name for them, which OpenVINO refuses."""
    return {k: v.numpy().astype(v.numpy().dtype.name) for k, v in inputs.items()}


def openvino(runners: dict[str, Any], files: dict[str, Path]) -> dict | None:
    """The same files in OpenVINO: difference to ONNX Runtime and seconds of one call, where it is installed."""
    if find_spec("openvino") is None:
        return None
    from openvino import Core

    core, compiled, inputs, gaps = Core(), {}, {}, {}
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    for name, file in files.items():
        compiled[name] = core.compile_model(str(file), "CPU", exact)
        free = {"batch": 1, "sequence": 8, "past": 128}
        inputs[name] = arrays(random(runners[name], free))
        wanted = runners[name].run(["logits"], inputs[name])[0]
        gaps[name] = float(np.abs(compiled[name](inputs[name])["logits"] - wanted).max())
        inputs[name] = arrays(random(runners[name], {"batch": 1, "sequence": 1, "past": max(CONTEXTS)}))

    def caller(name: str) -> Callable[[], float]:
        def call() -> float:
            start = time.perf_counter()
            compiled[name](inputs[name])
            return time.perf_counter() - start

        return call

    seconds = side_by_side({name: caller(name) for name in files}, REPEATS)
    return {"version": version("openvino"), "difference": gaps, f"one token at {max(CONTEXTS)}": seconds}


# --- speech ---


def transcribe(encoder: Any, decoder: Any, features: torch.Tensor, config: Any, start: list[int]) -> list[int]:
    """Greedy, as ``generate`` does it: the tokens that are never written are those of the generation config."""
    heard = onnx.run(encoder, {"input_features": features})
    state = {k.replace("present", "past_key_values"): v for k, v in heard.items() if k.startswith("present")}
    shapes = sizes(decoder, {"batch": 1, "sequence": 1, "past": 0})
    state |= {k: torch.zeros(s) for k, s in shapes.items() if ".decoder." in k}
    written, fresh = list(start), start
    while len(written) < config.max_length:
        out = onnx.run(decoder, {"input_ids": torch.tensor([fresh]), **state})
        logits = out["logits"][0, -1]
        logits[config.suppress_tokens] = -torch.inf
        if len(written) == len(start):
            logits[config.begin_suppress_tokens] = -torch.inf
        fresh = [int(logits.argmax())]
        written += fresh
        if fresh[0] == config.eos_token_id:
            break
        state |= {k.replace("present", "past_key_values"): v for k, v in out.items() if k != "logits"}
    return written


def whisper() -> dict:
    with cut_all(speech.dense(), speech.bases("encoder", "activations"), ENCODER) as folders:
        models = loaded(folders)
    tokenizer, extractor = speech.processor().tokenizer, speech.processor().feature_extractor
    clips = [audio_features([u.file], extractor) for u in read_manifest(speech.MANIFEST, "test")[: speech.LIMIT]]
    config, prompt = speech.dense().generation_config, tokenizer.convert_tokens_to_ids(PROMPT)
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"written": write(models, Path(scratch))}
        runners = {
            name: [session(Path(scratch) / str(i) / f"{part}_model.onnx") for part in ("encoder", "decoder")]
            for i, name in enumerate(models)
        }
        equal = {}
        for name, model in models.items():
            texts = []
            for clip in clips:
                tokens = model.generate(
                    clip, language="en", task="transcribe", num_beams=1, do_sample=False, return_timestamps=False
                )
                encoder, decoder = runners[name]
                written = transcribe(encoder, decoder, clip, config, prompt)
                texts.append([tokenizer.decode(t, skip_special_tokens=True) for t in (tokens[0], written)])
            equal[name] = {"clips": len(texts), "identical": sum(a == b for a, b in texts)}
        result["transcripts"] = equal

        def hear(name: str) -> Callable[[], float]:
            def call() -> float:
                start = time.perf_counter()
                onnx.run(runners[name][0], {"input_features": clips[0]})
                return time.perf_counter() - start

            return call

        result["encoder"] = side_by_side({name: hear(name) for name in models}, REPEATS)
        return {"protocol": protocol(), **result}


def protocol() -> dict:
    packages = {p: version(p) for p in ("onnxruntime", "onnx", "onnxscript")}
    return {
        "batch": 1,
        "prefill": PREFILL,
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "seconds": "median",
        **packages,
    }


if __name__ == "__main__":
    benchmarks: dict[str, Callable[[], dict]] = {"smollm2": smollm2, "whisper": whisper}
    for name in chosen(benchmarks):
        record(f"runtimes-{name}", benchmarks[name]())
