"""Random configurations of one family: exact at full rank, and cut, saved, loaded and generating alike."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st

import clover
from families import outputs


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Heads, KV heads, a head size that need not be width over heads, biases, partial rotation, tied weights."""
    kv, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "num_attention_heads": kv * queries,
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([8, 12, 16, 20])),
        "hidden_size": kv * queries * draw(st.sampled_from([4, 10, 16])),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "num_hidden_layers": draw(st.integers(1, 2)),
    }


def build(config: dict[str, Any], dtype: torch.dtype, partial: float = 1.0) -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    sizes = {"vocab_size": 60, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
    if partial < 1:  # of the classes that turn a part of each head
        del config["attention_bias"]
        model: Any = t.PhiForCausalLM(t.PhiConfig(**(sizes | config), rope_parameters=rope))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(**(sizes | config), rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


@settings(max_examples=12)
@given(configs(), st.booleans())
def test_full_rank_keeps_the_outputs(config: dict[str, Any], calibrated: bool) -> None:
    model = build(config, torch.float64)
    batch = {"input_ids": torch.randint(3, 60, (2, 9))}
    dense = outputs(model, batch)
    if calibrated:
        clover.prune(model, qk=0.0, vo=0.0, calibration=[batch])
    else:
        clover.orthogonalize(model)
    assert (outputs(model, batch) - dense).abs().max() < 1e-9


@settings(max_examples=10)
@given(
    configs(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(0, 0.7),
    st.floats(0, 0.7),
    st.sampled_from(["head", "layer", "model"]),
)
def test_cut_saved_loaded_and_generating(
    config: dict[str, Any], dtype: torch.dtype, qk: float, vo: float, granularity: Any
) -> None:
    model = build(config, dtype)
    batch = {"input_ids": torch.randint(3, 60, (2, 9))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*")  # what a rule could not reach is said, and is not the matter here
        clover.prune(model, qk=qk, vo=vo, granularity=granularity, calibration=[batch])
    with tempfile.TemporaryDirectory() as folder:
        clover.save(model, folder + "/model")
        loaded = clover.load(folder + "/model")
        found = outputs(model, batch)
        assert found.isfinite().all()
        assert torch.equal(outputs(loaded, batch), found)
        assert clover.plan_of(loaded) == clover.plan_of(model)
        kwargs: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        written = loaded.generate(**batch, **kwargs)
        assert torch.equal(written, model.generate(**batch, **kwargs))
        assert written.shape == (2, 14)


@settings(max_examples=6)
@given(configs(), st.sampled_from([0.25, 0.5]))
def test_partial_rotation(config: dict[str, Any], partial: float) -> None:
    config["head_dim"] = 16
    config["hidden_size"] = 16 * config["num_attention_heads"]
    model = build(config, torch.float64, partial)
    batch = {"input_ids": torch.randint(3, 60, (2, 9))}
    dense = outputs(model, batch)
    clover.orthogonalize(model)
    assert (outputs(model, batch) - dense).abs().max() < 1e-9
